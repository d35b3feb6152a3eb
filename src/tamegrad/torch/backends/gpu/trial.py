"""Whether the kernels work on a device: they are run once on small tensors, and compared with the plain backend.

Importing Triton proves little: it compiles at the first launch, needs a C compiler for that, and knows only some chips.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tamegrad.groups import Group, Layer, Parameter, Plan
from tamegrad.strategies import Clip, ClipValue, Renormalize
from tamegrad.torch.backends.base import Backend
from tamegrad.torch.backends.foreach import ForeachBackend
from tamegrad.torch.backends.gpu import GpuBackend
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.memory import Memory

__all__ = ["problem_on"]

# Norms are sums of squares in float64, added in a different order; the rest is rounded a few times.
TOLERANCE = 1e-12
STRATEGIES = (Clip(0.5), ClipValue(0.1), Renormalize(), Clip(1e9))
# Whole blocks and a remainder, little, and a tensor that starts where the widest loads are not possible.
SIZES, OFFSETS = (2500, 7, 1500), (0, 0, 3)
DTYPES = torch.float32, torch.bfloat16, torch.float64


@functools.cache
def problem_on(device: torch.device) -> str | None:
    """Tries the kernels; the result is kept for each device.

    Args:
        device: Where to run them.

    Returns:
        What went wrong, or None if all numbers are right.
    """
    try:
        return _difference(*(_outcome(backend, device) for backend in (GpuBackend, ForeachBackend)))
    # Whatever a compiler, a driver or a chip that nobody has tried may raise: another backend is there.
    except Exception as error:  # noqa: BLE001
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"


def _outcome(backend: type[Backend], device: torch.device) -> dict[str, Tensor]:
    """Returns what a backend reports, and the gradients it leaves."""
    tensors = [
        _drawn(size, offset, dtype, device) for dtype in DTYPES for size, offset in zip(SIZES, OFFSETS, strict=True)
    ]
    parameters = [Parameter(f"layer.{index}", str(index)) for index in range(len(tensors))]
    groups = [
        Group(f"group{first}", strategy, tuple(range(first, len(tensors), len(STRATEGIES))))
        for first, strategy in enumerate(STRATEGIES)
    ]
    plan = Plan((Layer("layer", tuple(parameters)),), tuple(groups))
    gradients = Gradients(list(tensors), Memory.of(tensors))
    runner, scale = backend(plan, [True] * len(tensors)), torch.tensor(2.0, device=device)
    steps = torch.zeros(len(groups), dtype=torch.int64, device=device)
    table = runner.measure(gradients, scale)
    decision: Any = runner.decide(table, on_nonfinite="zero", nonfinite_steps=steps, loss_scale=scale, total=None)
    runner.apply_(gradients, decision, np.ones(len(tensors), dtype=np.bool_))
    reported = {name: getattr(decision, name) for name in ("norms", "scales", "norms_after", "total_norm")}
    changed = {parameter.name: tensor for parameter, tensor in zip(parameters, tensors, strict=True)}
    return {name: torch.as_tensor(found).to("cpu") for name, found in {**reported, **changed}.items()}


def _drawn(size: int, offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the same numbers every time, one of them infinite in one tensor."""
    values = torch.linspace(-1.0, 1.0, size, dtype=torch.float64, device="cpu")
    if size == min(SIZES) and dtype == torch.bfloat16:
        values[3] = torch.inf
    memory = torch.zeros(size + offset, dtype=dtype, device=device)
    return memory[offset:].copy_(values)


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str | None:
    for name, wanted in theirs.items():
        rounding = torch.finfo(wanted.dtype).eps
        if not torch.allclose(ours[name], wanted, rtol=max(TOLERANCE, rounding), atol=0.0, equal_nan=True):
            return f"wrong numbers: {name} differs from what PyTorch's operations give"
    return None
