"""Times clipping and counts its collectives on models sharded over processes, over gloo on one machine."""

import json
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_tools import HUGE, LOOP, PER_LAYER, WHOLE
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from tamegrad import Clip
from tamegrad.torch import GradientNormalizer

__all__ = ["LOADED", "MESHES", "FirstCall", "Sharded", "measure_first_calls", "measure_sharded"]

WIDTH = 64
# Rounds for the fewest layers; with more layers there are fewer, but at least three.
ROUNDS = 20
# The first call keeps a core busy, so there is one process per core of a small machine.
PROCESSES, FIRST_PROCESSES = 4, 2
# The time limit for all processes of one measurement.
TIMEOUT_SECONDS = 600
# The mesh dimensions that weights and biases are sharded over; LayerNorms add two plain parameters a layer.
MESHES = {"1-D mesh": 1, "2-D mesh": 2, "2-D mesh, plain LayerNorms": 2}


@dataclass(frozen=True)
class Sharded:
    """The results of one tool on one model.

    Args:
        mesh: The mesh that the model is sharded over, one of `MESHES`.
        layers: The number of linear layers.
        tool: The tool.
        collectives: The number of collectives in a step.
        seconds: The median time on the first process; NaN if the tool does not work there.
        ratio: The median of its time divided by tamegrad's in the same round.
        fastest: The same ratio between the fastest round of each.
        problem: The error that the tool raises, if it does not work there.
    """

    mesh: str
    layers: int
    tool: str
    collectives: int
    seconds: float
    ratio: float
    fastest: float
    problem: str = ""


@dataclass(frozen=True)
class FirstCall:
    """The time of a tool's first call in a process, on the first process.

    Args:
        tensors: The number of sharded tensors.
        tool: The tool; for tamegrad, the time includes making the normalizer.
        seconds: The time.
    """

    tensors: int
    tool: str
    seconds: float


# The first call, after Numba and the compiled loops were loaded for another model.
LOADED = f"{PER_LAYER}, Numba loaded before"
# Operations that are no collectives: PyTorch waits for a functional collective, and wraps its result.
_NO_COLLECTIVES = {"wait_tensor", "_wrap_tensor_autograd"}


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in PyTorch
    """Counts the collectives that start."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        # DTensor dispatches first; the collectives inside its operation then come through here.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in {"c10d", "_c10d_functional"} and func._opname not in _NO_COLLECTIVES:  # noqa: SLF001
            self.count += 1
        return func(*args, **(kwargs or {}))


def measure_sharded(*, quick: bool) -> list[Sharded]:
    """Times the tools and counts their collectives on every mesh and growing numbers of layers, with nothing clipped.

    Args:
        quick: Whether to use tiny models and one round.

    Returns:
        The results.
    """
    counts, rounds = ((1, 2), 1) if quick else ((24, 100, 400), ROUNDS)
    return [Sharded(**row) for row in _run_on_processes(PROCESSES, _time_everything, counts, rounds)]


def measure_first_calls(*, quick: bool) -> list[FirstCall]:
    """Times the first call on many sharded tensors, in new processes for each tool.

    Args:
        quick: Whether to use only a few tensors.

    Returns:
        The times.
    """
    layers = 2 if quick else 1000
    return [
        FirstCall(2 * layers, tool, _run_on_processes(FIRST_PROCESSES, _time_first_call, layers, tool))
        for tool in (PER_LAYER, LOADED, WHOLE)
    ]


def _run_on_processes(count: int, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401  any JSON value
    """Runs a function in several processes at once, and returns the result of the first."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(function, args, Path(folder), rank, count), daemon=True)
            for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            deadline = time.monotonic() + TIMEOUT_SECONDS
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
                if process.exitcode != 0:
                    sys.exit(f"a process that timed {args} exited with code {process.exitcode}")
            return json.loads((Path(folder) / "result").read_text(encoding="utf-8"))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run(function: Callable[..., Any], args: tuple[object, ...], folder: Path, rank: int, count: int) -> None:
    # PyTorch warns for each tensor that one collective could serve two mesh dimensions.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timeout)
    result = function(*args)
    if rank == 0:
        (folder / "result").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _time_everything(counts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    shares = [(layers, max(min(3, rounds), rounds * counts[0] // layers)) for layers in counts]
    return [row for mesh in MESHES for layers, share in shares for row in _time_tools(mesh, layers, share)]


def _time_tools(mesh: str, layers: int, rounds: int) -> list[dict[str, Any]]:
    tools = _tools(_model(mesh, layers))
    problems = {name: _problem(tool) for name, tool in tools.items()}
    counts = {name: 0 if problems[name] else _count(tool) for name, tool in tools.items()}
    seconds = np.array(
        [[np.nan if problems[name] else _time(tool) for name, tool in tools.items()] for _ in range(rounds)]
    )
    columns = np.median(seconds, 0), np.median(seconds / seconds[:, :1], 0), seconds.min(0) / seconds[:, 0].min()
    numbers = np.stack(columns, 1).tolist()
    rows = [
        Sharded(mesh, layers, name, counts[name], median, ratio, fastest, problems[name])
        for name, (median, ratio, fastest) in zip(tools, numbers, strict=True)
    ]
    return [asdict(row) for row in rows]


def _time_first_call(layers: int, tool: str) -> float:
    model, other = (_model(next(iter(MESHES)), count) for count in (layers, 1))
    if tool == LOADED:
        GradientNormalizer(other, Clip(HUGE)).normalize_()
    dist.barrier()
    start = time.perf_counter()
    if tool == WHOLE:
        clip_grad_norm_(model.parameters(), HUGE)
    else:
        GradientNormalizer(model, Clip(HUGE)).normalize_()
    return time.perf_counter() - start


def _tools(model: nn.Module) -> dict[str, Callable[[], object]]:
    owned = [list(module.parameters(recurse=False)) for module in model.modules()]
    layers = [parameters for parameters in owned if parameters]

    def loop() -> None:
        for parameters in layers:
            clip_grad_norm_(parameters, HUGE)

    return {
        PER_LAYER: GradientNormalizer(model, Clip(HUGE)).normalize_,
        LOOP: loop,
        WHOLE: lambda: clip_grad_norm_(model.parameters(), HUGE),
    }


def _problem(tool: Callable[[], object]) -> str:
    """Calls a tool for the first time; returns the name of the error it raises, if any, the same on every process."""
    try:
        tool()
    except RuntimeError as error:
        return type(error).__name__
    return ""


def _count(tool: Callable[[], object]) -> int:
    with _Collectives() as collectives:
        tool()
    return int(collectives.count)


def _time(tool: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    tool()
    return time.perf_counter() - start


def _model(mesh: str, layers: int) -> nn.Module:
    """Makes linear layers with gradients, sharded as in FSDP2 on a 1-D mesh, plus tensor parallelism on a 2-D one."""
    processes = dist.get_world_size()
    whole = init_device_mesh("cpu", (processes,) if MESHES[mesh] == 1 else (2, processes // 2))
    rows: list[Placement] = [Shard(0)] if whole.ndim == 1 else [Shard(0), Shard(1)]
    bias: list[Placement] = [Shard(0)] if whole.ndim == 1 else [Shard(0), Replicate()]
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(layers):
        layer = nn.Linear(WIDTH, WIDTH)
        layer.weight = _sharded(layer.weight, whole, rows)
        layer.bias = _sharded(layer.bias, whole, bias)
        model.append(layer)
        if "plain" in mesh:
            model.append(nn.LayerNorm(WIDTH))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def _sharded(parameter: torch.Tensor, mesh: Any, placements: list[Placement]) -> nn.Parameter:  # noqa: ANN401
    tensor: DTensor = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
    return nn.Parameter(tensor)


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    for result in (*measure_sharded(quick=quick), *measure_first_calls(quick=quick)):
        print(result)
