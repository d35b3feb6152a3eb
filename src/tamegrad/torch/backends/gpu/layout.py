"""The tables that the GPU kernels read: where gradients are, their sizes and dtypes, and their chunks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.torch.backends.kept import is_capturing, refuse_capture
from tamegrad.torch.memory import PARTS, Memory

__all__ = ["BLOCK", "CHUNK", "Layout", "facts_of", "is_aligned"]

# Not tuned on a device. With Triton's default of four warps a block is eight values a thread, few enough to keep three
# float64 sums of each in registers. With chunks of 16 blocks a hundred million values make thousands of programs, and
# the 80 bytes of sums that each writes are little next to what it reads.
BLOCK = 1024
CHUNK = 16 * BLOCK
# The widest loads of a thread need addresses that are multiples of this many bytes.
ALIGNMENT = 16
# The address tables that one step fills: to measure, and to apply.
TABLES_IN_STEP = 2


class Layout:
    """The tables for gradients of certain sizes and dtypes on one device.

    Sizes and dtypes never change; addresses are looked up in every step, and uploaded if they are not those of the last
    one. Several threads may use one layout.

    Args:
        facts: `(N, 4)`: what `facts_of` returns.
        groups: The number of groups.
        device: The device.

    Attributes:
        facts: As given.
        device: As given.
        facts_on_device: `(N, 3)`: how many real numbers each gradient has, its group and its dtype.
        chunks: `(C, 2)`: the gradient that each chunk is part of, and where in it the chunk starts; ordered by group.
        measured: `(M, 2)`: the chunks that are measured here.
        ends: `(G + 1,)`: where in `measured` each group starts, and the last one ends.
        present: Has the bit of each dtype among the gradients set.
    """

    def __init__(self, facts: NDArray[np.int64], groups: int, device: torch.device) -> None:
        self.facts, self.device = facts, device
        table = torch.from_numpy(facts)
        counts = (table[:, 0] + CHUNK - 1) // CHUNK
        by_group = table[:, 1].argsort(stable=True)
        counted = counts * table[:, 3]
        ends = torch.zeros(groups + 1, dtype=torch.int64, device="cpu")
        ends = ends.index_add_(0, table[:, 1] + 1, counted).cumsum(0)
        self.facts_on_device = _uploaded(table[:, :3].contiguous(), device)
        self.chunks = _uploaded(_chunks(by_group, counts[by_group]), device)
        self.measured = _uploaded(_chunks(by_group, counted[by_group]), device)
        self.ends = _uploaded(ends, device)
        self.present = sum(1 << dtype for dtype in set(facts[:, 2].tolist()))
        self._last: tuple[NDArray[np.int64], Tensor] = (np.empty(0, dtype=np.int64), self.ends)
        self._spares: list[Tensor] = []
        self._replayed: list[tuple[Tensor, Tensor | None]] = []

    @property
    def is_replayed(self) -> bool:
        """Whether a captured CUDA graph reads the tables."""
        return bool(self._replayed)

    def addresses_on_device(self, addresses: NDArray[np.int64]) -> Tensor:
        """Returns the addresses as a table on the device; the host does not wait for the upload."""
        known, table = self._last
        same = np.array_equal(addresses, known)
        if is_capturing():
            return self._captured(addresses, table if same else None)
        if not same:
            table = _uploaded(torch.from_numpy(addresses), self.device)
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


def facts_of(memory: Memory, group_of: NDArray[np.int64], counted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns for each parameter how many real numbers its gradient has, its group, dtype, and whether it is measured.

    Args:
        memory: One entry a parameter.
        group_of: `(P,)`: the group of each.
        counted: `(P,)`: whether each is measured here.

    Returns:
        `(P, 4)`.
    """
    return np.stack([memory.counts * PARTS[memory.dtypes], group_of, memory.dtypes, counted], 1)


def is_aligned(addresses: NDArray[np.int64]) -> bool:
    """Returns whether every address allows the widest loads."""
    return not (addresses % ALIGNMENT).any()


def _chunks(gradients: Tensor, counts: Tensor) -> Tensor:
    """Cuts gradients into as many chunks as their counts say, in this order."""
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    starts = (torch.arange(len(before), device="cpu") - before) * CHUNK
    return torch.stack([gradients.repeat_interleave(counts), starts], 1)


def _uploaded(host: Tensor, device: torch.device) -> Tensor:
    """Copies to a device from pinned memory, which PyTorch keeps until the copy is done; the host does not wait."""
    return _pinned(host, device).to(device, non_blocking=True)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory()
