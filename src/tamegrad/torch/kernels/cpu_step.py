"""A step like the last one, up to where something changes, in one compiled call.

Most steps are: the same model, with gradients of the same sizes. That is taken for granted and checked on the way. If
it turns out to be wrong, all that was measured is dropped, and nothing was changed. In most of them all gradients stay
as they are, too; then the norms are all there is to say.

Only the thread that has the GIL can walk over Python's objects, and it waits for memory far more than it computes.
Meanwhile the other threads measure the gradients that it has found.
"""

from typing import Any

import numpy as np

from tamegrad.torch.kernels.cpu_decide import are_kept
from tamegrad.torch.kernels.cpu_loops import measure_between
from tamegrad.torch.kernels.jit import Entry, call, in_parallel, inlined, publish, published, take_one
from tamegrad.torch.kernels.objects import GIVE_GIL, is_unchanged, walk

__all__ = ["take_step"]


@inlined
def _find(modules: Any, walking: Any, known: Any, found: Any) -> None:
    """Does what takes the GIL, and gives it away."""
    parameters, values, constants, table, sizes = walking
    tables, entries = modules
    plain, found[1], expected = walk(parameters, values, constants, table, sizes, known)
    if not expected:
        publish(known, -1)
    found[0] = plain and expected and is_unchanged(tables, entries, constants)
    found[2] = call(constants[GIVE_GIL], ())


@inlined
def _is_known(known: Any, position: Any) -> Any:
    """Waits until a row of the table is written; says False if it never will be."""
    count = published(known)
    while 0 <= count <= position:
        count = published(known)
    return count > position


@inlined
def _measure(walking: Any, measuring: Any, taken: Any, known: Any) -> None:
    bounds, chunks, limits, pairs, like, sums, rows = measuring
    _, _, _, table, _ = walking
    addresses = table[:, 0]
    task = take_one(taken)
    while task < bounds.size - 1 and _is_known(known, chunks[bounds[task + 1] - 1, 0]):
        measure_between(bounds[task], bounds[task + 1], chunks, addresses, limits, pairs, like, sums, rows)
        task = take_one(taken)


@inlined
def _on_thread(
    number_of_thread: Any, modules: Any, walking: Any, measuring: Any, taken: Any, known: Any, found: Any
) -> None:
    # The first thread is the one that called, and has the GIL.
    if np.int32(call(number_of_thread, ())) == 0:
        _find(modules, walking, known, found)
    _measure(walking, measuring, taken, known)


def _take_step(team: Any, modules: Any, walking: Any, measuring: Any, deciding: Any) -> Any:
    openmp, number_of_thread, threads = team
    # What one thread writes often and others read has a cache line of its own.
    progress = np.zeros((2, 16), np.int64)
    taken, known = progress[0], progress[1]
    found = np.zeros(3, np.int64)
    if openmp != 0:
        in_parallel(openmp, threads, _on_thread, (number_of_thread, modules, walking, measuring, taken, known, found))
    else:
        _find(modules, walking, known, found)
        _measure(walking, measuring, taken, known)
    is_like_last = found[0] != 0
    _, _, _, _, _, sums, _ = measuring
    kept = is_like_last and are_kept(sums, *deciding)
    _, _, constants, _, _ = walking
    call(constants[GIVE_GIL + 1], (found[2],))
    return is_like_last, found[1] != 0, kept


_compiled = Entry(_take_step, nogil=False)


def take_step(
    team: tuple[int, int, int],
    modules: tuple[Any, ...],
    walking: tuple[Any, ...],
    measuring: tuple[Any, ...],
    deciding: tuple[Any, ...],
    *,
    variant: object,
) -> tuple[bool, bool, bool]:
    """Takes a step, up to where something may change; the GIL is given away as soon as all gradients are found.

    Args:
        team: As `threads.team` gave it; with zeros all is done by the thread that calls.
        modules: A `ModuleTables`, as a tuple.
        walking: What `objects.gather` takes, its values by their `id`, and `CONSTANTS` before the table; then `(P, 2)`,
            how many values each gradient should have, and its dtype.
        measuring: Bounds of the tasks, chunks, limits, whether values are pairs, an array like them, and the sums and
            rows to write.
        deciding: What `are_kept` takes after the sums.
        variant: What the types of these depend on.

    Returns:
        Whether this is a step like the last: the modules are the same, and all gradients are plain tensors of the sizes
        given; if not, nothing that was written is of any use. Whether some may be lazy, as `objects.gather` says. And
        what `are_kept` returns.
    """
    everything = team, modules, walking, measuring, deciding
    _compiled.prepare(variant, *everything)
    is_like_last, may_be_lazy, kept = _compiled(*everything)
    return is_like_last, may_be_lazy, kept
