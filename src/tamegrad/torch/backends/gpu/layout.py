"""The tables that the GPU kernels read: where gradients are, their sizes and dtypes, and their chunks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.torch.backends.kept import is_capturing, refuse_capture, uploaded
from tamegrad.torch.memory import PARTS, Memory

__all__ = ["BLOCK", "CHUNK", "Layout", "facts_of"]

# Not tuned on a device. With Triton's default of four warps a block is eight values a thread, few enough to keep three
# float64 sums of each in registers. With chunks of 16 blocks a hundred million values make thousands of programs, and
# the 80 bytes of sums that each writes are little next to what it reads.
BLOCK = 1024
CHUNK = 16 * BLOCK
# A group of more chunks than this is added up in two steps: first in spans of so many chunks, each by a program of its
# own. One program would take as long for a billion values as it takes to read half of them.
TALL, SPAN = 4096, 512
# The address tables that one step fills: to measure, and to apply.
TABLES_IN_STEP = 2


class Layout:
    """The tables for gradients of certain sizes and dtypes on one device, used on one stream and in CUDA graphs.

    Sizes and dtypes never change; addresses are looked up in every step, and uploaded if they are not those of the last
    one. Several threads may use one layout.

    Args:
        facts: `(N, 5)`: what `facts_of` returns.
        groups: The number of groups.
        device: The device.

    Attributes:
        device: As given.
        facts_on_device: `(N, 3)`: how many real numbers each gradient has, its group and its dtype.
        chunks: `(C, 2)`: the gradient that each chunk is part of, and where in it the chunk starts; ordered by group,
            groups with a limit on elements last.
        unlimited: How many of the chunks come before those.
        measured: `(M, 2)`: the chunks that are measured here.
        unlimited_measured: The same for these.
        spans: `(S, 2)`: where in `measured` each span of chunks starts and ends, to be added up first; None where no
            group is so tall that this pays.
        bounds: `(G, 2)`: where each group starts and ends in the spans, or without spans in `measured`.
        present: Has the bit of each dtype among the gradients set.
    """

    def __init__(self, facts: NDArray[np.int64], groups: int, device: torch.device) -> None:
        self.device = device
        self.facts_on_device = uploaded(np.ascontiguousarray(facts[:, :3]), device)
        counts = -(-facts[:, 0] // CHUNK)
        chunks, measured = _chunks(facts, counts), _chunks(facts, counts * facts[:, 3])
        self.chunks, self.measured = uploaded(chunks, device), uploaded(measured, device)
        self.unlimited, self.unlimited_measured = (int((facts[of[:, 0], 4] == 0).sum()) for of in (chunks, measured))
        bounds = _bounds(facts[measured[:, 0], 1], groups)
        self.spans: Tensor | None = None
        if (bounds[:, 1] - bounds[:, 0]).max(initial=0) > TALL:
            spans, groups_of_spans = _spans(bounds)
            self.spans, bounds = uploaded(spans, device), _bounds(groups_of_spans, groups)
        self.bounds = uploaded(bounds, device)
        self.present = sum(1 << dtype for dtype in set(facts[:, 2].tolist()))
        self._last: tuple[NDArray[np.int64], Tensor] = (np.empty(0, dtype=np.int64), self.bounds)
        self._spares: list[Tensor] = []
        self._replayed: list[tuple[Tensor, Tensor | None]] = []

    def addresses_on_device(self, addresses: NDArray[np.int64]) -> Tensor:
        """Returns the addresses as a table on the device; the host does not wait for the upload."""
        known, table = self._last
        same = np.array_equal(addresses, known)
        if is_capturing():
            return self._captured(addresses, table if same else None)
        if not same:
            table = uploaded(addresses, self.device)
            self._last = addresses, table
        while len(self._spares) < TABLES_IN_STEP:
            self._spares.append(_pinned(torch.zeros(len(addresses), dtype=torch.int64, device="cpu"), self.device))
        return table

    def _captured(self, addresses: NDArray[np.int64], table: Tensor | None) -> Tensor:
        """Returns a table for a CUDA graph, which may not allocate pinned memory while it is captured.

        Nothing runs during a capture: a table that the graph itself fills is not ready for a step outside of the graph.
        """
        spare = None
        if table is None:
            if not self._spares:
                refuse_capture("a second step with other addresses")
            spare = self._spares.pop()
            spare.copy_(torch.from_numpy(addresses))
            table = spare.to(self.device, non_blocking=True)
        # Every replay copies from the spare and reads the table, so both have to stay as they are.
        self._replayed.append((table, spare))
        return table


def facts_of(
    memory: Memory, group_of: NDArray[np.int64], counted: NDArray[np.bool_], limited: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Returns for each parameter its gradient's count of real numbers, group and dtype, and two flags.

    Args:
        memory: One entry a parameter.
        group_of: `(P,)`: the group of each.
        counted: `(P,)`: whether each is measured here.
        limited: `(P,)`: whether the elements of each have a limit.

    Returns:
        `(P, 5)`: the flags are the last two columns.
    """
    return np.stack([memory.counts * PARTS[memory.dtypes], group_of, memory.dtypes, counted, limited], 1)


def _chunks(facts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cuts gradients into as many chunks as their counts say; ordered by group, those with a limit last."""
    order = np.lexsort((facts[:, 1], facts[:, 4]))
    counts = counts[order]
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([np.repeat(order, counts), (np.arange(len(before)) - before) * CHUNK], 1)


def _bounds(groups: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Returns where each group starts and ends; `(G, 2)`.

    Args:
        groups: The groups of some rows, those of one group next to each other.
        count: How many groups there are.
    """
    bounds = np.zeros((count, 2), dtype=np.int64)
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    bounds[groups[starts], 0], bounds[groups[starts], 1] = starts, np.append(starts[1:], len(groups))
    return bounds


def _spans(bounds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts the rows of each group into spans; returns where each starts and ends, and its group."""
    counts = -(-(bounds[:, 1] - bounds[:, 0]) // SPAN)
    groups = np.repeat(np.arange(len(bounds)), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    starts = bounds[groups, 0] + (np.arange(len(groups)) - before) * SPAN
    return np.stack([starts, np.minimum(starts + SPAN, bounds[groups, 1])], 1), groups


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory()
