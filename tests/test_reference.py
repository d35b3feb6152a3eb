"""The oracle against closed forms and exact arithmetic: everything else is checked against it."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tamegrad import Clip, ClipValue, GradientNormalization, Keep, NonFiniteGradientError, Renormalize, SettingError
from tamegrad import normalize as normalize_arrays
from tamegrad.reference import norm_of
from tamegrad.strategies import Strategy

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64)


def one(values: list[float], strategy: object, dtype: str = "float64") -> NDArray[Any]:
    return normalize_arrays({"out": {"weight": np.array(values, dtype)}}, strategy)[0]["out"]["weight"]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Keep(), [3.0, -4.0]),
        (Clip(1.0), [0.6, -0.8]),
        (Clip(5.0), [3.0, -4.0]),
        (Clip(math.inf), [3.0, -4.0]),
        (Renormalize(), [0.6, -0.8]),
        (ClipValue(3.5), [3.0, -3.5]),
        (ClipValue(math.inf), [3.0, -4.0]),
        (GradientNormalization.CLIP_L2_PER_LAYER, [0.6, -0.8]),
        (None, [3.0, -4.0]),
    ],
)
def test_the_definitions(strategy: object, expected: list[float]) -> None:
    np.testing.assert_allclose(one([3.0, -4.0], strategy), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("strategy", "magnitude", "expected"),
    [
        (Clip(1.0), 1.0, [0.6, -0.8j]),
        (ClipValue(3.5), 1.0, [3.0, -3.5j]),
        (Keep(), 1.0, [3.0, -4.0j]),
        *((Renormalize(), magnitude, [0.6, -0.8j]) for magnitude in (1e-320, 1e-300, 1.0, 1e300)),
    ],
)
def test_a_complex_value_has_one_magnitude(strategy: Strategy, magnitude: float, expected: list[complex]) -> None:
    after, report = normalize_arrays({"out": {"weight": np.array([3.0, -4.0j]) * magnitude}}, strategy)
    np.testing.assert_allclose(after["out"]["weight"], expected, rtol=1e-3 if magnitude == 1e-320 else 1e-15)
    assert report["out"].norm == pytest.approx(5 * magnitude)


@pytest.mark.parametrize("strategy", [Keep(), Clip(1.0), Renormalize(), ClipValue(1.0)])
def test_zero_stays_zero(strategy: Strategy) -> None:
    np.testing.assert_array_equal(one([0.0, -0.0], strategy), [0.0, -0.0])


@pytest.mark.parametrize(
    "values",
    [[3e-320, 4e-320], [3e-170, 4e-170], [1e300, 1e-300], [1.7e308, 1.7e308, 1.7e308], [5e-324]],
    ids=str,
)
def test_nothing_overflows_or_underflows_on_the_way(values: list[float]) -> None:
    exact = math.sqrt(sum((Fraction(value) / Fraction(max(values))) ** 2 for value in values))
    expected = [float(Fraction(value) / Fraction(max(values))) / exact for value in values]
    np.testing.assert_allclose(one(values, Renormalize()), expected, rtol=1e-15)


def test_a_scale_that_no_float64_holds_is_applied_in_two_steps() -> None:
    # The scale is 1e-330, and the small value must survive it.
    np.testing.assert_allclose(one([1e300, 1e50], Clip(1e-30)), [1e-30, 1e-280], rtol=1e-14)


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_the_norm_is_right_to_its_last_digits(values: list[float]) -> None:
    largest = max(abs(value) for value in values)
    assume(largest > 0)
    relative = sum((Fraction(value) / Fraction(largest)) ** 2 for value in values)
    measured = norm_of([np.array([value]) for value in values])
    exact_square = relative * Fraction(largest) ** 2
    measured_square = (Fraction(measured.mantissa) * Fraction(2) ** measured.exponent) ** 2
    assert abs(measured_square / exact_square - 1) < Fraction(1, 10**14)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_keeps_the_dtype_and_the_given_arrays(dtype: str) -> None:
    gradient = np.array([3.0, 4.0], dtype)
    after, _ = normalize_arrays({"out": {"weight": gradient}}, Clip(1.0))
    assert after["out"]["weight"].dtype == dtype
    np.testing.assert_array_equal(gradient, np.array([3.0, 4.0], dtype))
    unchanged, _ = normalize_arrays({"out": {"weight": gradient}}, Keep())
    assert not np.shares_memory(unchanged["out"]["weight"], gradient)


@pytest.mark.parametrize(
    ("on_nonfinite", "bad", "good"),
    [("keep", [np.nan, 8.0], [0.6, 0.8]), ("zero", [0.0, 0.0], [0.6, 0.8]), ("skip", [np.nan, 8.0], [3.0, 4.0])],
)
def test_a_nonfinite_layer_never_changes_another(on_nonfinite: Any, bad: list[float], good: list[float]) -> None:
    gradients = {"bad": {"weight": np.array([np.nan, 8.0])}, "good": {"weight": np.array([3.0, 4.0])}}
    after, report = normalize_arrays(gradients, Clip(1.0), on_nonfinite=on_nonfinite)
    np.testing.assert_array_equal(after["bad"]["weight"], bad)
    np.testing.assert_allclose(after["good"]["weight"], good, rtol=1e-15)
    assert report.nonfinite.tolist() == [1, 0]
    assert report["bad"].scale == (0.0 if on_nonfinite == "zero" else 1.0)


def test_raises_with_the_layers_the_parameters_and_the_counts() -> None:
    gradients = {"bad": {"weight": np.array([np.nan, np.inf, -np.inf, np.nan])}, "good": {"weight": np.ones(2)}}
    with pytest.raises(NonFiniteGradientError) as caught:
        normalize_arrays(gradients, Clip(1.0), on_nonfinite="raise")
    assert str(caught.value).startswith(
        "gradients of layer 'bad': got bad.weight: 2 NaN, 1 +inf, 1 -inf; allowed: finite"
    )
    assert caught.value.counts == {"bad.weight": (2, 1, 1)}


@pytest.mark.parametrize(
    "gradient", [[1.0], np.array([1]), np.array(["1"]), np.array([1], "complex256"), None], ids=repr
)
def test_refuses_what_is_no_array_of_floats(gradient: Any) -> None:
    with pytest.raises(
        SettingError, match=r"^normalize\(gradients\): out.weight: got an? .*float16, float32, float64, comp"
    ):
        normalize_arrays({"out": {"weight": gradient}}, Clip(1.0))


@pytest.mark.parametrize("gradients", [{}, {"out": {}}])
def test_refuses_no_gradients(gradients: dict[str, dict[str, NDArray[Any]]]) -> None:
    with pytest.raises(SettingError, match="^model: got no parameters"):
        normalize_arrays(gradients, Clip(1.0))


def test_refuses_an_unknown_choice_for_nonfinite_gradients() -> None:
    with pytest.raises(
        SettingError, match="^on_nonfinite: got 'drop'; allowed: 'keep', 'zero', 'skip_group', 'skip', 'raise'; next: "
    ):
        normalize_arrays({"out": {"weight": np.ones(2)}}, Clip(1.0), on_nonfinite="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({"weight": np.ones(2)}, r"got 'weight': a ndarray in place of a layer's dictionary.*next: put the arrays of"),
        ([np.ones(2)], r"got a list; allowed: \{layer: \{type: array\}\}"),
    ],
)
def test_refuses_gradients_that_are_not_in_layers(gradients: Any, message: str) -> None:
    with pytest.raises(SettingError, match=rf"^normalize\(gradients\): {message}"):
        normalize_arrays(gradients, Clip(1.0))


@pytest.mark.parametrize("where", ["in a layer", "without a layer"])
def test_names_the_function_for_tensors_of_pytorch(where: str) -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(2), torch.nn.Parameter(torch.ones(2))):
        gradients: Any = {"out": {"weight": tensor}} if where == "in a layer" else {"out.weight": tensor}
        with pytest.raises(SettingError, match=r"call tamegrad\.torch\.normalize_grad_, which takes a dictionary"):
            normalize_arrays(gradients, Clip(1.0))
