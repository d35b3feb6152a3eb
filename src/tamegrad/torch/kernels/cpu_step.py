"""A step like the last one, up to where gradients change, in one compiled call.

Most steps are: the same model, with gradients of the same sizes. That is taken for granted and checked on the way. If
it turns out to be wrong, all that was measured is dropped, and nothing was changed.

Only the thread that has the GIL can walk over Python's objects, and it waits for memory far more than it computes.
Meanwhile the other threads measure the gradients that it has found.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tamegrad.torch.kernels.cpu_decide import decide_rows
from tamegrad.torch.kernels.cpu_loops import add_up_rows, measure_between
from tamegrad.torch.kernels.jit import Entry, call, in_parallel, inlined, publish, published, take_one
from tamegrad.torch.kernels.objects import is_unchanged, walk

__all__ = ["take_step"]

# Give the GIL away and take it back.
_GIL = np.array(
    [
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (ctypes.pythonapi.PyEval_SaveThread, ctypes.pythonapi.PyEval_RestoreThread)
    ],
    dtype=np.int64,
)


@inlined
def _find(modules: Any, walking: Any, known: Any, gil: Any, found: Any) -> None:
    """Does what takes the GIL, and gives it away."""
    parameters, values, constants, table, sizes = walking
    plain, found[0], expected = walk(parameters, values, constants, table, sizes, known)
    if not expected:
        publish(known, -1)
    tables, table_sizes, entries = modules
    found[1] = plain and expected and is_unchanged(tables, table_sizes, entries, constants[0])
    found[2] = call(gil[0], ())


@inlined
def _is_known(known: Any, position: Any) -> Any:
    """Waits until a row of the table is written; says False if it never will be."""
    count = published(known)
    while 0 <= count <= position:
        count = published(known)
    return count > position


@inlined
def _measure(table: Any, measuring: Any, taken: Any, known: Any) -> None:
    bounds, chunks, limits, pairs, like, sums, rows = measuring
    addresses = table[:, 0]
    task = take_one(taken)
    while task < bounds.size - 1 and _is_known(known, chunks[bounds[task + 1] - 1, 0]):
        measure_between(bounds[task], bounds[task + 1], chunks, addresses, limits, pairs, like, sums, rows)
        task = take_one(taken)


@inlined
def _on_thread(
    number_of_thread: Any, modules: Any, walking: Any, measuring: Any, taken: Any, known: Any, gil: Any, found: Any
) -> None:
    # The first thread is the one that called, and has the GIL.
    if np.int32(call(number_of_thread, ())) == 0:
        _find(modules, walking, known, gil, found)
    _measure(walking[3], measuring, taken, known)


def _take_step(team: Any, modules: Any, walking: Any, measuring: Any, group_of: Any, deciding: Any, gil: Any) -> Any:
    openmp, number_of_thread, threads = team
    # What one thread writes often and others read has a cache line of its own.
    progress = np.zeros((2, 16), np.int64)
    taken, known = progress[0], progress[1]
    found = np.zeros(3, np.int64)
    if openmp != 0:
        arguments = number_of_thread, modules, walking, measuring, taken, known, gil, found
        in_parallel(openmp, threads, _on_thread, arguments)
    else:
        _find(modules, walking, known, gil, found)
        _measure(walking[3], measuring, taken, known)
    may_change, may_be_nonfinite = False, False
    if found[1] != 0:
        chunks, sums, rows = measuring[1], measuring[5], measuring[6]
        sums_by_group = deciding[0]
        sums_by_group[:] = 0.0
        add_up_rows(chunks, sums, rows, group_of, sums_by_group)
        may_change, may_be_nonfinite = decide_rows(*deciding)
    call(gil[1], (found[2],))
    return found[1] != 0, found[0] != 0, may_change, may_be_nonfinite


_compiled = Entry(_take_step, nogil=False)


def take_step(
    team: tuple[int, int, int],
    modules: tuple[Any, ...],
    walking: tuple[Any, ...],
    measuring: tuple[Any, ...],
    group_of: NDArray[np.int64],
    deciding: tuple[Any, ...],
    *,
    variant: object,
) -> tuple[bool, bool, bool, bool]:
    """Takes a step, up to where gradients change; the GIL is given away as soon as all gradients are found.

    Args:
        team: As `threads.team` gave it; with zeros all is done by the thread that calls.
        modules: What `objects.unchanged` takes.
        walking: What `objects.gather` takes, its values by their `id`, and `CONSTANTS` before the table; then `(P, 2)`,
            how many values each gradient should have, and its dtype.
        measuring: Bounds of the tasks, chunks, limits, whether values are pairs, an array like them, and the sums and
            rows to write.
        group_of: `(P,)`: the group of each parameter.
        deciding: What `decide_rows` takes; the table is written, too.
        variant: What the types of these depend on.

    Returns:
        Whether this is a step like the last: the modules are the same, and all gradients are plain tensors of the sizes
        given; if not, nothing that was written is of any use. Whether some may be lazy, as `objects.gather` says. And
        what `decide_rows` returns.
    """
    everything = team, modules, walking, measuring, group_of, deciding, _GIL
    _compiled.prepare(variant, *everything)
    is_like_last, may_be_lazy, may_change, may_be_nonfinite = _compiled(*everything)
    return is_like_last, may_be_lazy, may_change, may_be_nonfinite
