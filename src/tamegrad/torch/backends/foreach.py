"""The plain backend: PyTorch's multi-tensor operations, on any device that has float64.

All arithmetic is in float64, and groups are added up in a fixed order. On the CPU these operations would convert whole
tensors to float64; there, gradients go through one float64 buffer of bounded size, in pieces.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import BEFORE, COLUMNS, NONFINITE, Decision
from tamegrad.groups import Plan
from tamegrad.torch.backends import tensorwise
from tamegrad.torch.backends.base import Backend, on_device
from tamegrad.torch.backends.tensorwise import as_real, change_, count_nonfinite, measured, pieces_of
from tamegrad.torch.gradients import Gradients

__all__ = ["ForeachBackend"]

# The dtypes whose squares all fit the middle range of float64.
_NARROW = (torch.float16, torch.bfloat16, torch.float32, torch.complex64)
_MIDDLE = BEFORE.start + 1

# Gradients of one device and dtype, each with the position of its group.
_Bucket: TypeAlias = list[tuple[int, Tensor]]


class ForeachBackend(Backend):
    """Measures and changes the gradients of one plan.

    On a device the count of non-finite values of a group is 0 or 1 ("some"): more would take a second pass.

    Args:
        plan: The plan.
        counted: As in `Backend`.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        super().__init__(plan, counted)
        self._limited = np.isfinite(self.rules.limits)
        in_order = np.argsort(self.group_of, kind="stable")
        self._in_order = list(zip(in_order.tolist(), self.group_of[in_order].tolist(), strict=True))

    @torch.no_grad()
    def measure(self, gradients: Gradients, loss_scale: Tensor | None) -> Tensor:
        """Measures all groups."""
        home = next((values.device for values in gradients.values if values is not None), torch.device("cpu"))
        table = torch.zeros(len(self.plan.groups), COLUMNS, dtype=torch.float64, device=home)
        together, alone = self._split(gradients, self.counted)
        for bucket in together:
            self._add_bucket(table, bucket)
        limits = self.limits_on(home, loss_scale)
        for group, values in alone:
            limit = limits[group].to(values.device) if limits is not None and self._limited[group] else None
            table[group] += measured(values, limit).to(home)
        return table

    @torch.no_grad()
    def apply_(self, gradients: Gradients, decision: Decision[Any], changed: NDArray[np.bool_]) -> None:
        """Applies a decision in place.

        On the CPU a group that keeps its values is not touched. Elsewhere everything is multiplied, with factors of 1
        too, because to look at the decision would make the host wait for the device.
        """
        together, alone = self._split(gradients, changed)
        for bucket in together:
            _change_bucket(bucket, decision)
        for group, values in alone:
            vectors = (decision.first, decision.second, decision.limits, decision.zeroed)
            factors: Any = (None if v is None else on_device(v, values.device)[group] for v in vectors)
            change_(values, *factors)

    def _split(self, gradients: Gradients, chosen: NDArray[np.bool_]) -> tuple[list[_Bucket], _Bucket]:
        """Returns the chosen gradients, each with its group: those that go together, and those that go alone.

        Both are in the order of the groups.
        """
        buckets: dict[tuple[torch.device, torch.dtype], _Bucket] = {}
        alone: _Bucket = []
        for position, group in self._in_order:
            values = gradients.values[position]
            if values is None or not chosen[position] or not values.numel():
                continue
            if values.dtype in _NARROW and not self._limited[group]:
                buckets.setdefault((values.device, values.dtype), []).append((group, values))
            else:
                alone.append((group, values))
        return list(buckets.values()), alone

    def _add_bucket(self, table: Tensor, bucket: _Bucket) -> None:
        """Adds what a bucket measures to the table."""
        pieces, groups = _in_pieces(bucket)
        squares = _sums_of_squares(pieces)
        ends = np.cumsum(np.bincount(groups, minlength=len(table)))
        offsets = torch.from_numpy(np.concatenate([[0], ends])).to(squares.device)
        # No atomics: the same gradients give the same bits.
        sums = torch.segment_reduce(squares, "sum", offsets=offsets, unsafe=True, initial=0)
        sums = sums.to(table.device)
        table[:, _MIDDLE] += sums
        if table.device.type != "cpu":
            table[:, NONFINITE.start] += ~(sums < torch.inf)
            return
        nonfinite = ~np.isfinite(sums.numpy())
        for group, values in bucket:
            if nonfinite[group]:
                table[group, NONFINITE] += count_nonfinite(values).cpu()


def _change_bucket(bucket: _Bucket, decision: Decision[Any]) -> None:
    """Multiplies what goes together; in float64, rounded once."""
    device = bucket[0][1].device
    first, second = on_device(decision.first, device), on_device(decision.second, device)
    # The result of a scale that one float64 cannot hold is zero in these dtypes, or infinite but for zeros.
    factors = (first * second).clamp(max=torch.finfo(torch.float64).max)
    pieces, groups = _in_pieces(bucket)
    _multiply_(pieces, factors[torch.tensor(groups, device=device)])
    if decision.zeroed is not None:
        zeroed = on_device(decision.zeroed, device)
        for group, values in bucket:
            # Nothing else turns NaN into zero.
            values.masked_fill_(zeroed[group], 0.0)


def _in_pieces(bucket: _Bucket) -> tuple[list[Tensor], list[int]]:
    """Returns gradients as 1-dim pieces, on the CPU of bounded size, with the group of each."""
    pieces, groups = [], []
    for group, values in bucket:
        real = as_real(values)
        parts = pieces_of(real) if real.device.type == "cpu" else [real]
        pieces += parts
        groups += [group] * len(parts)
    return pieces, groups


def _sums_of_squares(pieces: list[Tensor]) -> Tensor:
    """Returns the sum of squares of each piece, `(N,)` float64."""
    if pieces[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64)).square_()  # noqa: SLF001
    return torch.stack([torch.dot(wide, wide) for _, batch in _widened(pieces) for wide in batch])


def _multiply_(pieces: list[Tensor], factors: Tensor) -> None:
    """Multiplies each piece by its factor, `(N,)` float64."""
    if pieces[0].device.type != "cpu":
        # A factor without dimensions would be rounded to the dtype of the gradient first.
        torch._foreach_mul_(pieces, list(torch.split(factors, 1)))
        return
    for first, batch in _widened(pieces):
        last = first + len(batch)
        torch._foreach_mul_(batch, list(factors[first:last].unbind()))
        torch._foreach_copy_(pieces[first:last], batch)


def _widened(pieces: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields batches of pieces as float64 views of one buffer, each valid until the next, and where they start."""
    counts = [piece.numel() for piece in pieces]
    buffer = torch.empty(min(sum(counts), tensorwise.HOST_PIECE), dtype=torch.float64, device="cpu")
    first = 0
    while first < len(pieces):
        last, size = first, 0
        while last < len(pieces) and size + counts[last] <= len(buffer):
            size += counts[last]
            last += 1
        batch = list(torch.split(buffer[:size], counts[first:last]))
        torch._foreach_copy_(batch, pieces[first:last])
        yield first, batch
        first = last
