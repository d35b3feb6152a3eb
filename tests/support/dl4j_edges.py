"""Synthetic gradients (`edges-*`): what Deeplearning4j gets wrong, and what tamegrad must return instead.

Neither is computed with tamegrad: the first follows from the data, the second from the definitions of the strategies.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.dl4j import GRADIENT_TOLERANCE, Array, Arrays, Case, edge_cases, relative_error, same_bits
from tamegrad import GroupReport

RENORMALIZE = ("RenormalizeL2PerLayer", "RenormalizeL2PerParamType")
CLIP_L2 = ("ClipL2PerLayer", "ClipL2PerParamType")
CLIP_VALUE = "ClipElementWiseAbsoluteValue"

# Where tamegrad differs on purpose; for every other pair of fill and strategy it agrees.
DIFFERENT = {
    "tiny": RENORMALIZE,
    "huge": (*RENORMALIZE, *CLIP_L2),
    "nan": RENORMALIZE,
    "infinite": (*RENORMALIZE, *CLIP_L2, CLIP_VALUE),
}
# Deeplearning4j replaces a norm of 0 or NaN by this before it divides.
REPLACED_NORM = 1e-5
# The allowed error of a value, in spacings of its dtype: tamegrad computes in float64 and rounds once to float32; in
# float64 the norm, the scale and the product are each rounded.
SPACINGS = {"float32": 1, "float64": 4}
# The allowed relative error of a float64 number in a report.
ROUNDED = 1e-15


def differs(case: Case) -> bool:
    return case.default.strategy in DIFFERENT.get(case.fill, ())


ALIKE = [case for case in edge_cases() if not differs(case)]
UNLIKE = [case for case in edge_cases() if differs(case)]


@dataclass(frozen=True)
class EdgeGroup:
    """One group of an edge case: a layer, or one parameter type of it."""

    layer: str
    param_type: str | None
    before: dict[str, Array]
    after: dict[str, Array]

    @property
    def wide(self) -> NDArray[np.float64]:
        """All values before, in float64."""
        return flat(self.before).astype(np.float64)

    @property
    def nonfinite(self) -> int:
        return int(np.count_nonzero(~np.isfinite(self.wide)))


def edge_groups(case: Case) -> Iterator[EdgeGroup]:
    before, after = case.before, case.after
    for layer in case.layers:
        if layer.strategy.endswith("PerParamType"):
            for kind in layer.shapes:
                yield EdgeGroup(layer.name, kind, {kind: before[layer.name][kind]}, {kind: after[layer.name][kind]})
        else:
            yield EdgeGroup(layer.name, None, before[layer.name], after[layer.name])


def flat(arrays: dict[str, Array]) -> Array:
    return np.concatenate([array.ravel() for array in arrays.values()])


def assert_deeplearning4j_is_wrong_as_told(case: Case) -> None:
    """Asserts that Deeplearning4j's result is the documented wrong one, in a case where tamegrad differs."""
    for group in edge_groups(case):
        error = relative_error(flat(group.after), _documented_result(case, group))
        where = f"{case.label}: {group.layer}/{group.param_type or '*'}"
        assert error <= GRADIENT_TOLERANCE[case.dtype], f"{where}: relative error {error:.3g}"


def _documented_result(case: Case, group: EdgeGroup) -> NDArray[np.float64]:
    """Returns Deeplearning4j's result for a group where tamegrad differs, as the description of the data has it."""
    wide, threshold = group.wide, case.layers[0].threshold
    match case.fill:
        case "tiny":  # the norm underflows to 0
            return wide / REPLACED_NORM
        case "huge":  # the norm overflows to infinity
            return np.zeros_like(wide)
        case "nan" if group.nonfinite:
            return wide / REPLACED_NORM
        case "infinite" if group.nonfinite and case.default.strategy == CLIP_VALUE:
            return np.clip(wide, -threshold, threshold)
        case "infinite" if group.nonfinite:  # infinity / infinity, and everything else / infinity
            return np.where(np.isinf(wide), np.nan, 0.0)
    return expected_of_tamegrad(case, group).astype(np.float64)  # beside a non-finite group: both are right


def expected_of_tamegrad(case: Case, group: EdgeGroup) -> Array:
    """Returns the expected values of a group, from the definitions alone, flattened, in their dtype."""
    given, wide, target = flat(group.before), group.wide, _target(case)
    if group.nonfinite:
        return given
    if case.default.strategy == CLIP_VALUE:
        return np.clip(given, -case.layers[0].threshold, case.layers[0].threshold)
    norm, direction = _norm_and_direction(wide)
    if target is None or norm == 0 or (case.default.strategy in CLIP_L2 and norm <= target):
        return given
    return np.asarray(direction * target, dtype=case.dtype)


def _target(case: Case) -> float | None:
    """Returns the norm that a group must have, or the largest it may have."""
    if case.default.strategy in RENORMALIZE:
        return 1.0
    return case.layers[0].threshold if case.default.strategy in CLIP_L2 else None


def _norm_and_direction(wide: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    # Dividing by the largest value first keeps all squares in the range of float64.
    largest = float(np.abs(wide).max())
    if largest == 0:
        return 0.0, wide
    length = float(np.linalg.norm(wide / largest))
    return largest * length, wide / largest / length


def assert_as_deeplearning4j(case: Case, actual: Arrays) -> None:
    """Asserts that tamegrad's result is Deeplearning4j's: to the bit if nothing changed, else up to rounding."""
    for group in edge_groups(case):
        got, expected = _of(group, actual), flat(group.after)
        where = f"{case.label}: {group.layer}/{group.param_type or '*'}"
        if same_bits(flat(group.before), expected):
            assert same_bits(got, expected), f"{where}: not the same bits"
        assert relative_error(got, expected) <= _spacing(case), f"{where}: {got[got != expected]}"


def assert_as_defined(case: Case, actual: Arrays, row_of: Callable[[EdgeGroup], GroupReport]) -> None:
    """Asserts that every group and its row of the report follow the definitions and `on_nonfinite="keep"`."""
    for group in edge_groups(case):
        got, expected, row = _of(group, actual), expected_of_tamegrad(case, group), row_of(group)
        where = f"{case.label}: {group.layer}/{group.param_type or '*'}"
        assert row.nonfinite == group.nonfinite, f"{where}: {row}"
        if same_bits(flat(group.before), expected):
            assert same_bits(got, expected), f"{where}: changed"
            assert (row.scale, row.clipped) == (1.0, False), f"{where}: {row}"
            continue
        assert relative_error(got, expected) <= _spacing(case), f"{where}: {got[got != expected]}"
        norm, _ = _norm_and_direction(group.wide)
        norm_after, _ = _norm_and_direction(got.astype(np.float64))
        target = _target(case)
        assert target is None or abs(row.norm_after / target - 1) <= ROUNDED, f"{where}: {row}"
        assert abs(norm_after / row.norm_after - 1) <= _spacing(case), f"{where}: norm {norm_after!r}, {row}"
        assert abs(row.norm / norm - 1) <= ROUNDED, f"{where}: {row}"
        assert abs(row.scale / (row.norm_after / norm) - 1) <= ROUNDED, f"{where}: {row}"
        assert row.clipped is (norm_after < norm), f"{where}: {row}"


def mixed(nonfinite_fill: str, dtype: str) -> Arrays:
    """Returns one layer with a non-finite value, one with huge and one with tiny values."""
    fills = {"first": nonfinite_fill, "second": "huge", "out": "tiny"}
    kept = {case.fill: case.before for case in edge_cases() if (case.dtype, case.default.strategy) == (dtype, "None")}
    return {layer: kept[fill][layer] for layer, fill in fills.items()}


def assert_finite_layers_are_renormalized(before: Arrays, actual: Arrays) -> None:
    """Asserts, for `mixed`, that the first layer kept its bits, and the others their directions, with norm 1."""
    assert same_bits(flat(actual["first"]), flat(before["first"])), "the non-finite layer changed"
    for layer in ("second", "out"):
        got = flat(actual[layer])
        _, direction = _norm_and_direction(flat(before[layer]).astype(np.float64))
        error = relative_error(got, direction.astype(got.dtype))
        assert error <= SPACINGS[str(got.dtype)] * np.finfo(got.dtype.name).eps, f"{layer}: relative error {error:.3g}"


def _of(group: EdgeGroup, arrays: Arrays) -> Array:
    return flat({kind: arrays[group.layer][kind] for kind in group.before})


def _spacing(case: Case) -> float:
    return SPACINGS[case.dtype] * float(np.finfo(case.dtype).eps)
