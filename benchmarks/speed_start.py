"""The first steps of a process, with the cache of compiled code empty and filled."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FirstStep", "measure_first_steps"]


@dataclass(frozen=True)
class FirstStep:
    """A step that a process takes for the first time.

    Args:
        what: What kind of step.
        is_cold: Whether the cache of compiled code was empty.
        seconds: Its time.
    """

    what: str
    is_cold: bool
    seconds: float


_STEPS = ("the first step", "the first step that clips")
_CODE = """
import time, torch
from tamegrad import Clip
from tamegrad.torch import GradientNormalizer
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(10)))
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
for threshold in (1e9, 1e-6):
    start = time.perf_counter()
    GradientNormalizer(model, Clip(threshold)).normalize_()
    print(time.perf_counter() - start)
"""


def measure_first_steps(*, quick: bool) -> list[FirstStep]:
    """Takes the first steps in two processes, of which the second finds what the first compiled.

    Args:
        quick: Whether to take them in one process alone, with the usual cache.

    Returns:
        The steps.
    """
    if quick:
        return _first_steps(os.environ, is_cold=False)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        return [step for is_cold in (True, False) for step in _first_steps(environment, is_cold=is_cold)]


def _first_steps(environment: Mapping[str, str], *, is_cold: bool) -> list[FirstStep]:
    command = [sys.executable, "-c", _CODE]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)  # noqa: S603  our own
    times = map(float, done.stdout.split())
    return [FirstStep(what, is_cold, seconds) for what, seconds in zip(_STEPS, times, strict=True)]
