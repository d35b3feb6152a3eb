"""The backend for CPUs: loops compiled by Numba, over all gradients of all groups at once, on several threads.

The work is cut into chunks whose bounds depend on the gradients alone, and what they give is added up in their order:
the same gradients give the same bits on any number of threads. The threads are ordinary ones of Python that sleep
between steps, because Numba's own either refuse to be called by two threads at once or, as OpenMP's, spin and do not
survive a fork.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from tamegrad.torch.kernels import eager
from tamegrad.torch.kernels.cpu_decide import decide_compiled
from tamegrad.torch.kernels.cpu_loops import add_up, change_chunks, has_sizes, measure_chunks
from tamegrad.torch.kernels.jit import CONVERTS_FLOAT16
from tamegrad.torch.kernels.memory import DTYPES, Located, Memory, locate

__all__ = ["Kernels"]

# The real numbers in a chunk: even, so that no complex number is cut in two.
CHUNK = 65_536
# More tasks than threads, so that a thread that is held up leaves its share to others; none too small to be worth it.
TASKS_A_THREAD, TASK_BYTES = 4, 2**18


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

# A kind, and the first and last of its chunks that the task takes.
_Task: TypeAlias = tuple[_Kind, int, int]


@dataclass(frozen=True, slots=True)
class _Work:
    """What there is to do for gradients of certain sizes.

    Args:
        sizes: `(P, 2)`: how many values each gradient has, and its dtype.
        chunks: `(C, 3)`, dtype by dtype: position of the gradient, first real number, how many.
        kinds: `(C,)`: the dtype of each chunk.
        tasks: All chunks, shared out for a number of threads.
        threads: That number.
        rows: `(C, COLUMNS)`, for what the chunks give.
    """

    sizes: NDArray[np.int64]
    chunks: NDArray[np.int64]
    kinds: NDArray[np.int64]
    tasks: list[_Task]
    threads: int
    rows: NDArray[np.float64]


class Kernels:
    """Measures and changes the gradients of one plan.

    If a gradient is not on the CPU, or is float16 on a CPU that has no instruction to convert it, all go through the
    eager backend.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._eager = eager.Kernels(plan)
        self._group_of = np.array(plan.group_of, dtype=np.int64)
        self._groups = len(plan.groups)
        self._work = _plan_work(np.zeros((0, 2), dtype=np.int64), 1)
        self._thresholds: Thresholds | None = None

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
        work = self._work_for(memory)
        addresses, limits = memory.table[:, 0].copy(), self._limits_of(thresholds)

        def run(function: Callable[..., Any], task: _Task) -> None:
            kind, first, last = task
            function(work.chunks, addresses, limits, kind.pairs, first, last, kind.like, work.rows)

        for kind in _kinds_of(work.tasks):
            run(partial(measure_chunks.prepare, kind.like.dtype), (kind, 0, 0))
        _run_all(work.tasks, partial(run, measure_chunks))
        table = np.zeros((self._groups, COLUMNS))
        add_up(work.chunks, work.rows, self._group_of, table)
        return torch.from_numpy(table)

    def decide(self, table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite) -> Decision:
        """Decides on every group.

        Args:
            table: As `measure` gave it, or a sum of such.
            thresholds: Of the step, on the table's device.
            on_nonfinite: What happens to a group with NaN or infinity.

        Returns:
            The decision.
        """
        on_host = table.device.type == "cpu"
        return (decide_compiled if on_host else decide)(table, thresholds, on_nonfinite)

    def apply_(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Applies a decision in place; a group that keeps its values is not touched.

        Args:
            gradients: As they were measured.
            decision: What to do with each group.
        """
        if not decision.may_change:
            return
        changed = decision.changed
        memory = _located(gradients)
        if memory is None:
            self._eager.apply_(gradients, decision)
            return
        work, changes = self._work_for(memory), changed.numpy()[self._group_of]
        chunks, tasks = work.chunks, work.tasks
        if not changes.all():
            chosen = changes[chunks[:, 0]]
            chunks = chunks[chosen]
            tasks = _share_out(chunks, work.kinds[chosen], work.threads)
        columns = decision.first, decision.second, decision.limits, decision.zeroed.to(torch.float64)
        factors, addresses = torch.stack(columns, 1).numpy(), memory.table[:, 0].copy()

        def run(function: Callable[..., Any], task: _Task) -> None:
            kind, first, last = task
            function(chunks, addresses, self._group_of, factors, kind.pairs, first, last, kind.like)

        for kind in _kinds_of(tasks):
            run(partial(change_chunks.prepare, kind.like.dtype), (kind, 0, 0))
        _run_all(tasks, partial(run, change_chunks))
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
        threads = torch.get_num_threads()
        if self._work.threads != threads or not has_sizes(memory.table, self._work.sizes):
            self._work = _plan_work(memory.table[:, 1:].copy(), threads)
        return self._work


def _located(gradients: Sequence[Tensor | None]) -> Memory | None:
    memory = gradients.memory if isinstance(gradients, Located) else locate(gradients)
    if memory is None or CONVERTS_FLOAT16:
        return memory
    return None if (memory.table[:, 2] == DTYPES.index(torch.float16)).any() else memory


def _plan_work(sizes: NDArray[np.int64], threads: int) -> _Work:
    """Cuts gradients of certain sizes into chunks, and shares them out."""
    chunks, kinds = cut_into_chunks(sizes)
    tasks = _share_out(chunks, kinds, threads)
    return _Work(sizes, chunks, kinds, tasks, threads, np.empty((len(chunks), COLUMNS)))


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


def _share_out(chunks: NDArray[np.int64], kinds: NDArray[np.int64], threads: int) -> list[_Task]:
    """Makes tasks of about the same number of bytes."""
    widths = np.array([_KINDS[dtype].like.itemsize for dtype in DTYPES])
    ends = np.cumsum(chunks[:, 2] * widths[kinds])
    total = int(ends[-1]) if len(ends) else 0
    count = 1 if threads == 1 else max(1, min(threads * TASKS_A_THREAD, total // TASK_BYTES))
    # A task ends where its share of the bytes does, and where a dtype ends, since every dtype has loops of its own.
    bounds = {int(bound) for bound in np.searchsorted(ends, np.arange(1, count) * total / count)}
    bounds |= {0, len(chunks), *(int(bound) + 1 for bound in np.flatnonzero(np.diff(kinds)))}
    places = sorted(bounds)
    return [(_KINDS[DTYPES[kinds[first]]], first, last) for first, last in itertools.pairwise(places)]


def _kinds_of(tasks: Sequence[_Task]) -> Iterable[_Kind]:
    return {id(kind): kind for kind, _, _ in tasks}.values()


def _run_all(tasks: Sequence[_Task], run: Callable[[_Task], None]) -> None:
    """Runs tasks, on this thread and as many others as PyTorch would use."""
    left = deque(tasks)

    def work() -> None:
        while left:
            try:
                task = left.popleft()
            except IndexError:  # another thread was faster
                return
            run(task)

    helpers = [_pool().submit(work) for _ in range(min(torch.get_num_threads(), len(tasks)) - 1)]
    work()
    for helper in helpers:
        # One that has not begun yet has nothing left to do.
        if not helper.cancel():
            helper.result()


_pools: list[ThreadPoolExecutor] = []


def _pool() -> ThreadPoolExecutor:
    """Returns the threads of this process, which are started when they are first needed and sleep between steps."""
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tamegrad"))
    return _pools[0]


# A process that forks keeps the pool, but none of its threads.
os.register_at_fork(after_in_child=_pools.clear)
