"""The backend for CPUs: loops compiled by Numba, over all gradients of all groups at once, on several threads.

The work is cut into chunks whose bounds depend on the gradients alone, and what they give is added up in their order:
the same gradients give the same bits on any number of threads.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.groups import Plan
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.decide import COLUMNS, Decision, Thresholds, decide
from tamegrad.torch.kernels import eager, objects, threads
from tamegrad.torch.kernels.cpu_decide import HostDecision, Kept, changes_of, decide_compiled
from tamegrad.torch.kernels.cpu_loops import add_up, change_chunks, has_sizes, measure_chunks
from tamegrad.torch.kernels.cpu_step import take_step
from tamegrad.torch.kernels.jit import CONVERTS_FLOAT16
from tamegrad.torch.kernels.memory import DTYPES, Located, Memory, ModuleTables, holds_lazy, locate

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
        groups: `(M,)`: the group of each of those.
        measuring: They, shared out.
        sums: `(M,)`, for the sum of squares of each; -1 where there is more to say.
        rows: `(M, COLUMNS)`, for all that is to be said there.
        table: `(P, 3)`, for the `Memory` of a step with gradients of these sizes.
    """

    sizes: NDArray[np.int64]
    chunks: NDArray[np.int64]
    kinds: NDArray[np.int64]
    tasks: list[_Tasks]
    measured: NDArray[np.int64]
    groups: NDArray[np.int64]
    measuring: list[_Tasks]
    sums: NDArray[np.float64]
    rows: NDArray[np.float64]
    table: NDArray[np.int64]


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
        self._work = _plan_work(np.zeros((0, 2), dtype=np.int64), self._counted, self._group_of)
        self._thresholds: Thresholds | None = None

    def take_step(
        self,
        parameters: NDArray[np.int64],
        modules: ModuleTables,
        thresholds: Thresholds,
        on_nonfinite: OnNonfinite,
        steps: Tensor,
    ) -> tuple[Located, Decision] | None:
        """Takes a step like the last one, as `StepTaker` says; gradients of several dtypes make none."""
        work = self._work
        if not objects.AVAILABLE or len(work.measuring) != 1 or not thresholds.on_host:
            return None
        [(kind, bounds)] = work.measuring
        # A task fewer than bounds.
        team = threads.team(len(bounds) - 1)
        if team is None:
            return None
        values, norms = Located([None] * len(parameters)), np.empty(self._groups + 1)
        largest, _, renormalizes = thresholds.arrays
        is_like_last, may_be_lazy, kept = take_step(
            team,
            tuple(modules),
            (parameters, id(values), objects.CONSTANTS, work.table, work.sizes),
            (bounds, work.measured, self._limits_of(thresholds), kind.pairs, kind.like, work.sums, work.rows),
            (work.groups, largest, renormalizes, norms),
            variant=kind.like.dtype,
        )
        if not is_like_last or (may_be_lazy and holds_lazy(values, work.table)):
            return None
        if kept:
            return values, Kept(norms)
        values.memory = Memory(work.table)
        return values, decide_compiled(self._add_up(), thresholds, on_nonfinite, steps)

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
        work, limits = self._work_for(memory), self._limits_of(thresholds)
        addresses = memory.table[:, 0].copy()
        for kind, bounds in work.measuring:
            args = work.measured, addresses, limits, kind.pairs, kind.like, work.sums, work.rows
            threads.run(measure_chunks, kind.like.dtype, bounds, *args)
        return self._add_up()

    def _add_up(self) -> Tensor:
        """Adds up what was measured last, by group."""
        work, table = self._work, np.zeros((self._groups, COLUMNS))
        add_up(work.groups, work.sums, work.rows, table)
        return torch.from_numpy(table)

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
        memory = _located(gradients)
        if memory is None:
            self._eager.apply_(gradients, decision)
            return
        # Whatever was measured on the CPU was decided there.
        assert isinstance(decision, HostDecision)
        changes, all_change = changes_of(decision.decided, self._group_of)
        work, addresses = self._work_for(memory), memory.table[:, 0].copy()
        chunks, tasks = work.chunks, work.tasks
        if not all_change:
            chosen = changes[chunks[:, 0]]
            chunks = chunks[chosen]
            tasks = _share_out(chunks, work.kinds[chosen])
        for kind, bounds in tasks:
            args = chunks, addresses, self._group_of, decision.decided, kind.pairs, kind.like
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
            self._work = _plan_work(memory.table[:, 1:].copy(), self._counted, self._group_of)
        return self._work


def _located(gradients: Sequence[Tensor | None]) -> Memory | None:
    memory = gradients.memory if isinstance(gradients, Located) else locate(gradients)
    if memory is None or CONVERTS_FLOAT16:
        return memory
    return None if (memory.table[:, 2] == DTYPES.index(torch.float16)).any() else memory


def _plan_work(sizes: NDArray[np.int64], counted: NDArray[np.bool_], group_of: NDArray[np.int64]) -> _Work:
    """Cuts gradients of certain sizes into chunks, and shares out all of them and those that are measured."""
    chunks, kinds = cut_into_chunks(sizes)
    chosen = counted[chunks[:, 0]]
    measured = chunks[chosen]
    sums, rows = np.empty(len(measured)), np.empty((len(measured), COLUMNS))
    tasks, measuring = _share_out(chunks, kinds), _share_out(measured, kinds[chosen])
    return _Work(
        sizes,
        chunks,
        kinds,
        tasks,
        measured,
        group_of[measured[:, 0]],
        measuring,
        sums,
        rows,
        np.empty((len(sizes), 3), np.int64),
    )


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
