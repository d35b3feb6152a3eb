"""Measures gradients while Python's objects are still being walked over to find them.

The walk waits for memory far more than it computes, and only the thread that has the GIL can do it. Meanwhile the other
threads measure what it has found, on the assumption that the sizes are those of the last step. The walk checks each
before it lets anyone read; if one differs, all that was measured is dropped.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tamegrad.torch.kernels.cpu_loops import measure_between
from tamegrad.torch.kernels.jit import Entry, call, in_parallel, inlined, publish, published, take_one
from tamegrad.torch.kernels.objects import CONSTANTS, walk
from tamegrad.torch.kernels.threads import Team

__all__ = ["gather_and_measure"]

# Give the GIL away and take it back.
_GIL = np.array(
    [
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (ctypes.pythonapi.PyEval_SaveThread, ctypes.pythonapi.PyEval_RestoreThread)
    ],
    dtype=np.int64,
)


@inlined
def _is_known(known: Any, position: Any) -> Any:
    """Waits until a row of the table is written; says False if it never will be."""
    count = published(known)
    while 0 <= count <= position:
        count = published(known)
    return count > position


@inlined
def _on_thread(walking: Any, measuring: Any, taken: Any, known: Any, gil: Any, outcome: Any) -> None:
    parameters, values, constants, table, sizes, number_of_thread = walking
    bounds, chunks, limits, pairs, like, sums, rows = measuring
    # The first thread is the one that called, and has the GIL.
    if np.int32(call(number_of_thread, ())) == 0:
        outcome[0], outcome[1], outcome[2] = walk(parameters, values, constants, table, sizes, known)
        if not outcome[2]:
            publish(known, -1)
        outcome[3] = call(gil[0], ())
    addresses = table[:, 0]
    task = take_one(taken)
    while task < bounds.size - 1 and _is_known(known, chunks[bounds[task + 1] - 1, 0]):
        measure_between(bounds[task], bounds[task + 1], chunks, addresses, limits, pairs, like, sums, rows)
        task = take_one(taken)


def _gather_and_measure(openmp: Any, threads: Any, walking: Any, measuring: Any, progress: Any, gil: Any) -> Any:
    # What one thread writes often and others read has a cache line of its own.
    taken, known = progress[0], progress[1]
    outcome = np.zeros(4, np.int64)
    in_parallel(openmp, threads, _on_thread, (walking, measuring, taken, known, gil, outcome))
    call(gil[1], (outcome[3],))
    return outcome[0] != 0, outcome[1] != 0, outcome[2] != 0


_compiled = Entry(_gather_and_measure, nogil=False)


def gather_and_measure(
    parameters: NDArray[np.int64],
    values: list[Any],
    table: NDArray[np.int64],
    *,
    sizes: NDArray[np.int64],
    measuring: tuple[Any, ...],
    variant: object,
    team: Team,
) -> tuple[bool, bool, bool]:
    """Does what `objects.gather` does, and measures at once; the GIL is given away when the walk is done.

    Args:
        parameters: As in `objects.gather`.
        values: As in `objects.gather`.
        table: As in `objects.gather`.
        sizes: `(P, 2)`, contiguous: how many values each gradient should have, and its dtype.
        measuring: Bounds of the tasks, chunks, limits, whether values are pairs, an array like them, and the sums and
            rows to write.
        variant: What the types of these depend on.
        team: As `threads.team` gave it.

    Returns:
        What `objects.gather` returns, and whether all was measured: all gradients had these sizes.
    """
    openmp, number_of_thread, threads = team
    walking = parameters, id(values), CONSTANTS, table, sizes, number_of_thread
    everything = openmp, threads, walking, measuring, np.zeros((2, 16), np.int64), _GIL
    _compiled.prepare(variant, *everything)
    plain, may_be_lazy, measured = _compiled(*everything)
    return plain, may_be_lazy, measured
