"""Times clipping per layer in JAX beside optax's clipping: running and compiling, for growing numbers of layers.

Run `python benchmarks/speed_jax.py`; with `--write FILE` it also writes the documentation page. Every tool is compiled
on its own with `jax.jit`, and all are timed in interleaved rounds in one process. Layers are `Linear(64, 64)` in
float32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tamegrad import Clip
from tamegrad.jax import normalize_gradients

__all__ = ["main", "measure"]

COUNTS, ROUNDS, WIDTH = (10, 100, 1000), 60, 64
# Above this, tracing a partition takes minutes.
MOST_LABELS = 100


@dataclass(frozen=True)
class Timing:
    """One tool on one tree.

    Args:
        tool: Its name.
        layers: The number of layers.
        compiling: Seconds to trace and compile.
        running: The median of the rounds, in milliseconds.
    """

    tool: str
    layers: int
    compiling: float
    running: float


def _tree(layers: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"bias": (WIDTH,), "kernel": (WIDTH, WIDTH)}
    return {
        f"layer{index}": {kind: jnp.asarray(rng.standard_normal(shape), jnp.float32) for kind, shape in shapes.items()}
        for index in range(layers)
    }


def _tools(layers: int) -> dict[str, optax.GradientTransformation]:
    tools = {
        "optax `clip_by_global_norm`": optax.clip_by_global_norm(1.0),
        'tamegrad `Clip(per="layer")`': normalize_gradients(Clip(1.0)),
        'tamegrad `Clip(per="model")`': normalize_gradients(Clip(1.0, per="model")),
        "optax `clip_by_block_rms`": optax.clip_by_block_rms(1.0),
    }
    if layers <= MOST_LABELS:
        names = [f"layer{index}" for index in range(layers)]
        clips = {name: optax.clip_by_global_norm(1.0) for name in names}
        labels = {name: dict.fromkeys(("bias", "kernel"), name) for name in names}
        tools["optax `partition`, a label a layer"] = optax.partition(clips, labels)
    return tools


def measure(layers: int, rounds: int) -> list[Timing]:
    """Compiles every tool, then runs them in turn.

    Args:
        layers: The number of layers.
        rounds: How often each is run.

    Returns:
        A timing for each tool.
    """
    tree = _tree(layers)
    compiled, compiling = {}, {}
    for name, tool in _tools(layers).items():
        state = tool.init(tree)
        started = time.perf_counter()
        program = jax.jit(tool.update).lower(tree, state).compile()
        compiling[name] = time.perf_counter() - started
        compiled[name] = (program, state)
    running: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, (program, state) in compiled.items():
            started = time.perf_counter()
            jax.block_until_ready(program(tree, state))
            running[name].append(time.perf_counter() - started)
    return [Timing(name, layers, compiling[name], 1000 * statistics.median(running[name])) for name in compiled]


def table(timings: Sequence[Timing]) -> str:
    """Returns the timings as a Markdown table; running times also as ratios to optax's global clip."""
    lines = ["| layers | tool | run | ratio | compile |", "|--:|---|--:|--:|--:|"]
    for timing in timings:
        base = next(each for each in timings if each.layers == timing.layers).running
        lines.append(
            f"| {timing.layers:,} | {timing.tool} | {timing.running:.2f} ms | {timing.running / base:.2f} "
            f"| {timing.compiling:.1f} s |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and writes the page if asked to.

    Args:
        arguments: The command-line arguments; None for those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description="Time clipping per layer in JAX beside optax's clipping.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="also write the documentation page")
    parser.add_argument("--quick", action="store_true", help="two layers and one round; the numbers mean nothing")
    options = parser.parse_args(arguments)
    timings = []
    for layers in (2,) if options.quick else COUNTS:
        print(f"timing {layers} layers", file=sys.stderr)
        timings += measure(layers, 1 if options.quick else ROUNDS)
    laid_out = table(timings)
    versions = f"jax {jax.__version__}, optax {optax.__version__}, on the CPU, Linear(64, 64) layers in float32"
    print(f"{versions}\n\n{laid_out}")
    if options.write is not None:
        page = f"# Speed in JAX\n\nMade by `python benchmarks/speed_jax.py --write`, {versions}.\n\n{laid_out}\n"
        options.write.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
