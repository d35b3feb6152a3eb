"""The threads that compiled loops run on: PyTorch's own where it has OpenMP, otherwise ordinary ones of Python.

PyTorch's threads spin for some milliseconds after every operation. Any others would compete with them for the cores
right when a backward pass has ended; lent for a loop, they begin it without having to be woken.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tamegrad.torch.backends.cpu.compiler import Entry

__all__ = ["run"]


def run(entry: Entry, variant: object, bounds: NDArray[np.int64], *args: object, alive: object) -> None:
    """Runs a compiled function on as many threads as PyTorch would use, which share out the tasks.

    Args:
        entry: Gets the address of `GOMP_parallel` or 0, how many threads to use there, and a tuple of the count of
            tasks taken, the bounds and the other arguments; returns when no task is left to take.
        variant: What the types of the arguments depend on.
        bounds: Where each task begins and the last one ends; `(T + 1,)`.
        *args: Other arguments.
        alive: What has to stay allocated until the last thread is done, even if this one is interrupted.
    """
    tasks = len(bounds) - 1
    threads = torch.get_num_threads() if tasks > 1 else 1
    address = _openmp[0] if threads > 1 else 0
    everything = address, threads, (np.zeros(1, np.int64), bounds, *args)
    entry.prepare(variant, *everything)
    if address or threads == 1:
        entry(*everything)
    else:
        _run_on_pool(lambda _=alive: entry(*everything), min(threads, tasks))


def _run_on_pool(work: Callable[[], object], threads: int) -> None:
    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        # One that has not begun yet has nothing left to do.
        if not helper.cancel():
            helper.result()


def _find_openmp() -> int:
    """Returns the address of `GOMP_parallel` where PyTorch runs on OpenMP, or 0.

    LLVM's and Intel's OpenMP have it as well.
    """
    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]  # PyTorch has no type there
        return 0
    folder = Path(torch.__file__).parent / "lib"
    for path in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib"):
        # PyTorch has loaded it long ago: this opens nothing new, and finds the OpenMP that it was linked with.
        if path.exists() and hasattr(library := ctypes.CDLL(str(path)), "GOMP_parallel"):
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


_openmp: list[int] = [_find_openmp()]
_pools: list[ThreadPoolExecutor] = []


def _pool() -> ThreadPoolExecutor:
    """Returns the threads of this process, which are started when they are first needed and sleep between steps."""
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="tamegrad"))
    return _pools[0]


def _forget() -> None:
    """A process that forks keeps the pool but none of its threads, and OpenMP waits forever for those it had."""
    _pools.clear()
    _openmp[0] = 0


os.register_at_fork(after_in_child=_forget)
