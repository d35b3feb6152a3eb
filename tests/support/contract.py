"""Compares a backend with the reference: one model, its gradients, and the same gradients as NumPy arrays."""

import doctest
import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tamegrad import Report, normalize, strategies
from tamegrad.decide import Decision
from tamegrad.groups import Plan
from tamegrad.strategies import OnNonfinite, Per, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.backends import BACKENDS

Tensors: TypeAlias = dict[str, dict[str, Tensor]]

# Triton's interpreter takes tens of milliseconds a program: tests/torch/backends/test_gpu.py holds the GPU backend to
# the same contract, on fewer and smaller gradients.
QUICK_BACKENDS = [name for name in BACKENDS if name != "gpu"]

# A value is computed in float64 and rounded once to the dtype: one spacing of the dtype allows for a tie that rounds
# the other way. In float64 there are two or three more roundings on either side.
SPACINGS = {torch.float64: 8, torch.complex128: 8}
# Norms are sums of squares in float64, added in a different order.
NORM_TOLERANCE = 1e-13
DECIDED = [field.name for field in fields(Decision)]
THRESHOLDS = (0.03, 1.0, 40.0)
DOCS = Path(__file__).parents[2] / "docs"
SMALLEST = 2 * np.finfo(np.float64).smallest_subnormal


def documented_strategy() -> type[Strategy]:
    """Returns the class that `docs/your-own-strategy.md` defines."""
    page = (DOCS / "your-own-strategy.md").read_text(encoding="utf-8")
    defined: dict[str, Any] = {"__name__": "your_own_strategy"}
    for example in doctest.DocTestParser().get_examples(page):
        exec(example.source, defined)  # noqa: S102  our own documentation
        if "Soften" in defined:
            return defined["Soften"]  # type: ignore[no-any-return]
    raise AssertionError("the page no longer defines Soften")


BUILT_IN: list[type[Strategy]] = [
    found
    for found in (getattr(strategies, name) for name in strategies.__all__)
    if isinstance(found, type) and issubclass(found, Strategy) and found is not Strategy
]
# The built-in strategies, and one as a user would write it.
STRATEGIES = [*BUILT_IN, documented_strategy()]
# They leave a group untouched or move it to an exact threshold: every backend decides the same bits from equal norms.
# Others may call functions like `tanh`, which NumPy and a backend round differently.
EXACT: list[type[Strategy]] = [strategies.Keep, strategies.Clip, strategies.ClipValue, strategies.Renormalize]


@dataclass
class Case:
    """A model with gradients, and a copy of the original gradients as wide NumPy arrays."""

    model: nn.Module
    arrays: dict[str, dict[str, NDArray[Any]]]

    @classmethod
    def of(cls, gradients: Tensors) -> "Case":
        """Makes a model whose layers have these gradients."""
        model = nn.Module()
        arrays: dict[str, dict[str, NDArray[Any]]] = {}
        for layer, types in gradients.items():
            model.add_module(layer, nn.Module())
            for kind, gradient in types.items():
                parameter = nn.Parameter(torch.zeros_like(gradient))
                parameter.grad = gradient
                model.get_submodule(layer).register_parameter(kind, parameter)
            arrays[layer] = {kind: widened(gradient).numpy().copy() for kind, gradient in types.items()}
        return cls(model, arrays)

    @property
    def gradients(self) -> Tensors:
        """The current gradients of the parameters."""
        return {
            layer: {kind: parameter.grad for kind, parameter in module.named_parameters() if parameter.grad is not None}
            for layer, module in self.model.named_children()
        }


def every_strategy() -> list[Strategy]:
    """Makes every strategy with every `per` it has, at a low, a middle and a high threshold."""
    made: list[Strategy] = []
    for strategy in STRATEGIES:
        names = {field.name for field in fields(strategy)}
        choices = {"threshold": THRESHOLDS, "per": get_args(Per)}
        settings = [[(name, value) for value in choices[name]] for name in sorted(names)]
        made += [strategy(**dict(combination)) for combination in itertools.product(*settings)]
    return made


def paired(rows: list[Any], columns: list[Any], others: list[Any]) -> list[tuple[Any, Any, Any]]:
    """Combines every row with every column, and each of these pairs with one of the others in turn.

    Every pair of two values occurs if there are no more others than rows, and no more than columns.
    """
    cells = itertools.product(enumerate(rows), enumerate(columns))
    return [(row, column, others[(i + j) % len(others)]) for (i, row), (j, column) in cells]


def assert_same_values(actual: Tensor, expected: NDArray[Any], where: str) -> None:
    """Compares in units of the dtype's spacing at the expected value."""
    allowed = SPACINGS.get(actual.dtype, 1)
    actual, rounded = as_real(actual), as_real(torch.from_numpy(np.asarray(expected)).to(actual.dtype))
    wide, finfo = rounded.double(), torch.finfo(actual.dtype)
    spacing = (wide.abs() * finfo.eps).clamp(min=finfo.smallest_normal * finfo.eps)
    far = (actual.double() - wide).abs() > allowed * spacing
    same = (actual == rounded) | (actual.isnan() & rounded.isnan())
    assert not (far & ~same).any(), f"{where}: {actual[far].tolist()[:5]} instead of {rounded[far].tolist()[:5]}"


def is_exact(plan: Plan) -> bool:
    """Returns whether every backend must decide the bits that the reference decides."""
    return all(type(group.strategy) in EXACT for group in plan.groups)


def assert_same_report(actual: Report[Tensor], expected: Report[NDArray[Any]], *, exact: bool = True) -> None:
    assert actual.groups == expected.groups
    assert actual.skipped == expected.skipped
    for name in ("norms", "scales", "norms_after", "total_norm"):
        vector = getattr(actual, name)
        assert vector.dtype == torch.float64
        np.testing.assert_allclose(
            vector.numpy(), getattr(expected, name), rtol=NORM_TOLERANCE, atol=SMALLEST, err_msg=name
        )
    np.testing.assert_array_equal(actual.nonfinite.numpy(), expected.nonfinite, err_msg="nonfinite")
    # If a strategy is continuous, the last bit of a norm decides whether a group that barely changes counts as clipped.
    ignored = np.zeros_like(expected.clipped) if exact else np.abs(expected.scales - 1.0) <= 1e-15
    np.testing.assert_array_equal(actual.clipped.numpy() | ignored, expected.clipped | ignored, err_msg="clipped")


def assert_contract(case: Case, strategy: object, backend: Any, on_nonfinite: OnNonfinite = "keep") -> None:
    """Normalizes a case with a backend and compares it with the reference."""
    expected, expected_report = normalize(case.arrays, strategy, on_nonfinite=on_nonfinite)
    normalizer = GradientNormalizer(case.model, strategy, on_nonfinite=on_nonfinite, backend=backend)
    before = {layer: {kind: g.clone() for kind, g in types.items()} for layer, types in case.gradients.items()}
    report = normalizer.normalize_()
    exact = is_exact(normalizer.plan)
    assert_same_report(report, expected_report, exact=exact)
    for layer, types in case.gradients.items():
        for kind, gradient in types.items():
            assert gradient.dtype == before[layer][kind].dtype
            assert_same_values(gradient, expected[layer][kind], f"{layer}.{kind}")
            # A zeroed group may turn -0 into 0; if the reference keeps a gradient, the backend must keep every bit.
            if exact and expected[layer][kind].tobytes() == case.arrays[layer][kind].tobytes():
                assert bits(gradient).equal(bits(before[layer][kind])), f"the bits of {layer}.{kind} changed"


def huge_complex_case() -> Case:
    """Makes a case of finite complex values, some of whose magnitudes overflow float64."""
    largest = np.finfo(np.float64).max
    values = [complex(largest, -largest), complex(0.3 * largest, 0.99 * largest), complex(3.0, 4.0), complex(0.0, 1.0)]
    return Case.of({"out": {"weight": torch.tensor(values, dtype=torch.complex128)}})


def assert_huge_complex_cut(case: Case, limit: float) -> None:
    """Compares the result of `ClipValue` on the huge complex case with one computed by hand."""
    length = np.hypot(0.3, 0.99)
    directions = np.array([complex(0.5**0.5, -(0.5**0.5)), complex(0.3, 0.99) / length, complex(0.6, 0.8)])
    gradient = case.gradients["out"]["weight"].numpy()
    np.testing.assert_allclose(gradient[:2], directions[:2] * limit, rtol=1e-15)
    np.testing.assert_allclose(gradient[2:], [directions[2] * min(limit, 5.0), complex(0.0, 1.0)], rtol=1e-15)


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def bits(tensor: Tensor) -> Tensor:
    tensor = as_real(tensor).contiguous()
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
