"""One contract for every strategy, on every backend, in every dtype: what `reference.py` gives is right.

The lists come from the code, so that nothing new can be left out.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

import torch
from tamegrad import Report, normalize
from tamegrad.strategies import OnNonfinite, Per, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.kernels import BACKENDS
from tamegrad.torch.normalizer import DTYPES
from torch import Tensor, nn

# A value is computed in float64 and rounded once to the dtype: one spacing of it allows for a tie that falls the other
# way. In float64 there are two or three roundings more on either side.
SPACINGS = {torch.float64: 8, torch.float32: 1, torch.bfloat16: 1, torch.float16: 1}
# Norms are sums of squares in float64, added in another order.
NORM_TOLERANCE = 1e-13

THRESHOLDS = (0.03, 1.0, 40.0)
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "first": {"weight": (7, 9), "bias": (7,)},
    "second": {"weight": (63,), "scale": ()},
    "empty": {"weight": (0, 3)},
}


def every_strategy() -> list[Strategy]:
    """Makes every strategy with every `per` it has, at a low, a middle and a high threshold."""
    strategies: list[Strategy] = []
    for kind in get_args(Strategy):
        names = {field.name for field in fields(kind)}
        choices = {"threshold": THRESHOLDS, "per": get_args(Per)}
        settings = [[(name, value) for value in choices[name]] for name in sorted(names)]
        strategies += [kind(**dict(combination)) for combination in itertools.product(*settings)]
    return strategies


@dataclass
class Case:
    """A model with gradients, and the same gradients as NumPy float64 arrays."""

    model: nn.Module
    arrays: dict[str, dict[str, NDArray[Any]]]
    dtype: torch.dtype

    @property
    def gradients(self) -> dict[str, dict[str, Tensor]]:
        return {
            layer: {kind: self.model.get_parameter(f"{layer}.{kind}").grad for kind in types}  # type: ignore[misc]
            for layer, types in self.arrays.items()
        }


def a_case(dtype: torch.dtype, magnitude: float = 1.0, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    for layer, types in SHAPES.items():
        model.add_module(layer, nn.Module())
        for kind, shape in types.items():
            gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude).to(dtype)
            parameter = nn.Parameter(torch.zeros_like(gradient))
            parameter.grad = gradient
            model.get_submodule(layer).register_parameter(kind, parameter)
            arrays.setdefault(layer, {})[kind] = gradient.double().numpy().copy()
    return Case(model, arrays, dtype)


def assert_same_values(actual: Tensor, expected: NDArray[Any], where: str) -> None:
    """Compares in units of the dtype's spacing at the expected value."""
    rounded = torch.from_numpy(np.asarray(expected)).to(actual.dtype)
    wide, finfo = rounded.double(), torch.finfo(actual.dtype)
    spacing = torch.maximum(
        wide.abs() * finfo.eps, torch.tensor(finfo.smallest_normal * finfo.eps, dtype=torch.float64)
    )
    far = (actual.double() - wide).abs() > SPACINGS[actual.dtype] * spacing
    same = (actual == rounded) | (actual.isnan() & rounded.isnan())
    assert not (far & ~same).any(), f"{where}: {actual[far].tolist()[:5]} instead of {rounded[far].tolist()[:5]}"


def assert_same_report(actual: Report[Tensor], expected: Report[NDArray[Any]]) -> None:
    assert actual.groups == expected.groups
    assert actual.skipped == expected.skipped
    for name in ("norms", "scales", "norms_after", "total_norm"):
        vector = getattr(actual, name)
        assert vector.dtype == torch.float64
        np.testing.assert_allclose(vector.numpy(), getattr(expected, name), rtol=NORM_TOLERANCE, err_msg=name)
    for name in ("clipped", "nonfinite"):
        np.testing.assert_array_equal(getattr(actual, name).numpy(), getattr(expected, name), err_msg=name)


def assert_contract(case: Case, strategy: Strategy, backend: str, on_nonfinite: OnNonfinite = "keep") -> None:
    """Normalizes the case with a backend and holds it against the reference."""
    expected, expected_report = normalize(case.arrays, strategy, on_nonfinite=on_nonfinite)
    normalizer = GradientNormalizer(case.model, strategy, on_nonfinite=on_nonfinite, backend=backend)  # type: ignore[arg-type]
    before = {layer: {kind: g.clone() for kind, g in types.items()} for layer, types in case.gradients.items()}
    report = normalizer.normalize_()
    assert_same_report(report, expected_report)
    for layer, types in case.gradients.items():
        for kind, gradient in types.items():
            assert gradient.dtype == case.dtype
            assert_same_values(gradient, expected[layer][kind], f"{layer}.{kind}")
            if np.array_equal(expected[layer][kind], case.arrays[layer][kind], equal_nan=True):
                assert bits(gradient).equal(bits(before[layer][kind])), f"the bits of {layer}.{kind} changed"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
class TestContract:
    def test_random_gradients(self, strategy: Strategy, dtype: torch.dtype, backend: str) -> None:
        assert_contract(a_case(dtype), strategy, backend)

    @pytest.mark.parametrize("power", [-0.9, -0.4, 0.4, 0.85])
    def test_tiny_and_huge_gradients(self, strategy: Strategy, dtype: torch.dtype, backend: str, power: float) -> None:
        largest = torch.finfo(dtype).max
        assert_contract(a_case(dtype, magnitude=largest**power, seed=1), strategy, backend)

    def test_zero_gradients(self, strategy: Strategy, dtype: torch.dtype, backend: str) -> None:
        assert_contract(a_case(dtype, magnitude=0.0), strategy, backend)

    @pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "skip"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_nonfinite_gradients(
        self, strategy: Strategy, dtype: torch.dtype, backend: str, value: float, on_nonfinite: OnNonfinite
    ) -> None:
        case = a_case(dtype, seed=2)
        case.gradients["first"]["weight"][3, 4] = value
        case.arrays["first"]["weight"][3, 4] = value
        assert_contract(case, strategy, backend, on_nonfinite)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_exactly_at_its_threshold_keeps_its_bits_and_one_above_does_not(
    dtype: torch.dtype, backend: str
) -> None:
    for kind in get_args(Strategy):
        if "threshold" not in {field.name for field in fields(kind)}:
            continue
        case = a_case(dtype)
        gradient = case.gradients["second"]["weight"]
        gradient.zero_()[:2] = torch.tensor([3.0, -4.0])
        case.gradients["second"]["scale"].zero_()
        limit = 4.0 if "per" not in {field.name for field in fields(kind)} else 5.0
        before = gradient.clone()
        GradientNormalizer(case.model, kind(limit), backend=backend).normalize_()  # type: ignore[arg-type]
        assert bits(gradient).equal(bits(before))
        below = float(np.nextafter(limit, 0))
        report = GradientNormalizer(case.model, kind(below), backend=backend).normalize_()  # type: ignore[arg-type]
        assert report["second"].clipped


def test_the_suite_would_notice_a_wrong_threshold() -> None:
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
