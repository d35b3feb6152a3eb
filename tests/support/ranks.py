"""Runs a test on several processes connected over gloo, like the ranks of a cluster."""

import functools
import inspect
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

# The timeouts of a collective and of all processes of a test, in seconds.
COLLECTIVE_TIMEOUT, TIMEOUT = 40, 100

# Processes are forked from one that has imported everything slow, and has no threads.
_context = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """Starts the fork server, which finds modules only through its environment."""
    _context.set_forkserver_preload(["support.warm"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Runs a function on every rank at once.

    Args:
        function: The function that each rank runs, at the top level of a module; the process group already exists.
        ranks: The number of processes.
        *args: Its arguments.

    Returns:
        Its result on each rank.

    Raises:
        AssertionError: If it raised on a rank, with the traceback, or took too long. No process is left running.
    """
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(ranks):
            here, there = _context.Pipe(duplex=False)
            where = f"file://{folder}/store", rank, ranks
            # By file and name: pytest's modules cannot be imported by module name.
            work = inspect.getfile(function), function.__name__, args
            process = _context.Process(target=_run, args=(work, where, there), daemon=True)
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        return _collected(ends, processes)


def _collected(ends: list[Connection], processes: Sequence[BaseProcess]) -> list[Any]:
    deadline = time.monotonic() + TIMEOUT
    results, problems = [], []
    try:
        for rank, end in enumerate(ends):
            if not end.poll(max(0.0, deadline - time.monotonic())):
                problems.append(f"rank {rank} took more than {TIMEOUT} s")
                continue
            try:
                result, problem = pickle.loads(end.recv_bytes())  # noqa: S301  from our own process
            except EOFError:
                problem = "it died without an error"
            if problem is None:
                results.append(result)
            else:
                problems.append(f"rank {rank}: {problem}")
    finally:
        for process in processes:
            process.join(0 if problems else max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
    assert not problems, "\n".join(problems)
    return results


def _run(work: tuple[str, str, Any], where: tuple[str, int, int], end: Connection) -> None:
    try:
        warnings.simplefilter("error")
        torch.set_num_threads(1)
        (file, name, args), (store, rank, ranks) = work, where
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timeout)
        result = runpy.run_path(file)[name](*args)
        # No rank leaves while others may still communicate with it.
        dist.barrier()
        dist.destroy_process_group()
        problem = None
    except BaseException:  # noqa: BLE001  every error must reach the test
        result, problem = None, traceback.format_exc()
    # Plain pickle: multiprocessing's own would share the memory of tensors, which is gone with the process.
    end.send_bytes(pickle.dumps((result, problem)))
