"""Measures memory, time and losses of training with steps after backward, and with steps inside backward."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # the model is also that of the tests

from support.transformer import Gpt, batches, equal_parameters, trained  # noqa: E402  the path comes first
from tamegrad import Clip  # noqa: E402
from tamegrad.study.text import read_text  # noqa: E402
from tamegrad.torch import StepInBackward, attach  # noqa: E402

__all__ = ["AFTER", "INSIDE", "Memory", "Time", "Training", "measure_memory", "measure_time", "measure_training"]

AFTER, INSIDE = "after backward", "inside backward"
MIB = 2**20
# Memory is measured with few tokens, so that it is not of activations; time with many, as in training.
WIDTH, SHORT, LONG = 256, (1, 17), (4, 129)
QUICK_WIDTH = 16
WARM_UP, STEPS = 2, 3


@dataclass(frozen=True)
class Memory:
    """The memory of one way of training.

    Args:
        blocks: The number of blocks.
        way: `AFTER` or `INSIDE`.
        parameters: The size of all parameters, in bytes.
        layers: The sizes of the two largest layers, in bytes.
        live: The most bytes of gradients that were there at once.
        resident: How much the process grew at its peak, in bytes, over parameters and optimizer state.
    """

    blocks: int
    way: str
    parameters: int
    layers: tuple[int, int]
    live: int
    resident: int


@dataclass(frozen=True)
class Time:
    """The time of a training step in both ways.

    Args:
        blocks: The number of blocks.
        width: The width of the residual stream.
        clips: Whether every layer is clipped, or none.
        after: The median seconds of a step after backward.
        inside: The same inside backward.
        ratio: The median of `inside / after`, measured in pairs.
    """

    blocks: int
    width: int
    clips: bool
    after: float
    inside: float
    ratio: float


@dataclass(frozen=True)
class Training:
    """The same training in both ways.

    Args:
        steps: The number of steps.
        first: The first loss.
        after: The last loss with steps after backward.
        inside: The same inside backward.
        is_equal: Whether all losses and parameters are equal to the last bit.
    """

    steps: int
    first: float
    after: float
    inside: float
    is_equal: bool


def _adamw(params: Any) -> torch.optim.Optimizer:  # noqa: ANN401  what torch's optimizers take
    return torch.optim.AdamW(params, lr=1e-3)


def _step_of(model: nn.Module, way: str, threshold: float = 0.1) -> tuple[Callable[[], object], Any]:
    """Returns what follows each backward pass, and the owner of the plan."""
    if way == INSIDE:
        stepper = StepInBackward(model, _adamw, Clip(threshold))
        return stepper.step, stepper
    optimizer = _adamw(model.parameters())
    normalizer = attach(model, optimizer, Clip(threshold))

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step, normalizer


class _LiveGradients:
    """Looks how large all gradients are whenever one has arrived; made before what steps."""

    def __init__(self, model: nn.Module) -> None:
        self.most = 0
        self._parameters = list(model.parameters())
        for parameter in self._parameters:
            register: Any = parameter.register_post_accumulate_grad_hook
            register(self._look)

    def _look(self, _: Tensor) -> None:
        live = sum(parameter.grad.nbytes for parameter in self._parameters if parameter.grad is not None)
        self.most = max(self.most, live)


def _status(entry: str) -> int:
    """Returns an entry of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def _memory(blocks: int, way: str, width: int) -> Memory:
    """Measures in this process, which must be a new one."""
    rows, length = SHORT
    model = Gpt(blocks, width, length)
    live = _LiveGradients(model)
    step, owner = _step_of(model, way)
    data = batches(bytes(range(256)) * 4, WARM_UP + STEPS, rows, length)
    # Makes the optimizer's state, and compiles.
    trained(model, step, data[:WARM_UP])
    gc.collect()
    before = _status("VmRSS")
    # Makes the peak what it is now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    trained(model, step, data[WARM_UP:])
    peak = _status("VmHWM")
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    layers = sorted(sum(sizes[each.name] for each in layer.parameters) for layer in owner.plan.layers)
    return Memory(blocks, way, sum(sizes.values()), (layers[-1], layers[-2]), live.most, peak - before)


def measure_memory(blocks: int, way: str, *, quick: bool) -> Memory:
    """Measures memory in a process of its own.

    Args:
        blocks: The number of blocks.
        way: `AFTER` or `INSIDE`.
        quick: Whether to use a tiny width; then the numbers mean nothing.

    Returns:
        The measurement.
    """
    # Freed memory goes back at once, so that the resident size is that of what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, str(blocks), way, str(QUICK_WIDTH if quick else WIDTH)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603  this file
    found = json.loads(done.stdout)
    return Memory(**{**found, "layers": tuple(found["layers"])})


def measure_time(blocks: int, width: int, *, clips: bool, quick: bool) -> Time:
    """Times training steps on one thread, in turns. CPU time does not depend on what else the machine does.

    Args:
        blocks: The number of blocks.
        width: The width of the residual stream.
        clips: Whether to clip every layer, or none.
        quick: Whether to use a tiny width and two rounds; then the numbers mean nothing.

    Returns:
        The medians.
    """
    width = QUICK_WIDTH if quick else width
    torch.set_num_threads(1)
    rows, length = LONG
    rounds = 2 if quick else max(5, 60 // blocks)
    models = {way: Gpt(blocks, width, length) for way in (AFTER, INSIDE)}
    steps = {way: _step_of(model, way, 1e-6 if clips else 1e9)[0] for way, model in models.items()}
    seconds: dict[str, list[float]] = {AFTER: [], INSIDE: []}
    for number, tokens in enumerate(batches(bytes(range(256)) * 4, WARM_UP + rounds, rows, length)):
        # Whichever comes second may find warmer caches.
        for way in (AFTER, INSIDE) if number % 2 else (INSIDE, AFTER):
            start = time.process_time()
            trained(models[way], steps[way], [tokens])
            if number >= WARM_UP:
                seconds[way].append(time.process_time() - start)
    ratios = [inside / after for after, inside in zip(seconds[AFTER], seconds[INSIDE], strict=True)]
    after, inside = (statistics.median(seconds[way]) for way in (AFTER, INSIDE))
    return Time(blocks, width, clips, after, inside, statistics.median(ratios))


def measure_training(*, quick: bool) -> Training:
    """Trains on the source of Python's standard library in both ways.

    Args:
        quick: Whether to take three steps only.

    Returns:
        The losses.
    """
    data = batches(read_text(None).data, 3 if quick else 200, 8, 65)
    models = [Gpt(4, 64, 64, tied=True) for _ in range(2)]
    losses = [trained(model, _step_of(model, way)[0], data) for model, way in zip(models, (AFTER, INSIDE), strict=True)]
    is_equal = losses[0] == losses[1] and equal_parameters(*models)
    return Training(len(data), losses[0][0], losses[0][-1], losses[1][-1], is_equal)


if __name__ == "__main__":
    print(json.dumps(asdict(_memory(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))))
