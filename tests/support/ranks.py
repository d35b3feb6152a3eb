"""Runs a test on several processes that talk to each other over gloo, as the ranks of a cluster do."""

import inspect
import multiprocessing
import pickle
import runpy
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import distributed as dist

# What a collective waits for the others, and what a test waits for its processes, in seconds.
COLLECTIVE_TIMEOUT, TIMEOUT = 40, 100

# Processes are forked from one that has imported what takes long, and has no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["pytest", "tamegrad.torch.kernels.cpu", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
)


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Runs a function on every rank at once.

    Args:
        function: What each rank runs, at the top of a module; the process group is there already.
        ranks: How many processes.
        *args: What it is called with.

    Returns:
        What it returned on each rank.

    Raises:
        AssertionError: If it raised on some rank, with what it raised, or took too long. No process is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(ranks):
            here, there = _context.Pipe(duplex=False)
            where = f"file://{folder}/store", rank, ranks
            # By file and name: pytest's modules cannot be imported by theirs.
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
                problem = "it died without a word"
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
        # Nobody leaves while others may still be talking to it.
        dist.barrier()
        dist.destroy_process_group()
        problem = None
    except BaseException:  # noqa: BLE001  whatever it was, the test has to hear of it
        result, problem = None, traceback.format_exc()
    # Plainly pickled: as multiprocessing does it, tensors would be gone with the process.
    end.send_bytes(pickle.dumps((result, problem)))
