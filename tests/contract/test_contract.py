"""One contract for every strategy, backend and dtype: the results match `reference.py`.

The lists come from the code, so that nothing new can be left out.
"""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from support.contract import (
    EXACT,
    QUICK_BACKENDS,
    Case,
    assert_contract,
    assert_huge_complex_cut,
    assert_same_report,
    assert_same_values,
    bits,
    every_strategy,
    huge_complex_case,
    is_exact,
    paired,
)
from tamegrad import ClipValue, Report, normalize
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.memory import DTYPES

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "first": {"weight": (7, 9), "bias": (7,)},
    "second": {"weight": (63,), "scale": ()},
    "empty": {"weight": (0, 3)},
}


def a_case(dtype: torch.dtype, magnitude: float = 1.0, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return Case.of(
        {
            layer: {
                kind: (torch.randn(shape, generator=generator, dtype=wide) * magnitude).to(dtype)
                for kind, shape in types.items()
            }
            for layer, types in SHAPES.items()
        }
    )


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
class TestContract:
    def test_random_gradients(self, strategy: Strategy, dtype: torch.dtype, backend: Any) -> None:
        assert_contract(a_case(dtype), strategy, backend)

    def test_zero_gradients(self, strategy: Strategy, dtype: torch.dtype, backend: Any) -> None:
        assert_contract(a_case(dtype, magnitude=0.0), strategy, backend)


# Pairs of settings, here and below; the property tests draw from all combinations.
@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize(
    ("strategy", "dtype", "power"), paired(every_strategy(), list(DTYPES), [-0.9, -0.4, 0.4, 0.85]), ids=str
)
def test_tiny_and_huge_gradients(strategy: Strategy, dtype: torch.dtype, power: float, backend: Any) -> None:
    largest = torch.finfo(dtype).max
    assert_contract(a_case(dtype, magnitude=largest**power, seed=1), strategy, backend)


CHOICES, VALUES = ("keep", "zero", "skip_group", "skip"), (float("nan"), float("inf"), float("-inf"))
# Any four in a row have each choice and each value.
NONFINITE = [(CHOICES[k % 4], VALUES[k % 3]) for k in range(12)]


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize(("strategy", "dtype", "case"), paired(every_strategy(), list(DTYPES), NONFINITE), ids=str)
def test_nonfinite_gradients(
    strategy: Strategy, dtype: torch.dtype, case: tuple[OnNonfinite, float], backend: Any
) -> None:
    on_nonfinite, value = case
    model = a_case(dtype, seed=2)
    model.gradients["first"]["weight"][3, 4] = value
    model.arrays["first"]["weight"][3, 4] = value
    assert_contract(model, strategy, backend, on_nonfinite)


LOSS_SCALES = [1.0, 4.0, 256.0]


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize(
    ("strategy", "dtype", "loss_scale"), paired(every_strategy(), list(DTYPES), LOSS_SCALES), ids=str
)
def test_a_loss_scale_changes_nothing_but_the_gradients(
    strategy: Strategy, dtype: torch.dtype, loss_scale: float, backend: Any
) -> None:
    case = a_case(dtype, seed=3)
    expected, expected_report = normalize(case.arrays, strategy)
    for types in case.gradients.values():
        for gradient in types.values():
            gradient.mul_(loss_scale)
    normalizer = GradientNormalizer(case.model, strategy, backend=backend)
    report = normalizer._normalize(torch.tensor(loss_scale))
    assert_same_report(report, expected_report, exact=is_exact(normalizer.plan))
    for layer, types in case.gradients.items():
        for kind, gradient in types.items():
            assert_same_values(gradient / loss_scale, expected[layer][kind], f"{layer}.{kind}")


WITH_THRESHOLD = [kind for kind in EXACT if "threshold" in {field.name for field in fields(kind)}]


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WITH_THRESHOLD)
def test_a_group_exactly_at_its_threshold_keeps_its_bits_and_one_above_does_not(
    kind: Any, dtype: torch.dtype, backend: Any
) -> None:
    case = a_case(dtype)
    gradient = case.gradients["second"]["weight"]
    gradient.zero_()[:2] = torch.tensor([3.0, -4.0])
    case.gradients["second"]["scale"].zero_()
    limit = 4.0 if "per" not in {field.name for field in fields(kind)} else 5.0
    before = gradient.clone()
    GradientNormalizer(case.model, kind(limit), backend=backend).normalize_()
    assert bits(gradient).equal(bits(before))
    below = float(np.nextafter(limit, 0))
    report = GradientNormalizer(case.model, kind(below), backend=backend).normalize_()
    assert report["second"].clipped


def test_the_suite_detects_wrong_norms_and_values() -> None:
    case = a_case(torch.float32)
    _, expected = normalize(case.arrays, every_strategy()[0])
    columns = ("norms", "scales", "norms_after", "clipped", "nonfinite", "total_norm")
    right: dict[str, Any] = {name: torch.as_tensor(getattr(expected, name)) for name in columns}
    assert_same_report(Report(expected.groups, **right), expected)
    wrong = {**right, "norms": right["norms"] * (1 + 1e-12)}
    with pytest.raises(AssertionError, match="norms"):
        assert_same_report(Report(expected.groups, **wrong), expected)
    with pytest.raises(AssertionError, match="instead of"):
        assert_same_values(torch.tensor([1.0, 1.0]), np.array([1.0, 1.0 + 3e-7]), "here")


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("edge", [2.0**-511, 2.0**486])
@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
def test_values_on_both_sides_of_a_range_boundary(strategy: Strategy, edge: float, backend: Any) -> None:
    values = torch.tensor([0.5, 0.999, 1.0, 1.001, 2.0], dtype=torch.float64) * edge
    assert_contract(Case.of({"out": {"weight": values, "bias": values[:2].clone()}}), strategy, backend)


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("limit", [2.0, 1.7e308])
def test_complex_values_whose_magnitude_overflows_float64_keep_their_direction(limit: float, backend: Any) -> None:
    case = huge_complex_case()
    assert_contract(case, ClipValue(limit), backend)
    assert_huge_complex_cut(case, limit)
