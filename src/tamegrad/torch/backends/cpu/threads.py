"""The threads that compiled loops run on: PyTorch's own if it uses OpenMP, otherwise a pool of Python threads.

PyTorch's threads spin for some milliseconds after every operation. Any others would compete with them for the cores
right after the backward pass, while PyTorch's own are awake and start a loop at once.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tamegrad.torch.backends.cpu.compiler import Entry

__all__ = ["run"]


def run(entry: Entry, variant: object, bounds: NDArray[np.int64], *args: object, alive: object) -> None:
    """Runs a compiled function on as many threads as PyTorch would use; they share the tasks.

    Args:
        entry: Takes the address of `GOMP_parallel` or 0, the number of threads to use there, and a tuple of the count
            of tasks taken, the bounds and the other arguments; returns when no task is left.
        variant: A key for the types of the arguments, as in `Entry.prepare`.
        bounds: `(T + 1,)`: where each task starts, and where the last one ends.
        *args: Other arguments.
        alive: An object to keep alive until the last thread is done, even if this one is interrupted.
    """
    tasks = len(bounds) - 1
    threads = torch.get_num_threads() if tasks > 1 else 1
    address = _openmp[0] if threads > 1 else 0
    everything = address, threads, (np.zeros(1, np.int64), bounds, *args)
    entry.prepare(variant, *everything)
    if address or threads == 1:
        entry(*everything)
    else:
        _run_on_pool(partial(_call, entry, everything, alive), min(threads, tasks))


def _call(entry: Entry, arguments: tuple[object, ...], alive: object) -> None:
    del alive  # the caller of this holds it
    entry(*arguments)


def _run_on_pool(work: Callable[[], object], threads: int) -> None:
    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        # One that has not started yet has no task left.
        if not helper.cancel():
            helper.result()


def _find_openmp() -> int:
    """Returns the address of `GOMP_parallel` if PyTorch uses OpenMP, else 0.

    LLVM's and Intel's OpenMP have it too.
    """
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]  # untyped in PyTorch
        return 0
    folder = Path(torch.__file__).parent / "lib"
    for path in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib"):
        # PyTorch has already loaded it: this loads nothing new, and finds the OpenMP that PyTorch is linked with.
        if path.exists() and hasattr(library := ctypes.CDLL(str(path)), "GOMP_parallel"):
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


_openmp: list[int] = [_find_openmp()]
_pools: list[ThreadPoolExecutor] = []


def _pool() -> ThreadPoolExecutor:
    """Returns the thread pool of this process; its threads start on first use and sleep between steps."""
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tamegrad"))
    return _pools[0]


def _forget() -> None:
    """Forgets the threads in a forked process, which has none of them; OpenMP would wait for them forever."""
    _pools.clear()
    _openmp[0] = 0


os.register_at_fork(after_in_child=_forget)
