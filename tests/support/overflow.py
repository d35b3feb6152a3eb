"""Groups that a strategy makes larger than their dtype can hold, and what must become of them."""

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from support.contract import as_real
from support.gradients import model_with
from tamegrad import Per, Renormalize, Report, Strategy
from tamegrad.torch import GradientNormalizer

__all__ = ["CASES", "Grow", "assert_grows_as_far_as_it_fits"]


@dataclass(frozen=True)
class Grow(Strategy):
    """Multiplies norms by a factor."""

    factor: float
    per: Per = "layer"

    def target(self, norms: Any, xp: ModuleType) -> Any:
        del xp
        return norms * self.factor


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
# Gradients (values and dtype), the strategy and the loss scale.
CASES: dict[str, tuple[list[tuple[list[Any], torch.dtype]], Strategy, float | None]] = {
    "one value": ([([3.0, 4e-4], F16)], Renormalize(), 65536.0),
    "at the largest number already": ([([-65504.0, 0.0], F16)], Renormalize(), 2.0**20),
    "no value is too large": ([([0.25] * 4096, F16)], Renormalize(), 65536.0),
    "one of many values is too large": ([([0.25] * 500 + [3.0], F16)], Renormalize(), 2.0**20),
    "subnormal": ([([6e-8, -1.2e-7], F16)], Renormalize(), 2.0**24),
    "bfloat16": ([([3.0, -4.0], BF16)], Renormalize(), 2.0**127 * 1.999),
    "bfloat16, no value is too large": ([([3.0, -4.0], BF16)], Renormalize(), 2.0**127),
    "float32, own": ([([3.0, -4.0], F32)], Grow(1e38), 1e3),
    "float32 under a large loss scale": ([([1e-30, 3e-30], F32)], Renormalize(), 65536.0),
    "float64": ([([3.0, -4.0], F64)], Grow(1e307), 65536.0),
    "float64 under the largest loss scale": ([([1.0, 0.0], F64)], Renormalize(), sys.float_info.max),
    "complex64": ([([3 - 4j, 1j], C64)], Grow(1e38), 4096.0),
    "complex128": ([([3 - 4j, 1j], C128)], Grow(1e307), 4096.0),
    "own, without a loss scale": ([([3.0, -4.0], F16)], Grow(1e6), None),
    "own, fits": ([([3.0, -4.0], F16)], Grow(1e4), None),
    "own, float64 without a loss scale": ([([3.0, -4.0], F64)], Grow(1e308 / 5), None),
    "two dtypes": ([([3.0, 4.0], F32), ([1.0, 0.5], F16)], Renormalize(), 2.0**19),
    "two dtypes, the wider one is full": ([([3e38, 4.0], F32), ([1e-3, 0.5], F16)], Grow(2.0), None),
    "a gradient of zeros beside": ([([0.0, 0.0], F16), ([1.0, 0.5], F32)], Renormalize(), 2.0**19),
}


def assert_grows_as_far_as_it_fits(name: str, backend: Any, *, looks: bool = True) -> Report[Tensor]:
    """Normalizes a case and compares every value with exact arithmetic.

    Args:
        name: The case.
        backend: The backend.
        looks: Whether the host looks if an element may overflow, or leaves that to the device as on a GPU.
    """
    parts, strategy, loss_scale = CASES[name]
    gradients = [torch.tensor(values, dtype=dtype) for values, dtype in parts]
    before = [list(map(Fraction, as_real(gradient).flatten().tolist())) for gradient in gradients]
    normalizer = GradientNormalizer(model_with(gradients), strategy, backend=backend)
    normalizer._step._on_host = looks
    report = normalizer._normalize(None if loss_scale is None else torch.tensor(loss_scale, dtype=torch.float64))

    scaled_by = Fraction(1 if loss_scale is None else loss_scale)
    stored = _root(sum((value * value for values in before for value in values), Fraction()))
    wanted = scaled_by if isinstance(strategy, Renormalize) else stored * Fraction(strategy.factor)  # type: ignore[attr-defined]
    room = min(
        Fraction(torch.finfo(gradient.dtype).max) / max(map(abs, values))
        for gradient, values in zip(gradients, before, strict=True)
        if any(values)
    )
    factor = min(wanted / stored, room)
    for gradient, values in zip(gradients, before, strict=True):
        finfo = torch.finfo(gradient.dtype)
        for actual, value in zip(as_real(gradient).flatten().tolist(), values, strict=True):
            assert math.isfinite(actual)
            # A rounding to the dtype; in float64 that of the factor and the distance to the largest number, too.
            spacings = 6 if finfo.bits == 64 else 1
            spacing = max(abs(value * factor) * Fraction(finfo.eps), Fraction(finfo.smallest_normal * finfo.eps))
            assert abs(Fraction(actual) - value * factor) <= spacings * spacing, (actual, float(value * factor))
    row = report[report.groups[0]]
    assert row.norm_after == _near(factor * stored / scaled_by)
    assert row.scale == _near(factor)
    assert (row.nonfinite, row.clipped) == (0, False)
    return report


def _near(exact: Fraction) -> Any:
    return pytest.approx(float(exact), rel=1e-14, abs=1e-323)


def _root(square: Fraction) -> Fraction:
    """The square root to some hundred bits."""
    shift = 2 ** (2 * max(0, 100 + square.denominator.bit_length() - square.numerator.bit_length()))
    return Fraction(math.isqrt(square.numerator * square.denominator * shift), 1) / Fraction(
        square.denominator * math.isqrt(shift)
    )
