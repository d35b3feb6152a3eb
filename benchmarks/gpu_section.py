"""Runs one section of the GPU check; `gpu.py` starts it, in a process of its own."""

import argparse
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_checks
import gpu_correct
import gpu_times
import torch
from gpu_subjects import Bench

from tamegrad import Clip
from tamegrad.torch import GradientNormalizer


def env(bench: Bench) -> None:
    """Writes down the device, the versions, what `auto` takes, and the speed of memory."""
    linear = torch.nn.Linear(2, 2, device=bench.device)
    facts: dict[str, object] = {
        "device": "the CPU, in a dry run",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "auto": str(GradientNormalizer(linear, Clip(1.0)).backend),
    }
    if not bench.dry:
        found = torch.cuda.get_device_properties(0)
        facts |= {"device": found.name, "capability": f"{found.major}.{found.minor}", "memory": found.total_memory}
    source = torch.ones(2**10 if bench.dry else 2**29, device=bench.device)
    target = torch.empty_like(source)
    best = min(bench.gpu_ms(lambda: target.copy_(source)) for _ in range(10))
    bench.emit("env", **facts, copy_gbs=2 * source.nbytes / best / 1e6)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


SECTIONS: dict[str, Callable[..., None]] = {
    "env": env,
    "correct": gpu_correct.correct,
    "launches": gpu_checks.launches,
    "graph": gpu_checks.graph,
    "hazard": gpu_checks.hazard,
    "fsdp": gpu_checks.fsdp,
    "time": gpu_times.times,
    "train": gpu_times.train,
}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section")
    parser.add_argument("path", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    kind, *arguments = given.section.split(":")
    SECTIONS[kind](Bench(given.path, given.seconds, given.dry_run), *arguments)


if __name__ == "__main__":
    main()
