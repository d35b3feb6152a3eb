"""One report of a step that was taken unit by unit."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tamegrad.report import Report
from tamegrad.torch.step import TensorReport

__all__ = ["joined"]


def joined(parts: Sequence[Report[Tensor]]) -> Report[Tensor]:
    """Returns the reports of units as one, in the same order; their tensors are joined when they are read."""
    return _JoinedReport(parts)


class _JoinedReport(TensorReport):
    """Several reports as one."""

    _parts: Sequence[Report[Tensor]]

    def __init__(self, parts: Sequence[Report[Tensor]]) -> None:
        groups = tuple(group for part in parts for group in part.groups)
        vars(self).update(groups=groups, skipped=False, _parts=tuple(parts))

    @property
    def norms(self) -> Tensor:
        return self._joined(lambda part: part.norms)

    @property
    def scales(self) -> Tensor:
        return self._joined(lambda part: part.scales)

    @property
    def norms_after(self) -> Tensor:
        return self._joined(lambda part: part.norms_after)

    @property
    def clipped(self) -> Tensor:
        return self._joined(lambda part: part.clipped)

    @property
    def nonfinite(self) -> Tensor:
        return self._joined(lambda part: part.nonfinite)

    @property
    def total_norm(self) -> Tensor:
        norms = self._joined(lambda part: part.total_norm.reshape(1))
        # The squares of the largest norms overflow, and those of the smallest are zero.
        largest = norms.amax()
        total = largest * (norms / largest).square().sum().sqrt()
        return torch.where((largest > 0) & largest.isfinite(), total, largest)

    def _joined(self, column: Callable[[Report[Tensor]], Tensor]) -> Tensor:
        tensors = [column(part) for part in self._parts]
        # Layers of one model may be on several devices.
        return torch.cat([tensor.to(tensors[0].device) for tensor in tensors])
