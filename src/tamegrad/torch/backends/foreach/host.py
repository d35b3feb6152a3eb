"""Multi-tensor operations on the CPU: through one float64 buffer of bounded size, in pieces."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import BEFORE, COLUMNS, NONFINITE, Decision, Rules
from tamegrad.torch.backends import tensorwise
from tamegrad.torch.backends.base import on_device
from tamegrad.torch.backends.foreach.part import Part
from tamegrad.torch.backends.tensorwise import as_real, change_, count_nonfinite, measured, pieces_of
from tamegrad.torch.memory import NARROW

__all__ = ["HostGradients"]

_MIDDLE = BEFORE.start + 1

# Gradients of one dtype, each with its group.
_Bucket: TypeAlias = list[tuple[int, Tensor]]


class HostGradients:
    """Measures and changes gradients on the CPU.

    Args:
        rules: The rules of the plan.
    """

    def __init__(self, rules: Rules[NDArray[Any]]) -> None:
        self._limited = np.isfinite(rules.limits)

    def measured(self, part: Part, limits: Tensor | None) -> Tensor:
        """Measures gradients.

        Args:
            part: The gradients.
            limits: `(G,)` limits on elements on their device, or None.

        Returns:
            The `(G, COLUMNS)` table on their device.
        """
        table = torch.zeros(len(self._limited), COLUMNS, dtype=torch.float64, device=part.device)
        together, alone = self._split(part)
        for bucket in together:
            _add_bucket(table, bucket)
        for group, values in alone:
            limit = limits[group] if limits is not None and self._limited[group] else None
            table[group] += measured(values, limit)
        return table

    def change_(self, part: Part, decision: Decision[Any]) -> None:
        """Applies a decision in place."""
        together, alone = self._split(part)
        for bucket in together:
            _change_bucket(bucket, decision)
        vectors = (decision.first, decision.second, decision.limits, decision.zeroed)
        moved = [None if vector is None else on_device(vector, part.device) for vector in vectors]
        for group, values in alone:
            factors: Any = (None if vector is None else vector[group] for vector in moved)
            change_(values, *factors)

    def _split(self, part: Part) -> tuple[list[_Bucket], _Bucket]:
        """Returns gradients that go together, and those that go alone."""
        buckets: dict[int, _Bucket] = {}
        alone: _Bucket = []
        together = (NARROW[part.dtypes] & ~self._limited[part.groups]).tolist()
        rows = zip(part.groups.tolist(), part.dtypes.tolist(), part.values, together, strict=True)
        for group, dtype, values, joined in rows:
            (buckets.setdefault(dtype, []) if joined else alone).append((group, values))
        return list(buckets.values()), alone


def _add_bucket(table: Tensor, bucket: _Bucket) -> None:
    """Adds what a bucket measures to the table."""
    pieces, groups = _in_pieces(bucket)
    squares = torch.stack([torch.dot(wide, wide) for _, batch in _widened(pieces) for wide in batch])
    ends = np.cumsum(np.bincount(groups, minlength=len(table)))
    offsets = torch.from_numpy(np.concatenate([[0], ends]))
    sums = torch.segment_reduce(squares, "sum", offsets=offsets, unsafe=True, initial=0)
    table[:, _MIDDLE] += sums
    nonfinite = ~np.isfinite(sums.numpy())
    for group, values in bucket:
        if nonfinite[group]:
            table[group, NONFINITE] += count_nonfinite(values)


def _change_bucket(bucket: _Bucket, decision: Decision[Any]) -> None:
    """Multiplies what goes together; in float64, rounded once."""
    device = bucket[0][1].device
    # The result of a scale that one float64 cannot hold is zero in these dtypes, or infinite but for zeros.
    first, second = on_device(decision.first, device), on_device(decision.second, device)
    factors = (first * second).clamp(max=torch.finfo(torch.float64).max)
    pieces, groups = _in_pieces(bucket)
    _multiply_(pieces, factors[torch.tensor(groups, device=device)])
    if decision.zeroed is not None:
        zeroed = on_device(decision.zeroed, device)
        for group, values in bucket:
            # Nothing else turns NaN into zero.
            values.masked_fill_(zeroed[group], 0.0)


def _in_pieces(bucket: _Bucket) -> tuple[list[Tensor], list[int]]:
    """Returns gradients as 1-dim pieces of bounded size, with the group of each."""
    pieces, groups = [], []
    for group, values in bucket:
        parts = pieces_of(as_real(values))
        pieces += parts
        groups += [group] * len(parts)
    return pieces, groups


def _multiply_(pieces: list[Tensor], factors: Tensor) -> None:
    """Multiplies each piece by its factor, `(N,)` float64."""
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
