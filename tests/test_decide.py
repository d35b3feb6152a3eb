"""`decide` is one pure function: the same on NumPy, PyTorch and JAX arrays, and right past the range of float64."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from types import ModuleType
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.contract import DECIDED, every_strategy
from support.tables import a_table
from tamegrad import Clip, ClipValue, GradientNormalization, Keep, Policy, Renormalize, SettingError, Strategy
from tamegrad.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE, Rules, decide
from tamegrad.groups import Group
from tamegrad.ranges import BIG_FACTOR
from tamegrad.strategies import OnNonfinite

GROUPS = 300


def jax_with_float64() -> Any:
    """JAX, which `make test-oldest` does not have."""
    jax = pytest.importorskip("jax")
    return jax, jax.enable_x64


@pytest.fixture(params=["torch", "jax"])
def framework(request: pytest.FixtureRequest) -> Iterator[tuple[ModuleType, Callable[[NDArray[Any]], Any]]]:
    """The namespace of a framework's arrays, and what makes one of NumPy's."""
    if request.param == "torch":
        yield torch, torch.from_numpy
        return
    jax, enable_float64 = jax_with_float64()
    with enable_float64(new_val=True):
        yield jax.numpy, jax.numpy.asarray


def groups_of(strategies: list[Strategy]) -> list[Group]:
    return [Group(f"g{index}", strategy, (index,)) for index, strategy in enumerate(strategies)]


def random_table(ranges: tuple[int, ...]) -> NDArray[np.float64]:
    """Sums in some of the three ranges, zeros among them, with some groups not finite and some cut."""
    rng = np.random.default_rng(0)
    table = np.zeros((GROUPS, COLUMNS))
    for columns in (BEFORE, AFTER):
        for column in ranges:
            table[:, columns][:, column] = np.where(rng.random(GROUPS) < 0.5, 10 ** rng.uniform(-8, 8, GROUPS), 0)
    table[::7, NONFINITE.start] = 1
    table[::5, CUT] = 3
    # A cut group has something to cut.
    table[::5, 1] += 1.0
    return table


# At the largest float64, somewhat below it, far from it, and where no element may overflow.
PEAKS = np.resize([sys.float_info.max, 1e305, 1e-5, 0.0], GROUPS)


@pytest.mark.parametrize(("loss_scale", "with_peaks"), [(None, False), (1024.0, False), (1024.0, True)])
@pytest.mark.parametrize("on_nonfinite", get_args(OnNonfinite))
@pytest.mark.parametrize("ranges", [(1,), (0, 1, 2)])
def test_decides_the_same_in_every_framework(
    ranges: tuple[int, ...], on_nonfinite: OnNonfinite, loss_scale: float | None, *, with_peaks: bool, framework: Any
) -> None:
    table = random_table(ranges)
    strategies = every_strategy()
    rules = Rules.of(groups_of([strategies[index % len(strategies)] for index in range(GROUPS)]))
    on_host = decide(
        table, rules, np, on_nonfinite=on_nonfinite, loss_scale=loss_scale, peaks=PEAKS if with_peaks else None
    )
    xp, convert = framework
    converted = rules.converted(convert)
    elsewhere = decide(
        convert(table),
        converted,
        xp,
        on_nonfinite=on_nonfinite,
        loss_scale=loss_scale,
        peaks=convert(PEAKS) if with_peaks else None,
    )
    for name in DECIDED:
        ours, theirs = getattr(on_host, name), getattr(elsewhere, name)
        if theirs is None:
            assert ours is None
            continue
        assert ours.dtype == np.asarray(theirs).dtype, name
        # Their square roots and hypotenuses may be a rounding apart, and XLA takes subnormal numbers for zero.
        np.testing.assert_allclose(ours, np.asarray(theirs), rtol=4e-15, atol=2.0**-1022, err_msg=name)


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("with_peaks", [False, True])
def test_less_is_computed_where_all_squares_are_in_the_middle_range(
    on_nonfinite: OnNonfinite, loss_scale: float | None, *, with_peaks: bool
) -> None:
    table, strategies = random_table((1,)), every_strategy()
    table[:20, 1] = 1e-90, *([0.0] * 18), 1e80
    rules = Rules.of(groups_of([strategies[index % len(strategies)] for index in range(GROUPS)]))
    peaks = PEAKS if with_peaks else None
    expected = decide(table, rules, np, on_nonfinite=on_nonfinite, loss_scale=loss_scale, peaks=peaks)
    decision = decide(
        torch.from_numpy(table),
        rules.converted(torch.from_numpy),
        torch,
        on_nonfinite=on_nonfinite,
        loss_scale=loss_scale,
        peaks=None if peaks is None else torch.from_numpy(peaks),
        middle_only=True,
    )
    for name in DECIDED:
        ours, theirs = getattr(decision, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=4e-15, atol=0, err_msg=name)


def reported_of(decision: Any) -> list[Any]:
    return [getattr(decision, name) for name in DECIDED[:6]]


def test_jax_can_compile_it() -> None:
    jax, enable_float64 = jax_with_float64()
    table = random_table((0, 1, 2))
    rules = Rules.of(groups_of([Clip(0.5 + index) for index in range(GROUPS)]))
    expected = decide(table, rules, np, on_nonfinite="zero")
    with enable_float64(new_val=True):
        converted = rules.converted(jax.numpy.asarray)
        compiled = jax.jit(lambda sums: reported_of(decide(sums, converted, jax.numpy, on_nonfinite="zero")))
        reported = compiled(jax.numpy.asarray(table))
    for ours, theirs in zip(reported, reported_of(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=4e-15, atol=2.0**-1022)


NORMS = st.floats(5e-324, 1.7e308)


@given(st.lists(st.tuples(NORMS, st.floats(5e-324, 1.7e308)), min_size=1, max_size=40))
def test_two_factors_bring_every_norm_to_its_threshold(pairs: list[tuple[float, float]]) -> None:
    norms, thresholds = map(list, zip(*pairs, strict=True))
    decision: Any = decide(a_table(norms), Rules.of(groups_of([Clip(t) for t in thresholds])), np, on_nonfinite="keep")
    for index, (norm, threshold) in enumerate(pairs):
        first, second = (1.0, 1.0) if decision.first is None else (decision.first[index], decision.second[index])
        after = norm * first * second
        if decision.clipped[index]:
            exact = Fraction(threshold)
            assert abs(Fraction(after) - exact) <= 4 * Fraction(math.ulp(threshold))
        else:
            assert (after, first, second) == (norm, 1.0, 1.0)


# Splits that lost a part, or all, when the first factor was always the unit of the range.
@pytest.mark.parametrize(
    ("norm", "threshold"),
    [(1e234, 1e-262), (1e300, 1e-300), (1e200, 1e-290), (1e160, 1e-300), (1e308, 1e-165), (1e308, 1e-175)],
)
def test_a_scale_that_no_float64_holds_is_split_evenly(norm: float, threshold: float) -> None:
    decision: Any = decide(a_table([norm]), Rules.of(groups_of([Clip(threshold)])), np, on_nonfinite="keep")
    assert norm * decision.first[0] * decision.second[0] == pytest.approx(threshold, rel=1e-15)
    # Neither factor is subnormal, so that a small value of the group survives between them.
    assert min(decision.first[0], decision.second[0]) > 2.0**-1022


def test_norms_and_targets_do_not_depend_on_the_loss_scale() -> None:
    seen = []

    @dataclass(frozen=True)
    class Watching(Strategy):
        def target(self, norms: Any, xp: ModuleType) -> Any:
            del xp
            seen.append(norms.tolist())
            return norms

    table = a_table([3.0 * 65536, 1.5e308])
    decision = decide(table, Rules.of(groups_of([Watching()] * 2)), np, on_nonfinite="keep", loss_scale=65536.0)
    assert seen == [[3.0, pytest.approx(1.5e308 / 65536)]]
    assert decision.norms.tolist() == seen[0]


def test_a_norm_that_only_the_loss_scale_puts_past_float64_is_reported() -> None:
    table = np.zeros((1, COLUMNS))
    table[0, 2] = 4 * (1.7e308 * BIG_FACTOR) ** 2
    rules = Rules.of(groups_of([Keep()]))
    assert decide(table, rules, np, on_nonfinite="keep").norms.tolist() == [math.inf]
    scaled = decide(table, rules, np, on_nonfinite="keep", loss_scale=8.0)
    assert scaled.norms.tolist() == [pytest.approx(1.7e308 / 4)]
    assert scaled.total_norm == scaled.norms[0]


def test_a_group_grows_until_its_largest_element_is_at_the_limit() -> None:
    # The largest element of the second is half of what its dtype holds.
    peaks = np.array([0.0, sys.float_info.max / 2, sys.float_info.max])
    decision: Any = decide(
        a_table([0.1] * 3), Rules.of(groups_of([Renormalize()] * 3)), np, on_nonfinite="keep", peaks=peaks
    )
    assert decision.norms_after.tolist() == [1.0, pytest.approx(0.2, rel=1e-15), 0.1]
    assert decision.changed.tolist() == [True, True, False]
    assert decision.reach(2.0).tolist() == [2.0, pytest.approx(0.4), 0.0]


@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
def test_a_strategy_says_what_norms_grow_to(strategy: Strategy) -> None:
    norms = np.array([1e-300, 1e-3, 0.5, 1.0, 3.0, 1e300])
    after = Rules.of(groups_of([strategy] * len(norms))).targets(norms, np)
    assert (after[after > norms] <= strategy.grows_to).all()


@dataclass(frozen=True)
class Counting(Strategy):
    """Halves norms above a threshold, in one of two ways, and counts the calls."""

    threshold: float
    way: str = "a"
    calls: ClassVar[list[int]] = []

    def target(self, norms: Any, xp: ModuleType) -> Any:
        self.calls.append(len(norms))
        return xp.where(norms > self.threshold, norms / 2, norms)


def test_ten_thousand_thresholds_take_one_call() -> None:
    Counting.calls.clear()
    rules = Rules.of(groups_of([Counting(0.5 + index % 2, "b" if index == 7 else "a") for index in range(10_000)]))
    decision = decide(a_table([1.0] * 10_000), rules, np, on_nonfinite="keep")
    # Instances that differ in more than a number are called on their own.
    assert Counting.calls == [10_000, 10_000]
    assert decision.norms_after.tolist() == [0.5, 1.0] * 5_000


@dataclass(frozen=True)
class Optional(Strategy):
    """Limits norms where it has thresholds, of which the first is annotated as many people would."""

    first: float = None  # type: ignore[assignment]
    second: float | None = None

    def target(self, norms: Any, xp: ModuleType) -> Any:
        for threshold in (self.first, self.second):
            norms = norms if threshold is None else xp.minimum(norms, threshold)
        return norms


def test_a_number_may_be_left_out() -> None:
    rules = Rules.of(groups_of([Optional(), Optional(2.0), Optional(1), Optional(second=0.5), Optional(3.0, 0.25)]))
    table, wanted = a_table([5.0] * 5), [5.0, 2.0, 1.0, 0.5, 0.25]
    assert decide(table, rules, np, on_nonfinite="keep").norms_after.tolist() == wanted
    rules, on_torch = rules.converted(torch.from_numpy), torch.from_numpy(table)
    assert decide(on_torch, rules, torch, on_nonfinite="keep").norms_after.tolist() == wanted


@dataclass(frozen=True)
class Returning(Strategy):
    """Returns a number for every group."""

    returned: float

    def target(self, norms: Any, xp: ModuleType) -> Any:
        del xp
        return 0 * norms + self.returned


@dataclass(frozen=True)
class Shaped(Strategy):
    """Returns an array of a shape, or something else altogether."""

    shape: tuple[int, ...] | None

    def target(self, norms: Any, xp: ModuleType) -> Any:
        return None if self.shape is None else xp.ones(self.shape, dtype=norms.dtype)


@pytest.mark.parametrize("wrong", [math.nan, -1.0, math.inf, -math.inf])
def test_a_target_that_cannot_be_used_is_an_error_on_the_host(wrong: float) -> None:
    rules = Rules.of(groups_of([Returning(2.0), Returning(wrong)]))
    message = (
        rf"^Returning.target: got {wrong} for the group 'g1', whose norm is 5.0; allowed: finite norms, 0 or larger"
    )
    with pytest.raises(SettingError, match=message):
        decide(a_table([5.0, 5.0]), rules, np, on_nonfinite="keep")


@pytest.mark.parametrize("wrong", [math.nan, -1.0, math.inf, -math.inf])
def test_a_target_that_cannot_be_used_leaves_the_group_alone_on_a_device(wrong: float) -> None:
    rules = Rules.of(groups_of([Returning(2.0), Returning(wrong)])).converted(torch.from_numpy)
    decision = decide(torch.from_numpy(a_table([5.0, 5.0])), rules, torch, on_nonfinite="keep")
    assert decision.scales[0] == 0.4
    assert decision.scales[1].isnan()
    assert decision.norms_after.tolist() == [2.0, 5.0]
    assert decision.changed.tolist() == [True, False]


@pytest.mark.parametrize("wrong", [math.nan, -1.0])
def test_what_is_returned_for_groups_that_are_zero_or_not_finite_is_ignored(wrong: float) -> None:
    table = a_table([0.0, 5.0])
    table[1, NONFINITE.start] = 1.0
    decision = decide(table, Rules.of(groups_of([Returning(wrong)] * 2)), np, on_nonfinite="keep")
    assert decision.scales.tolist() == [1.0, 1.0]
    assert not decision.changed.any()


@pytest.mark.parametrize(
    ("shape", "named"),
    [((3,), r"an array of shape \(3,\)"), ((2, 1), r"an array of shape \(2, 1\)"), (None, "a NoneType")],
)
def test_targets_of_another_shape_are_an_error_everywhere(shape: tuple[int, ...] | None, named: str) -> None:
    rules = Rules.of(groups_of([Shaped(shape)] * 2))
    for table, converted, xp in (
        (a_table([1.0, 1.0]), rules, np),
        (torch.from_numpy(a_table([1.0, 1.0])), rules.converted(torch.from_numpy), torch),
    ):
        with pytest.raises(SettingError, match=f"^Shaped.target: got {named}; .*next: return one target a group"):
            decide(table, converted, xp, on_nonfinite="keep")


def test_settings_that_are_floats_are_arrays_whatever_their_number() -> None:
    for count in (1, 3):
        rules = Rules.of(groups_of([Clip(2.0)] * count))
        ((strategy, governed),) = rules.strategies
        assert governed is None
        assert isinstance(strategy, Clip)
        assert np.asarray(strategy.threshold).tolist() == [2.0] * count


@dataclass
class Mutable(Strategy):
    """Can be changed after its plan was made."""


class Undecorated(Clip):
    """Has no fields of its own."""


@dataclass(frozen=True)
class WithAList(Strategy):
    """Cannot be hashed."""

    steps: Any = field(default_factory=list)


@dataclass(frozen=True)
class WithUnknownPer(Strategy):
    """Groups by something that does not exist."""

    per: Any = "planet"


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Mutable(), "got a Mutable, which is no frozen dataclass of its own, .*next: write @dataclass"),
        (Undecorated(1.0), "got a Undecorated, which is no frozen dataclass of its own"),
        (WithAList(), "or has a field that cannot be hashed; .*use tuples instead of lists"),
        (WithUnknownPer(), r"^WithUnknownPer\(per\): got 'planet'"),
    ],
)
def test_refuses_strategies_that_a_plan_cannot_rely_on(strategy: Strategy, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Policy(strategy)


def test_built_in_strategies_are_strategies() -> None:
    assert all(isinstance(member(0.5), Strategy) for member in GradientNormalization)
    assert ClipValue(0.5).limit == 0.5
    assert Clip(0.5).limit == Renormalize().limit == math.inf
