"""Gradients on a device without float64, like Apple's MPS.

Sums of squares are in float32, of values that are multiplied by a power of two so that the largest is about 1: no
square overflows, and those that underflow are too small to matter. They are added up in pairs, so that a sum of n
squares is off by no more than log2(n) roundings: norms are right to 1e-6. The host reads them to decide.
"""

import functools
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE, Decision, Rules
from tamegrad.torch.backends.foreach.part import Part
from tamegrad.torch.backends.tensorwise import as_real, change_, count_nonfinite, measured, pieces_of

__all__ = ["Float32Gradients", "has_float64", "table_device"]

_HOST = torch.device("cpu")
_MIDDLE_BEFORE, _MIDDLE_AFTER = BEFORE.start + 1, AFTER.start + 1
# From this many sums the host adds up, in float64.
FEW = 1024
# The powers of two that one multiplication in float32 takes.
LARGEST_STEP = 126


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Returns whether a device calculates in float64."""
    if device.type in {"cpu", "cuda"}:
        return True
    try:
        torch.ones(1, dtype=torch.float64, device=device).mul_(2.0)
    except (RuntimeError, TypeError):
        return False
    return True


def table_device(device: torch.device) -> torch.device:
    """Returns where the table of a device's gradients is."""
    return device if has_float64(device) else _HOST


class Float32Gradients:
    """Measures and changes gradients on a device without float64.

    Complex gradients with a limit on elements go to the CPU and back.

    Args:
        rules: The rules of the plan.
    """

    def __init__(self, rules: Rules[NDArray[Any]]) -> None:
        self._limits = rules.limits

    def measured(self, part: Part, limits: Tensor | None) -> Tensor:
        """Measures gradients; arguments and result as in `HostGradients`, but on the CPU."""
        table = torch.zeros(len(self._limits), COLUMNS, dtype=torch.float64, device=_HOST)
        sums: list[_Sum] = []
        for group, values, largest in zip(part.groups.tolist(), part.values, _largest(part), strict=True):
            row, limit = table[group], math.inf
            if limits is not None and np.isfinite(self._limits[group]):
                limit = limits[group].item()
            if not math.isfinite(largest):
                row[NONFINITE] += count_nonfinite(values).to(_HOST)
                row[_MIDDLE_BEFORE] += largest
            elif limit < math.inf and values.is_complex():
                row += measured(values.to(_HOST), torch.tensor(limit, dtype=torch.float64, device=_HOST))
            elif largest > limit:
                row[CUT] += 1
                sums += _squares(as_real(values), largest, [row[_MIDDLE_BEFORE]])
                sums += _squares(as_real(values), _rounded(limit, torch.float32), [row[_MIDDLE_AFTER]])
            elif largest > 0.0:
                sums += _squares(as_real(values), largest, [row[_MIDDLE_BEFORE], row[_MIDDLE_AFTER]])
        _add_up(sums)
        return table

    def change_(self, part: Part, decision: Decision[Any]) -> None:
        """Applies a decision in place; a group that keeps its values is not touched."""
        assert decision.first is not None
        assert decision.second is not None
        factors = zip(decision.first.tolist(), decision.second.tolist(), strict=True)
        zeroed = [False] * len(self._limits) if decision.zeroed is None else decision.zeroed.tolist()
        limits = [math.inf] * len(self._limits) if decision.limits is None else decision.limits.tolist()
        rows = list(zip(factors, limits, zeroed, strict=True))
        for group, values in zip(part.groups.tolist(), part.values, strict=True):
            (first, second), limit, zero = rows[group]
            if zero:
                values.zero_()
            elif limit < math.inf and values.is_complex():
                on_host = values.to(_HOST)
                one = torch.ones((), dtype=torch.float64, device=_HOST)
                change_(on_host, one, one, torch.tensor(limit, dtype=torch.float64, device=_HOST), None)
                values.copy_(on_host)
            elif limit < math.inf:
                held = _rounded(limit, values.dtype)
                values.clamp_(-held, held)
            elif first * second != 1.0:
                _multiply_(values, first * second)


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """A sum of squares that is not added up yet.

    Args:
        parts: 1-dim float32 on the device: what it is the sum of, times 2^-exponent.
        exponent: The exponent.
        targets: Where the sum is added, 0-dim float64 on the CPU.
    """

    parts: Tensor
    exponent: int
    targets: list[Tensor]


def _largest(part: Part) -> list[float]:
    """Returns the largest magnitude of the real numbers of each gradient; NaN where there is one."""
    norms = torch._foreach_norm([as_real(values) for values in part.values], math.inf)  # noqa: SLF001
    largest: list[float] = torch.stack([norm.to(torch.float32) for norm in norms]).tolist()
    return largest


def _squares(real: Tensor, largest: float, targets: list[Tensor]) -> list[_Sum]:
    """Returns the sums of squares of 1-dim values, cut to `largest`, piece by piece."""
    exponent = math.frexp(largest)[1]
    sums = []
    for piece in pieces_of(real):
        # A copy, whatever the dtype and the exponent, which can be squared in place.
        squares = _shifted(piece.to(torch.float32).clamp(-largest, largest), -exponent).square_()
        while len(squares) > FEW:
            half = len(squares) // 2
            added = squares[:half] + squares[half : 2 * half]
            squares = torch.cat([added, squares[2 * half :]])
        sums.append(_Sum(squares, 2 * exponent, list(targets)))
    return sums


def _add_up(sums: list[_Sum]) -> None:
    """Adds all sums to their targets; the host reads the device once."""
    if sums:
        parts = torch.cat([one.parts for one in sums]).to(_HOST).to(torch.float64)
        for one, numbers in zip(sums, torch.split(parts, [len(one.parts) for one in sums]), strict=True):
            total = math.ldexp(numbers.sum().item(), one.exponent)
            for target in one.targets:
                target.add_(total)


def _rounded(limit: float, dtype: torch.dtype) -> float:
    """Rounds a limit to a dtype; it cuts the same values, and to the same value."""
    return torch.tensor(limit, dtype=torch.float64, device=_HOST).to(dtype).item()


def _multiply_(values: Tensor, factor: float) -> None:
    """Multiplies values by a factor that may be past what a float32 holds."""
    mantissa, exponent = math.frexp(min(factor, sys.float_info.max))
    for piece in pieces_of(as_real(values)):
        wide = piece.to(torch.float32)
        # The subnormal and the largest numbers are what the last multiplication gives, never what it is given.
        larger = exponent > 0
        piece.copy_(_shifted(wide, exponent - 1) * (2.0 * mantissa) if larger else _shifted(wide * mantissa, exponent))


def _shifted(values: Tensor, exponent: int) -> Tensor:
    """Multiplies float32 values by a power of two that one float32 may not hold."""
    while exponent:
        step = max(-LARGEST_STEP, min(LARGEST_STEP, exponent))
        values = values * 2.0**step
        exponent -= step
    return values
