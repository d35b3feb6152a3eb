"""What every strategy means, in NumPy float64: the oracle of all tests, and `normalize` for NumPy arrays.

Plain rather than fast. A norm is kept as `m·2^e`, so that no finite gradient overflows or underflows on the way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tamegrad.errors import NonFiniteGradientError, SettingError
from tamegrad.groups import Layer, Parameter, check_overrides, make_plan
from tamegrad.policy import as_policy
from tamegrad.report import GroupReport, Report
from tamegrad.strategies import Clip, ClipValue, Keep, OnNonfinite, Renormalize, Strategy, check_on_nonfinite

__all__ = ["normalize"]

Array: TypeAlias = NDArray[np.inexact[Any]]
# Float64 or complex128; a complex value counts as two real ones in a norm, but has one magnitude.
Group: TypeAlias = Sequence[NDArray[Any]]

_DTYPES = ("float16", "float32", "float64", "complex64", "complex128")
_FOR_TORCH = "for tensors of PyTorch call tamegrad.torch.normalize_grad_, which takes a dictionary of gradients, too"
_SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)


def normalize(
    gradients: Mapping[str, Mapping[str, Array]], policy: object, *, on_nonfinite: OnNonfinite = "keep"
) -> tuple[dict[str, dict[str, Array]], Report[NDArray[Any]]]:
    """Normalizes gradients that are NumPy arrays; returns new arrays and leaves the given ones alone.

    Args:
        gradients: For each layer name, its parameter types and their gradients: float16, float32, float64, complex64 or
            complex128, of any shape.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        on_nonfinite: What happens to a group with NaN or infinity: `"keep"` leaves it as it is and `"zero"` makes it
            zero, while the other groups are normalized as usual; `"skip"` leaves all groups as they are, `"raise"`
            raises. `"skip_group"` is `"keep"` here, where no optimizer follows.

    Returns:
        The gradients afterwards, in their original dtypes, and the report of the step.

    Raises:
        SettingError: If a setting is unknown, a gradient is not an array of these dtypes, or there are no gradients.
        UnmatchedError: If an override matches no layer.
        NonFiniteGradientError: If a gradient is not finite under `on_nonfinite="raise"`.

    Example:
        >>> import numpy as np
        >>> from tamegrad import Clip, normalize
        >>> after, report = normalize({"out": {"weight": np.array([3.0, 0.0]), "bias": np.array([4.0])}}, Clip(1.0))
        >>> after["out"]["weight"], after["out"]["bias"]
        (array([0.6, 0. ]), array([0.8]))
        >>> report["out"].norm
        5.0
    """
    check_on_nonfinite(on_nonfinite)
    _check_nested(gradients)
    layers = [
        Layer(name, tuple(Parameter(f"{name}.{param_type}", param_type) for param_type in types))
        for name, types in gradients.items()
    ]
    checked = as_policy(policy, None, "normalize(policy)")
    plan = make_plan(layers, checked)
    check_overrides(layers, checked)
    given = [array for types in gradients.values() for array in types.values()]
    wide = [_widened(parameter.name, array) for parameter, array in zip(plan.parameters, given, strict=True)]
    counts = {parameter.name: _count_nonfinite(array) for parameter, array in zip(plan.parameters, wide, strict=True)}
    bad = {name: count for name, count in counts.items() if any(count)}
    if bad and on_nonfinite == "raise":
        raise NonFiniteGradientError(bad, plan.layers_of(bad))
    skipped = bool(bad) and on_nonfinite == "skip"

    rows, after = [], list(given)
    for group in plan.groups:
        members: Group = [wide[member] for member in group.members]
        nonfinite = sum(sum(counts[plan.parameters[member].name]) for member in group.members)
        clipped, arrays = False, members
        if nonfinite and on_nonfinite == "zero":
            arrays = [np.zeros_like(array) for array in members]
        elif not nonfinite and not skipped:
            dtypes = [given[member].dtype for member in group.members]
            arrays, clipped = _apply(group.strategy, members, dtypes)
        rows.append(_row(group.name, members, arrays, clipped=clipped, nonfinite=nonfinite))
        for member, array in zip(group.members, arrays, strict=True):
            after[member] = array.astype(given[member].dtype)
    flat = iter(after)
    result = {layer: {param_type: next(flat) for param_type in types} for layer, types in gradients.items()}
    return result, _report(rows, norm_of(wide).value, skipped=skipped)


@dataclass(frozen=True, slots=True)
class Norm:
    """A Euclidean norm, `mantissa·2^exponent`; zero, NaN and infinity have the exponent 0."""

    mantissa: float
    exponent: int

    @property
    def value(self) -> float:
        """The norm as one float64: infinite if a finite norm is past 1.8e308."""
        return _ldexp(self.mantissa, self.exponent)


def norm_of(group: Group) -> Norm:
    """Measures all values of some arrays as one vector.

    Args:
        group: Float64 or complex128 arrays of any shapes.

    Returns:
        The norm: 0 for nothing, NaN or infinite if a value is.

    Example:
        >>> norm_of([np.array([0.0]), np.array([[-4e200]])]).value
        4e+200
    """
    group = [_as_real(array) for array in group]
    largest = float(np.max([np.abs(array).max(initial=0.0) for array in group], initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return Norm(largest, 0)
    exponent = math.frexp(largest)[1]
    squares = math.fsum(float(np.square(np.ldexp(array, -exponent)).sum()) for array in group)
    return Norm(math.sqrt(squares), exponent)


def _apply(strategy: Strategy, group: Group, dtypes: Sequence[np.dtype[Any]]) -> tuple[Group, bool]:
    """Returns a finite group after its strategy (the same object if unchanged), and whether it shrank.

    A group does not grow until an element is past the largest number of its dtype.
    """
    norm = norm_of(group)
    if strategy.limit < math.inf:
        if not any((np.abs(array) > strategy.limit).any() for array in group):
            return group, False
        return [_limited(array, strategy.limit) for array in group], True
    target = _target(strategy, norm.value)
    if target > norm.value > 0:
        target = max(norm.value, min(target, _largest_norm(group, dtypes, norm)))
    if norm.value in {0.0, target}:
        return group, False
    return _rescaled(group, norm, target), target < norm.value


def _target(strategy: Strategy, norm: float) -> float:
    """The definitions: the norm that a group ends with."""
    match strategy:
        # A subclass may mean something else.
        case Keep() | ClipValue() if type(strategy) in {Keep, ClipValue}:
            return norm
        case Clip(threshold) if type(strategy) is Clip:
            return min(norm, threshold)
        case Renormalize() if type(strategy) is Renormalize:
            return 1.0
        case _:
            return _own_target(strategy, norm)


def _own_target(strategy: Strategy, norm: float) -> float:
    """Asks a user's strategy, with its settings as they were given."""
    with np.errstate(all="ignore"):
        target = float(np.reshape(strategy.target(np.array([norm]), np), ()))
    if norm > 0 and target != norm and not 0 <= target < math.inf:
        raise SettingError(
            f"{type(strategy).__name__}.target",
            got=f"{target} for a group whose norm is {norm}",
            allowed="finite norms, 0 or larger, one a group",
            advice="return the norm itself where nothing should change",
        )
    return target


def _largest_norm(group: Group, dtypes: Sequence[np.dtype[Any]], norm: Norm) -> float:
    """Returns the norm at which the first element is as large as its dtype allows; infinite if it is past 1.8e308."""
    most = math.inf
    for array, dtype in zip(group, dtypes, strict=True):
        mantissa, exponent = math.frexp(float(np.abs(_as_real(array)).max(initial=0.0)))
        if mantissa > 0:
            largest, largest_exponent = math.frexp(float(np.finfo(dtype).max))
            # Four roundings below the largest number, which float16 and float32 round away.
            part = norm.mantissa / mantissa * largest * (1 - 2.0**-50)
            most = min(most, _ldexp(part, norm.exponent + largest_exponent - exponent))
    return most


def _rescaled(group: Group, norm: Norm, target: float) -> Group:
    """Returns `target·G/‖G‖`, with one factor where a float64 can hold it."""
    scale = _ldexp(target / norm.mantissa, -norm.exponent)
    real = [_as_real(array) for array in group]
    if _SMALLEST_NORMAL <= scale < math.inf:
        scaled = [array * scale for array in real]
    else:
        scaled = [np.ldexp(array, -norm.exponent) / norm.mantissa * target for array in real]
    return [part.view(array.dtype).reshape(array.shape) for part, array in zip(scaled, group, strict=True)]


def _limited(array: NDArray[Any], threshold: float) -> NDArray[Any]:
    """Cuts magnitudes to the threshold: `sign(g)·min(t, |g|)`, where the sign of a complex value is its direction."""
    magnitudes = np.abs(array)
    over = magnitudes > threshold
    # The magnitude of a complex value may overflow float64; that of half of it never does.
    held = np.where(over, np.where(np.isinf(magnitudes), array / 2, array), 1.0)
    return np.where(over, held / np.abs(held) * threshold, array)


def _as_real(array: NDArray[Any]) -> NDArray[np.float64]:
    return np.atleast_1d(np.ascontiguousarray(array)).view(np.float64)


def _row(name: str, before: Group, after: Group, *, clipped: bool, nonfinite: int) -> GroupReport:
    norm, norm_after = norm_of(before), norm_of(after)
    if after is before:
        scale = 1.0
    elif nonfinite:
        scale = 0.0
    else:
        scale = _ldexp(norm_after.mantissa / norm.mantissa, norm_after.exponent - norm.exponent)
    return GroupReport(name, norm.value, scale, norm_after.value, clipped, nonfinite)


def _ldexp(mantissa: float, exponent: int) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.ldexp(mantissa, exponent))


def _check_nested(gradients: object) -> None:
    if isinstance(gradients, Mapping):
        wrong = next((item for item in gradients.items() if not isinstance(item[1], Mapping)), None)
        if wrong is None:
            return
        got = f"{wrong[0]!r}: a {type(wrong[1]).__name__} in place of a layer's dictionary"
    else:
        wrong, got = None, f"a {type(gradients).__name__}"
    of_torch = wrong is not None and _is_of_torch(wrong[1])
    raise SettingError(
        "normalize(gradients)",
        got=got,
        allowed="{layer: {type: array}}",
        advice=_FOR_TORCH if of_torch else 'put the arrays of each layer into a dictionary: {"out": {"weight": array}}',
    )


def _is_of_torch(value: object) -> bool:
    return any(base.__module__.partition(".")[0] == "torch" for base in type(value).__mro__)


def _widened(name: str, array: object) -> NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.dtype not in _DTYPES:
        raise SettingError(
            f"normalize(gradients): {name}",
            got=f"an array of {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}",
            allowed=f"a NumPy array of {', '.join(_DTYPES)}",
            advice=_FOR_TORCH
            if _is_of_torch(array)
            else "convert it with numpy.asarray(gradient, dtype=numpy.float32)",
        )
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _count_nonfinite(array: Array) -> tuple[int, int, int]:
    """Returns how many values are NaN, plus and minus infinity; the parts of a complex value count on their own."""
    real = _as_real(array)
    nan, plus, minus = np.isnan(real), np.isposinf(real), np.isneginf(real)
    return int(nan.sum()), int(plus.sum()), int(minus.sum())


def _report(rows: Sequence[GroupReport], total: float, *, skipped: bool) -> Report[NDArray[Any]]:
    return Report(
        groups=tuple(row.name for row in rows),
        norms=np.array([row.norm for row in rows]),
        scales=np.array([row.scale for row in rows]),
        norms_after=np.array([row.norm_after for row in rows]),
        clipped=np.array([row.clipped for row in rows]),
        nonfinite=np.array([row.nonfinite for row in rows]),
        total_norm=np.array(total),
        skipped=skipped,
    )
