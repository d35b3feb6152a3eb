"""Cuts gradients into chunks, and shares the chunks out as tasks that threads take one by one."""

import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tamegrad.torch.memory import DTYPES, PARTS, Memory

__all__ = ["CHUNK", "Work", "cut_into_chunks", "share_out"]

# The real numbers in a chunk: even, so that no complex number is cut in two.
CHUNK = 65_536
# The bytes in a task: few, so that a thread that is held up leaves its share to others, but enough to be worth it.
TASK_BYTES = 2**18
# Below this size threading does not pay.
ALONE_BYTES = 2**21


@dataclass(frozen=True, slots=True)
class Format:
    """How the loops see a dtype: an empty array of what they read, and whether values are pairs of them."""

    like: NDArray[Any]
    pairs: bool = False


FORMATS = {
    torch.float16: Format(np.empty(0, np.int16)),
    torch.bfloat16: Format(np.empty(0, np.uint16)),
    torch.float32: Format(np.empty(0, np.float32)),
    torch.float64: Format(np.empty(0, np.float64)),
    torch.complex64: Format(np.empty(0, np.float32), pairs=True),
    torch.complex128: Format(np.empty(0, np.float64), pairs=True),
}

# A format, and between which of the chunks each of its tasks begins and ends.
Tasks: TypeAlias = tuple[Format, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do for gradients of certain sizes.

    Args:
        counts: `(P,)`: how many values each gradient has.
        dtypes: `(P,)`: their positions in `DTYPES`, or -1 where there is no gradient.
        chunks: `(C, 3)`, dtype by dtype: position of the gradient, first real number, how many.
        chunk_dtypes: `(C,)`: the dtype of each chunk.
        measured: `(M, 3)`: the chunks that this rank measures.
        groups: `(M,)`: the group of each of those.
        measuring: They, shared out as tasks.
    """

    counts: NDArray[np.int64]
    dtypes: NDArray[np.int64]
    chunks: NDArray[np.int64]
    chunk_dtypes: NDArray[np.int64]
    measured: NDArray[np.int64]
    groups: NDArray[np.int64]
    measuring: list[Tasks]

    @classmethod
    def of(cls, memory: Memory, counted: NDArray[np.bool_], group_of: NDArray[np.int64]) -> "Work":
        """Plans the work for gradients of these sizes."""
        chunks, dtypes = cut_into_chunks(memory.counts, memory.dtypes)
        chosen = counted[chunks[:, 0]]
        measured = chunks[chosen]
        measuring = share_out(measured, dtypes[chosen])
        return cls(memory.counts, memory.dtypes, chunks, dtypes, measured, group_of[measured[:, 0]], measuring)

    def fits(self, memory: Memory) -> bool:
        """Returns whether gradients have the sizes that this was planned for."""
        # Bytes compare in a fraction of the time that NumPy takes for a few numbers.
        same_counts = memory.counts.tobytes() == self.counts.tobytes()
        return same_counts and memory.dtypes.tobytes() == self.dtypes.tobytes()


def cut_into_chunks(
    counts: NDArray[np.int64], dtypes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts gradients into chunks.

    Args:
        counts: `(P,)`: how many values each gradient has.
        dtypes: `(P,)`: their positions in `DTYPES`, or -1.

    Returns:
        `(C, 3)`: position of the gradient, first real number, how many; and `(C,)`: the dtype. Dtype by dtype.
    """
    # Where there is no gradient the count is 0.
    reals = counts * PARTS[dtypes]
    numbers = -(-reals // CHUNK)
    positions = np.repeat(np.arange(len(counts)), numbers)
    starts = CHUNK * (np.arange(len(positions)) - np.repeat(np.cumsum(numbers) - numbers, numbers))
    chunks = np.stack([positions, starts, np.minimum(CHUNK, reals[positions] - starts)], 1)
    order = np.argsort(dtypes[positions], kind="stable")
    return np.ascontiguousarray(chunks[order]), dtypes[positions][order]


def share_out(chunks: NDArray[np.int64], dtypes: NDArray[np.int64]) -> list[Tasks]:
    """Makes tasks of about the same number of bytes, dtype by dtype, since every dtype has loops of its own.

    Args:
        chunks: `(C, 3)`, as `cut_into_chunks` gives them, or some of them.
        dtypes: `(C,)`: their dtypes.

    Returns:
        The tasks of each dtype.
    """
    tasks = []
    edges = [0, *(np.flatnonzero(np.diff(dtypes)) + 1).tolist(), len(chunks)]
    for first, last in itertools.pairwise(edges):
        if first < last:
            format_ = FORMATS[DTYPES[dtypes[first]]]
            ends = np.cumsum(chunks[first:last, 2]) * format_.like.itemsize
            size = TASK_BYTES if ends[-1] > ALONE_BYTES else ends[-1]
            starts = np.searchsorted(ends, np.arange(0, ends[-1], size), side="right")
            tasks.append((format_, first + np.append(np.unique(starts), last - first)))
    return tasks
