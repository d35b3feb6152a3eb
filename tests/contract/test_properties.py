"""Arbitrary gradients: every strategy on every backend matches the reference.

Shapes, dtypes, magnitudes, memory layouts, sparse and complex gradients, and NaN and infinity anywhere.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from support.contract import (
    QUICK_BACKENDS,
    Case,
    Tensors,
    as_real,
    assert_contract,
    bits,
    documented_strategy,
    widened,
)
from tamegrad import Clip, ClipValue, GradientNormalization, Keep, NonFiniteGradientError, Policy, Renormalize
from tamegrad.strategies import OnNonfinite, Per
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.memory import DTYPES

# The width at which Hypothesis draws values of a dtype: bfloat16 has float32's range, and values are rounded to it.
WIDTHS: dict[torch.dtype, Any] = {
    torch.float16: 16,
    torch.bfloat16: 32,
    torch.float32: 32,
    torch.float64: 64,
    torch.complex64: 32,
    torch.complex128: 64,
}
THRESHOLDS = st.one_of(st.floats(1e-30, 1e30), st.floats(-30, 30).map(lambda power: 10.0**power))
PERS = st.sampled_from(get_args(Per))
STRATEGIES = st.one_of(
    st.just(Keep()),
    st.builds(Clip, THRESHOLDS, PERS),
    st.builds(ClipValue, THRESHOLDS),
    st.builds(Renormalize, PERS),
    st.builds(documented_strategy(), THRESHOLDS, PERS),
    st.sampled_from(GradientNormalization),
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def transposed(gradient: Tensor) -> Tensor:
    """Lays out a gradient with its first dimension last in memory, like channels_last."""
    return gradient.movedim(0, -1).contiguous().movedim(-1, 0) if gradient.ndim > 1 else gradient


def spaced(gradient: Tensor) -> Tensor:
    """Lays out a gradient as every second value of a larger tensor."""
    return torch.stack([gradient, gradient], -1)[..., 0]


def expanded(gradient: Tensor) -> Tensor:
    """Expands the first row to all rows, in the same memory."""
    return gradient[:1].expand_as(gradient) if gradient.ndim else gradient


LAYOUTS: list[Callable[[Tensor], Tensor]] = [Tensor.clone, transposed, spaced, expanded]


@st.composite
def tensors(draw: st.DrawFn, *, nonfinite: bool) -> Tensor:
    """Draws a gradient: any shape and dtype, with values of similar or of any magnitude."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(SHAPES)
    count = int(torch.Size(shape).numel()) * (2 if dtype.is_complex else 1)
    any_value = st.floats(allow_nan=nonfinite, allow_infinity=nonfinite, width=WIDTHS[dtype])
    power = draw(st.floats(-0.95, 0.95))
    scale = torch.finfo(dtype).max ** power
    alike = st.floats(-1, 1).map(lambda value: value * scale)
    values = draw(st.lists(draw(st.sampled_from([any_value, alike])), min_size=count, max_size=count))
    real = torch.tensor(values, dtype=torch.float64)
    wide = torch.view_as_complex(real.reshape(*shape, 2)) if dtype.is_complex else real.reshape(shape)
    gradient = wide.to(dtype)
    # Rounding to bfloat16 may overflow, which is only allowed if infinities are.
    gradient = gradient if nonfinite or dtype.is_complex else torch.nan_to_num(gradient)
    laid_out: Tensor = draw(st.sampled_from(LAYOUTS))(gradient)
    return laid_out


@st.composite
def models(draw: st.DrawFn, *, nonfinite: bool) -> Tensors:
    """Draws one to three layers with one to three parameter types each."""
    types = st.lists(st.sampled_from(["weight", "bias", "scale"]), min_size=1, max_size=3, unique=True)
    layers = draw(st.lists(types, min_size=1, max_size=3))
    return {f"layer{i}": {kind: draw(tensors(nonfinite=nonfinite)) for kind in kinds} for i, kinds in enumerate(layers)}


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@given(gradients=models(nonfinite=False), strategy=STRATEGIES)
def test_finite_gradients(backend: Any, gradients: Tensors, strategy: object) -> None:
    assert_contract(Case.of(gradients), strategy, backend)


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@given(
    gradients=models(nonfinite=True),
    strategy=STRATEGIES,
    on_nonfinite=st.sampled_from(("keep", "zero", "skip_group", "skip")),
)
def test_gradients_that_may_be_nonfinite(
    backend: Any, gradients: Tensors, strategy: object, on_nonfinite: OnNonfinite
) -> None:
    assert_contract(Case.of(gradients), strategy, backend, on_nonfinite)


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@given(gradients=models(nonfinite=True), strategy=STRATEGIES, bad=st.sampled_from((math.nan, math.inf, -math.inf)))
def test_nonfinite_gradients_that_raise_stay_as_they_are(
    backend: Any, gradients: Tensors, strategy: object, bad: float
) -> None:
    gradients = {**gradients, "bad": {"weight": torch.tensor([1.0, bad])}}
    case = Case.of(gradients)
    before = [bits(gradient).clone() for types in gradients.values() for gradient in types.values()]
    normalizer = GradientNormalizer(case.model, strategy, on_nonfinite="raise", backend=backend)
    with pytest.raises(NonFiniteGradientError):
        normalizer.normalize_()
    after = [bits(gradient) for types in gradients.values() for gradient in types.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@given(
    gradients=models(nonfinite=False),
    default=STRATEGIES,
    overrides=st.dictionaries(st.sampled_from(["layer0", "layer*", "*/*", "layer0/*", "*"]), STRATEGIES, max_size=3),
)
def test_policies(backend: Any, gradients: Tensors, default: object, overrides: dict[str, Any]) -> None:
    assert_contract(Case.of(gradients), Policy(default, overrides), backend)


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@given(gradients=models(nonfinite=False), per=PERS, fraction=st.floats(1e-3, 0.999))
def test_clipping_lands_on_the_threshold_and_keeps_the_direction(
    backend: Any, gradients: Tensors, per: Per, fraction: float
) -> None:
    wide: Tensors = {
        layer: {k: widened(g).contiguous() for k, g in types.items()} for layer, types in gradients.items()
    }
    before = {layer: {k: g.clone() for k, g in types.items()} for layer, types in wide.items()}
    measured = GradientNormalizer(Case.of(wide).model, Keep(), backend=backend).normalize_()
    largest = measured.norms.max().item()
    assume(1e-290 < largest < 1e300)
    report = GradientNormalizer(Case.of(wide).model, Clip(largest * fraction, per=per), backend=backend).normalize_()
    after = GradientNormalizer(Case.of(wide).model, Clip(1e308, per=per), backend=backend).normalize_()
    torch.testing.assert_close(after.norms, report.norms_after, rtol=1e-12, atol=1e-300)
    assert (after.norms <= largest * fraction * (1 + 1e-12)).all()
    for layer, types in wide.items():
        for kind, gradient in types.items():
            after_values, before_values = as_real(gradient), as_real(before[layer][kind])
            assert ((after_values.sign() == before_values.sign()) | (after_values == 0)).all()
            assert (after_values.abs() <= before_values.abs()).all()
