"""The first steps of a process, with the cache of compiled code empty and filled."""

import os
import subprocess
import sys
import tempfile
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


def measure_first_steps() -> list[FirstStep]:
    """Takes the first steps in two processes, of which the second finds what the first compiled.

    Returns:
        The steps.
    """
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        for is_cold in (True, False):
            done = subprocess.run(  # noqa: S603  our own code
                [sys.executable, "-c", _CODE],
                env={**os.environ, "NUMBA_CACHE_DIR": folder},
                check=True,
                capture_output=True,
                text=True,
            )
            times = map(float, done.stdout.split())
            steps += [FirstStep(what, is_cold, seconds) for what, seconds in zip(_STEPS, times, strict=True)]
    return steps
