"""Multi-tensor operations on an accelerator, where launches and waiting for the device cost most.

A few launches measure all tensors of a dtype. To change them, a large tensor takes one launch: a factor of shape (1,)
is not rounded to the gradient's dtype first, as one without dimensions would be. Small tensors share launches over a
float64 buffer of bounded size. Tables of indices are uploaded once for each set of gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE, Decision, Rules
from tamegrad.torch.backends.base import on_device
from tamegrad.torch.backends.foreach.part import Part
from tamegrad.torch.backends.kept import Kept, uploaded
from tamegrad.torch.backends.tensorwise import SMALLEST_LIMIT, as_real, change_, measured
from tamegrad.torch.memory import DTYPES, NARROW, PARTS

__all__ = ["DeviceGradients"]

_MIDDLE_BEFORE, _MIDDLE_AFTER = BEFORE.start + 1, AFTER.start + 1
_REAL = np.array([not dtype.is_complex for dtype in DTYPES])
# The real numbers in the float64 buffer, in a tensor that is worth a launch of its own, and the least small tensors
# that are worth the buffer's launches.
BUFFER, LARGE, FEW = 2**23, 2**16, 8


class DeviceGradients:
    """Measures and changes gradients on one accelerator.

    Args:
        rules: The rules of the plan.
    """

    def __init__(self, rules: Rules[NDArray[Any]]) -> None:
        self._limits = rules.limits
        self._measurings: Kept[_Measuring] = Kept()
        self._changings: Kept[_Changing] = Kept()

    def measured(self, part: Part, limits: Tensor | None) -> Tensor:
        """Measures gradients; arguments and result as in `HostGradients`."""
        layout = self._measurings.get(part.device, part.key, lambda: _Measuring(part, self._limits))
        table = torch.zeros(len(self._limits), COLUMNS, dtype=torch.float64, device=part.device)
        if layout.buckets:
            buckets = [[as_real(part.values[i]) for i in bucket] for bucket in layout.buckets]
            sums = layout.together.add_up(torch.cat([_norms(bucket, 2.0) for bucket in buckets]).square_())
            table[:, _MIDDLE_BEFORE] = sums
            table[:, NONFINITE.start] = sums.isfinite().logical_not_()
        if limits is not None and layout.limited:
            self._add_limited(table, part, layout, limits)
        for i in layout.alone:
            group = part.groups[i]
            limit = limits[group] if limits is not None and np.isfinite(self._limits[group]) else None
            table[group] += measured(part.values[i], limit)
        return table

    def change_(self, part: Part, decision: Decision[Any]) -> None:
        """Applies a decision in place."""
        layout = self._changings.get(part.device, part.key, lambda: _Changing(part, self._limits))
        vectors = decision.first, decision.second, decision.limits, decision.zeroed
        first, second, limits, zeroed = (None if v is None else on_device(v, part.device) for v in vectors)
        assert first is not None
        assert second is not None
        # The result of a scale that one float64 cannot hold is zero in these dtypes, or infinite but for zeros.
        factors = (first * second).clamp_(max=torch.finfo(torch.float64).max)
        for batch in layout.batches:
            _change_batch(part, batch, factors, limits, zeroed)
        if layout.multiplied:
            own = factors.index_select(0, layout.groups_of_multiplied)
            torch._foreach_mul_([as_real(part.values[i]) for i in layout.multiplied], list(torch.split(own, 1)))
        if layout.cut and limits is not None:
            upper, lower = limits.unbind(), limits.neg().unbind()
            for i in layout.cut:
                group = part.groups[i]
                # A limit that is rounded to the dtype cuts the same values, and to the same value.
                part.values[i].clamp_(lower[group], upper[group])
        if zeroed is not None:
            flags = zeroed.unbind()
            for i in layout.multiplied + layout.cut:
                # Nothing else turns NaN into zero.
                part.values[i].masked_fill_(flags[part.groups[i]], 0.0)
        for i in layout.alone:
            own_vectors: Any = (None if v is None else v[part.groups[i]] for v in (first, second, limits, zeroed))
            change_(part.values[i], *own_vectors)

    def _add_limited(self, table: Tensor, part: Part, layout: "_Measuring", limits: Tensor) -> None:
        """Adds what limits on elements leave of real gradients, and whether they cut any."""
        buckets = [[as_real(part.values[i]) for i in bucket] for bucket in layout.limited]
        largest = torch.cat([_norms(bucket, torch.inf).to(torch.float64) for bucket in buckets])
        own = limits.index_select(0, layout.groups_of_limited)
        table[:, CUT] = layout.among_limited.add_up((largest > own).to(torch.float64))
        flat = [values for bucket in buckets for values in bucket]
        left = []
        for pieces, group in layout.pieces:
            buffer, views = _widened([flat[i][start:stop] for i, start, stop in pieces])
            buffer.clamp_(-limits[group], limits[group])
            left.append(_norms(views, 2.0))
        table[:, _MIDDLE_AFTER] = layout.among_pieces.add_up(torch.cat(left).square_())


class _Sums:
    """Adds up numbers by group, in a fixed order and without atomics.

    Args:
        groups: `(N,)`: the group of each number.
        count: How many groups there are.
        device: Where the numbers are.
    """

    def __init__(self, groups: NDArray[np.int64], count: int, device: torch.device) -> None:
        order = np.argsort(groups, kind="stable")
        self._order = None if (order == np.arange(len(order))).all() else uploaded(order, device)
        ends = np.cumsum(np.bincount(groups, minlength=count))
        self._offsets = uploaded(np.concatenate([[0], ends]), device)

    def add_up(self, numbers: Tensor) -> Tensor:
        """Returns the `(G,)` sums of `(N,)` numbers."""
        ordered = numbers if self._order is None else numbers.index_select(0, self._order)
        return torch.segment_reduce(ordered, "sum", offsets=self._offsets, unsafe=True, initial=0)


class _Measuring:
    """Which gradients of a part are measured together.

    Attributes:
        buckets: Those of each dtype, whose norms take a few launches.
        together: Adds up what they measure.
        limited: Those of each dtype that are real and have a limit on elements.
        among_limited: Adds up what they measure.
        groups_of_limited: `(N,)` on the device.
        pieces: Batches of pieces of them that fit into a buffer, with one limit each, which is that of a group. A piece
            is a position in `limited`, and where it starts and ends.
        among_pieces: Adds up what pieces measure.
        alone: Those that are measured one by one.
    """

    def __init__(self, part: Part, limits: NDArray[np.float64]) -> None:
        count, device = len(limits), part.device
        is_limited = np.isfinite(limits[part.groups])
        # The squares of what a smaller limit leaves need three ranges.
        may_be_limited = _REAL[part.dtypes] & (limits[part.groups] > SMALLEST_LIMIT)
        is_joined = NARROW[part.dtypes] & (may_be_limited | ~is_limited)
        self.alone = np.flatnonzero(~is_joined).tolist()
        self.buckets = _by_dtype(part, is_joined)
        self.limited = _by_dtype(part, is_joined & is_limited)
        self.pieces: list[tuple[list[tuple[int, int, int]], int]] = []
        if self.buckets:
            self.together = _Sums(_groups(part, self.buckets), count, device)
        if self.limited:
            groups = _groups(part, self.limited)
            self.among_limited = _Sums(groups, count, device)
            self.groups_of_limited = uploaded(groups, device)
            flat = [i for bucket in self.limited for i in bucket]
            self.pieces = list(_cut(part.counts[flat], groups, limits))
            of_pieces = [groups[piece[0]] for pieces, _ in self.pieces for piece in pieces]
            self.among_pieces = _Sums(np.array(of_pieces), count, device)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Small gradients that are changed together.

    Args:
        members: Which gradients of a part.
        groups: `(N,)` on the device: the group of each.
        sizes: `(N,)` on the device: how many real numbers each has.
        is_limited: Whether limits on elements apply to them; else they are multiplied.
    """

    members: list[int]
    groups: Tensor
    sizes: Tensor
    is_limited: bool


class _Changing:
    """Which gradients of a part are changed together.

    Attributes:
        batches: Small ones.
        multiplied: Large ones that are multiplied.
        groups_of_multiplied: `(N,)` on the device.
        cut: Large ones whose elements are limited.
        alone: Those that are changed one by one.
    """

    def __init__(self, part: Part, limits: NDArray[np.float64]) -> None:
        is_limited = np.isfinite(limits[part.groups])
        is_joined = NARROW[part.dtypes] & (_REAL[part.dtypes] | ~is_limited)
        sizes = part.counts * PARTS[part.dtypes]
        self.alone = np.flatnonzero(~is_joined).tolist()
        self.batches: list[_Batch] = []
        large = {}
        for limited in (False, True):
            chosen = is_joined & (is_limited == limited)
            small = chosen & (sizes <= LARGE)
            if small.sum() < FEW:
                small[:] = False
            for bucket in _by_dtype(part, small):
                self.batches += [_batch(part, members, limited) for members in _filled(bucket, sizes)]
            large[limited] = np.flatnonzero(chosen & ~small)
        self.multiplied, self.cut = large[False].tolist(), large[True].tolist()
        self.groups_of_multiplied = uploaded(part.groups[large[False]], part.device)


def _batch(part: Part, members: list[int], is_limited: bool) -> _Batch:  # noqa: FBT001
    sizes = part.counts[members] * PARTS[part.dtypes[members]]
    return _Batch(members, uploaded(part.groups[members], part.device), uploaded(sizes, part.device), is_limited)


def _change_batch(part: Part, batch: _Batch, factors: Tensor, limits: Tensor | None, zeroed: Tensor | None) -> None:
    """Changes a batch in a float64 buffer."""
    tensors = [as_real(part.values[i]) for i in batch.members]
    buffer, views = _widened(tensors)
    # The group of each number; without the size the host would wait for it.
    which = torch.repeat_interleave(batch.groups, batch.sizes, output_size=len(buffer))
    if not batch.is_limited:
        buffer *= factors.index_select(0, which)
    elif limits is not None:
        upper = limits.index_select(0, which)
        buffer.clamp_(-upper, upper)
    if zeroed is not None:
        buffer.masked_fill_(zeroed.index_select(0, which), 0.0)
    torch._foreach_copy_(tensors, views)


def _widened(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies 1-dim tensors to a float64 buffer; returns it and a view of it for each."""
    counts = [len(tensor) for tensor in tensors]
    buffer = torch.empty(sum(counts), dtype=torch.float64, device=tensors[0].device)
    views = list(torch.split(buffer, counts))
    torch._foreach_copy_(views, list(tensors))
    return buffer, views


def _norms(tensors: list[Tensor], order: float) -> Tensor:
    """Returns the norms of tensors of one dtype; Euclidean ones in float64."""
    if order == torch.inf:
        return torch.stack(torch._foreach_norm(tensors, order))  # noqa: SLF001
    return torch.stack(torch._foreach_norm(tensors, order, dtype=torch.float64))  # noqa: SLF001


def _by_dtype(part: Part, chosen: NDArray[np.bool_]) -> list[list[int]]:
    """Returns the chosen gradients of each dtype."""
    dtypes = np.unique(part.dtypes[chosen])
    return [np.flatnonzero(chosen & (part.dtypes == dtype)).tolist() for dtype in dtypes]


def _groups(part: Part, buckets: list[list[int]]) -> NDArray[np.int64]:
    return part.groups[[i for bucket in buckets for i in bucket]]


def _filled(members: list[int], sizes: NDArray[np.int64]) -> Iterator[list[int]]:
    """Yields members in batches that fit into the buffer."""
    batch: list[int] = []
    free = BUFFER
    for member in members:
        size = int(sizes[member])
        if batch and size > free:
            yield batch
            batch, free = [], BUFFER
        batch.append(member)
        free -= size
    if batch:
        yield batch


def _cut(
    counts: NDArray[np.int64], groups: NDArray[np.int64], limits: NDArray[np.float64]
) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
    """Yields batches of pieces that fit into the buffer, each with a group that has the limit of all in it."""
    own = limits[groups]
    for limit in np.unique(own):
        members = np.flatnonzero(own == limit)
        batch: list[tuple[int, int, int]] = []
        free = BUFFER
        for i in members.tolist():
            start, count = 0, int(counts[i])
            while start < count:
                stop = min(count, start + free)
                batch.append((i, start, stop))
                free -= stop - start
                start = stop
                if not free:
                    yield batch, int(groups[members[0]])
                    batch, free = [], BUFFER
        if batch:
            yield batch, int(groups[members[0]])
