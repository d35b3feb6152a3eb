"""The plain backend: PyTorch's multi-tensor operations, on any device.

On the CPU these operations would convert whole tensors to float64, so `host` takes them in pieces. `device` is for
accelerators, where launches and waiting cost most, and `float32` for those that have no float64. Everywhere else all
arithmetic is in float64. Groups are added up in a fixed order, without atomics: the same gradients give the same bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import COLUMNS, Decision
from tamegrad.groups import Plan
from tamegrad.torch.backends.base import Backend
from tamegrad.torch.backends.foreach.device import DeviceGradients
from tamegrad.torch.backends.foreach.float32 import Float32Gradients, has_float64, table_device
from tamegrad.torch.backends.foreach.host import HostGradients
from tamegrad.torch.backends.foreach.part import parts_of
from tamegrad.torch.gradients import Gradients

__all__ = ["ForeachBackend"]


class ForeachBackend(Backend):
    """Measures and changes the gradients of one plan.

    On an accelerator the host never waits for the device, and a step can be captured in a CUDA graph after one outside
    of it with gradients of the same shapes and dtypes. There the count of non-finite values of a group is 0 or 1
    ("some"): more would take a second pass. A device without float64, like Apple's MPS, measures in float32: norms are
    right to 1e-6, and the host reads them in every step to decide.

    Args:
        plan: The plan.
        counted: As in `Backend`.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        super().__init__(plan, counted)
        self._in_order = np.argsort(self.group_of, kind="stable")
        self._on_host = HostGradients(self.rules)
        self._on_device = DeviceGradients(self.rules)
        self._in_float32 = Float32Gradients(self.rules)

    @torch.no_grad()
    def measure(self, gradients: Gradients, loss_scale: Tensor | None) -> Tensor:
        """Measures all groups."""
        tables = []
        for part in parts_of(gradients, self.counted, self.group_of, self._in_order):
            home = table_device(part.device)
            tables.append(self._kind_of(part.device).measured(part, self.limits_on(home, loss_scale)))
        home = next((table_device(one.device) for one in gradients.values if one is not None), torch.device("cpu"))
        if not tables:
            return torch.zeros(len(self.plan.groups), COLUMNS, dtype=torch.float64, device=home)
        table = tables[0].to(home)
        for other in tables[1:]:
            table += other.to(home)
        return table

    @torch.no_grad()
    def apply_(self, gradients: Gradients, decision: Decision[Any], changed: NDArray[np.bool_]) -> None:
        """Applies a decision in place.

        On the CPU a group that keeps its values is not touched. Elsewhere everything that may change is multiplied,
        with factors of 1 too, because to look at the decision would make the host wait for the device.
        """
        for part in parts_of(gradients, changed, self.group_of, self._in_order):
            self._kind_of(part.device).change_(part, decision)

    def _kind_of(self, device: torch.device) -> HostGradients | DeviceGradients | Float32Gradients:
        if device.type == "cpu":
            return self._on_host
        return self._on_device if has_float64(device) else self._in_float32
