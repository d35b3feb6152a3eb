"""The backend for CPUs: loops compiled by Numba, over all gradients of all groups at once, on several threads.

The work is cut into chunks whose bounds depend on the gradients alone, and what they give is added up in their order:
the same gradients give the same bits on any number of threads.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.groups import Plan
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.decide import COLUMNS, Decision, Thresholds, decide
from tamegrad.torch.kernels import Gather, eager, objects, threads
from tamegrad.torch.kernels.cpu_decide import decide_compiled, factors_of
from tamegrad.torch.kernels.cpu_loops import add_up, change_chunks, has_sizes, measure_chunks
from tamegrad.torch.kernels.cpu_overlap import gather_and_measure
from tamegrad.torch.kernels.jit import CONVERTS_FLOAT16
from tamegrad.torch.kernels.memory import DTYPES, Located, Memory, locate
from tamegrad.torch.kernels.threads import Team

__all__ = ["Kernels"]

# The real numbers in a chunk: even, so that no complex number is cut in two.
CHUNK = 65_536
# The bytes in a task: few, so that a thread that is held up leaves its share to others, but enough to be worth it.
TASK_BYTES = 2**18
# As many bytes one thread reads in the time that it takes to begin on several, or in far less where cores are busy.
ALONE_BYTES = 2**21


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the loops see a dtype: an empty array of what they read, and whether values are pairs of them."""

    like: NDArray[Any]
    pairs: bool = False


_KINDS = {
    torch.float16: _Kind(np.empty(0, np.int16)),
    torch.bfloat16: _Kind(np.empty(0, np.uint16)),
    torch.float32: _Kind(np.empty(0, np.float32)),
    torch.float64: _Kind(np.empty(0, np.float64)),
    torch.complex64: _Kind(np.empty(0, np.float32), pairs=True),
    torch.complex128: _Kind(np.empty(0, np.float64), pairs=True),
}

# A kind, and between which of the chunks each of its tasks begins and ends.
_Tasks: TypeAlias = tuple[_Kind, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class _Work:
    """What there is to do for gradients of certain sizes.

    Args:
        sizes: `(P, 2)`: how many values each gradient has, and its dtype.
        chunks: `(C, 3)`, dtype by dtype: position of the gradient, first real number, how many.
        kinds: `(C,)`: the dtype of each chunk.
        tasks: All chunks, shared out.
        measured: `(M, 3)`: those of the chunks that are measured.
        measuring: They, shared out.
        sums: `(M,)`, for the sum of squares of each; -1 where there is more to say.
        rows: `(M, COLUMNS)`, for all that is to be said there.
        can_overlap: Whether measuring can begin while gradients are collected: there are several tasks, of one dtype.
    """

    sizes: NDArray[np.int64]
    chunks: NDArray[np.int64]
    kinds: NDArray[np.int64]
    tasks: list[_Tasks]
    measured: NDArray[np.int64]
    measuring: list[_Tasks]
    sums: NDArray[np.float64]
    rows: NDArray[np.float64]
    can_overlap: bool


class Kernels:
    """Measures and changes the gradients of one plan.

    If a gradient is not on the CPU, or is float16 on a CPU that has no instruction to convert it, all go through the
    eager backend.

    Args:
        plan: The plan.
        counted: For each parameter whether it is measured; all are changed.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        self._eager = eager.Kernels(plan, counted)
        self._counted = np.array(counted, dtype=np.bool_)
        self._group_of = np.array(plan.group_of, dtype=np.int64)
        self._groups = len(plan.groups)
        self._work = _plan_work(np.zeros((0, 2), dtype=np.int64), self._counted)
        self._thresholds: Thresholds | None = None
        # The table of the gradients that were measured while they were collected, until that is used.
        self._measured: NDArray[np.int64] | None = None

    def gather_for(self, thresholds: Thresholds) -> Gather | None:
        """Returns what to walk over the gradients with that are measured next, or None if it would gain nothing.

        Args:
            thresholds: Of the step.

        Returns:
            What does what `objects.gather` does, and measures meanwhile.
        """
        work, team = self._work, threads.team()
        if team is None or not work.can_overlap:
            return None
        return partial(self._gather, work=work, limits=self._limits_of(thresholds), team=team)

    def _gather(
        self,
        parameters: NDArray[np.int64],
        values: list[Any],
        table: NDArray[np.int64],
        *,
        work: _Work,
        limits: NDArray[np.float64],
        team: Team,
    ) -> tuple[bool, bool]:
        [(kind, bounds)] = work.measuring
        measuring = bounds, work.measured, limits, kind.pairs, kind.like, work.sums, work.rows
        plain, may_be_lazy, measured = gather_and_measure(
            parameters, values, table, sizes=work.sizes, measuring=measuring, variant=kind.like.dtype, team=team
        )
        self._measured = table if measured else None
        return plain, may_be_lazy

    def measure(self, gradients: Sequence[Tensor | None], thresholds: Thresholds) -> Tensor:
        """Measures all groups.

        Args:
            gradients: One a parameter of the plan, of any shape; None where there is none.
            thresholds: Of the step.

        Returns:
            `(G, COLUMNS)` float64 on the CPU.
        """
        memory = _located(gradients)
        if memory is None:
            return self._eager.measure(gradients, thresholds)
        if memory.table is self._measured:
            work, self._measured = self._work, None
        else:
            work = self._work_for(memory)
            self._measure(work, memory, self._limits_of(thresholds))
        table = np.zeros((self._groups, COLUMNS))
        add_up(work.measured, work.sums, work.rows, self._group_of, table)
        return torch.from_numpy(table)

    def _measure(self, work: _Work, memory: Memory, limits: NDArray[np.float64]) -> None:
        addresses = memory.table[:, 0].copy()
        for kind, bounds in work.measuring:
            args = work.measured, addresses, limits, kind.pairs, kind.like, work.sums, work.rows
            threads.run(measure_chunks, kind.like.dtype, bounds, *args)

    def decide(self, table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, steps: Tensor) -> Decision:
        """Decides on every group, as `Backend` says."""
        on_host = table.device.type == "cpu"
        return (decide_compiled if on_host else decide)(table, thresholds, on_nonfinite, steps)

    def apply_(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Applies a decision in place; a group that keeps its values is not touched.

        Args:
            gradients: As they were measured.
            decision: What to do with each group.
        """
        if not decision.may_change:
            return
        memory = _located(gradients)
        if memory is None:
            self._eager.apply_(gradients, decision)
            return
        factors, changes, all_change = factors_of(decision, self._group_of)
        work, addresses = self._work_for(memory), memory.table[:, 0].copy()
        chunks, tasks = work.chunks, work.tasks
        if not all_change:
            chosen = changes[chunks[:, 0]]
            chunks = chunks[chosen]
            tasks = _share_out(chunks, work.kinds[chosen])
        for kind, bounds in tasks:
            args = chunks, addresses, self._group_of, factors, kind.pairs, kind.like
            threads.run(change_chunks, kind.like.dtype, bounds, *args)
        for position, values in memory.stand_ins.items():
            gradient = gradients[position]
            if changes[position] and gradient is not None:
                gradient.copy_(values)

    def _limits_of(self, thresholds: Thresholds) -> NDArray[np.float64]:
        """Returns how large the values of each parameter may be, by thresholds that mostly are the last step's."""
        if thresholds is not self._thresholds:
            limits: NDArray[np.float64] = thresholds.values.cpu().numpy()
            self._thresholds, self._limits = thresholds, limits[self._group_of]
        return self._limits

    def _work_for(self, memory: Memory) -> _Work:
        """Returns the work for these sizes, which mostly are those of the last step."""
        if not has_sizes(memory.table, self._work.sizes):
            self._work = _plan_work(memory.table[:, 1:].copy(), self._counted)
        return self._work


def _located(gradients: Sequence[Tensor | None]) -> Memory | None:
    memory = gradients.memory if isinstance(gradients, Located) else locate(gradients)
    if memory is None or CONVERTS_FLOAT16:
        return memory
    return None if (memory.table[:, 2] == DTYPES.index(torch.float16)).any() else memory


def _plan_work(sizes: NDArray[np.int64], counted: NDArray[np.bool_]) -> _Work:
    """Cuts gradients of certain sizes into chunks, and shares out all of them and those that are measured."""
    chunks, kinds = cut_into_chunks(sizes)
    chosen = counted[chunks[:, 0]]
    measured = chunks[chosen]
    sums, rows = np.empty(len(measured)), np.empty((len(measured), COLUMNS))
    tasks, measuring = _share_out(chunks, kinds), _share_out(measured, kinds[chosen])
    # A task fewer than bounds.
    can_overlap = objects.AVAILABLE and len(measuring) == 1 and len(measuring[0][1]) - 1 > 1
    return _Work(sizes, chunks, kinds, tasks, measured, measuring, sums, rows, can_overlap)


def cut_into_chunks(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cuts gradients into chunks.

    Args:
        sizes: `(P, 2)`: how many values each gradient has, and its dtype's position in `DTYPES`, or -1.

    Returns:
        `(C, 3)`: position of the gradient, first real number, how many; and `(C,)`: the dtype. Dtype by dtype.
    """
    reals = sizes[:, 0] * np.where([kind >= 0 and DTYPES[kind].is_complex for kind in sizes[:, 1]], 2, 1)
    counts = -(-reals // CHUNK)
    positions = np.repeat(np.arange(len(sizes)), counts)
    starts = CHUNK * (np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts))
    chunks = np.stack([positions, starts, np.minimum(CHUNK, reals[positions] - starts)], 1)
    order = np.argsort(sizes[positions, 1], kind="stable")
    return np.ascontiguousarray(chunks[order]), sizes[positions, 1][order]


def _share_out(chunks: NDArray[np.int64], kinds: NDArray[np.int64]) -> list[_Tasks]:
    """Makes tasks of about the same number of bytes, dtype by dtype, since every dtype has loops of its own."""
    tasks = []
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(chunks)]
    for first, last in itertools.pairwise(edges):
        if first < last:
            kind = _KINDS[DTYPES[kinds[first]]]
            ends = np.cumsum(chunks[first:last, 2]) * kind.like.itemsize
            size = TASK_BYTES if ends[-1] > ALONE_BYTES else ends[-1]
            starts = np.searchsorted(ends, np.arange(0, ends[-1], size), side="right")
            tasks.append((kind, first + np.append(np.unique(starts), last - first)))
    return tasks
