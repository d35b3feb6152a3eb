"""The GPU backend's fused kernel decides what the core decides, and only on strategies whose meaning it knows."""

import itertools
import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from support.contract import DECIDED, NORM_TOLERANCE, paired
from support.gradients import model_with
from support.interpreted import MARKS, patched_once
from support.tables import a_table
from tamegrad import Clip, ClipValue, Keep, Renormalize
from tamegrad.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE, Decision, Rules, decide
from tamegrad.groups import Group, Layer, Parameter, Plan
from tamegrad.ranges import BIG_FACTOR
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.backends import gpu
from tamegrad.torch.backends.gpu import GpuBackend
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.memory import Memory

__all__ = ["patched_once"]

pytestmark = MARKS

SPACING = 2.0**-52


def plan_of(strategies: list[Strategy]) -> Plan:
    layers = [
        Layer(f"layer{index}", (Parameter(f"layer{index}.weight", "weight"),)) for index in range(len(strategies))
    ]
    groups = [
        Group(layer.name, strategy, (i,)) for i, (layer, strategy) in enumerate(zip(layers, strategies, strict=True))
    ]
    return Plan(tuple(layers), tuple(groups))


def assert_decided_as_in_the_core(
    table: NDArray[np.float64],
    strategies: list[Strategy],
    on_nonfinite: OnNonfinite = "keep",
    *,
    loss_scale: Tensor | None = None,
    total: NDArray[np.float64] | None = None,
    peaks: NDArray[np.float64] | None = None,
    spacings: int = 0,
) -> Decision[Tensor]:
    plan = plan_of(strategies)
    expected = decide(
        table,
        Rules.of(plan.groups),
        np,
        on_nonfinite=on_nonfinite,
        loss_scale=None if loss_scale is None else loss_scale.item(),
        total=total,
        peaks=peaks,
    )
    steps = torch.full((len(table),), 5)
    actual = GpuBackend(plan, [True] * len(strategies)).decide(
        torch.from_numpy(table),
        on_nonfinite=on_nonfinite,
        nonfinite_steps=steps,
        loss_scale=loss_scale,
        total=None if total is None else torch.from_numpy(total),
        peaks=None if peaks is None else torch.from_numpy(peaks),
    )
    assert steps.tolist() == (5 + (expected.nonfinite > 0)).tolist()
    for name in DECIDED:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        if theirs is None:
            assert ours is None, name
            continue
        assert isinstance(ours, Tensor)
        assert ours.numpy().dtype == theirs.dtype, name
        # The total norm is of sums over groups, which NumPy adds up in another order.
        allowed = NORM_TOLERANCE if name == "total_norm" and total is None else spacings * SPACING
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=allowed, atol=0, err_msg=name)
    return actual


def random_table(groups: int, ranges: tuple[int, ...]) -> NDArray[np.float64]:
    """Sums in some of the three ranges, zeros among them, with some groups not finite and some cut."""
    rng = np.random.default_rng(groups)
    table = np.zeros((groups, COLUMNS))
    for columns in (BEFORE, AFTER):
        for column in ranges:
            table[:, columns][:, column] = np.where(rng.random(groups) < 0.6, 10 ** rng.uniform(-8, 8, groups), 0)
    table[:, NONFINITE] = rng.random((groups, 3)) < 0.05
    table[:, CUT] = np.where(rng.random(groups) < 0.3, 3.0, 0.0)
    # A group has something to cut.
    table[:, BEFORE][:, ranges[0]] += table[:, CUT]
    return table


def random_strategies(groups: int) -> list[Strategy]:
    rng = np.random.default_rng(1)
    kinds = [Keep, Renormalize, lambda: Clip(10 ** rng.uniform(-4, 4)), lambda: ClipValue(10 ** rng.uniform(-4, 4))]
    return [kinds[kind]() for kind in rng.integers(0, len(kinds), groups)]


# Any four in a row have every loss scale and both choices.
SCALED_BY = [None, torch.tensor(1024.0), torch.tensor(3.7, dtype=torch.float64), torch.tensor(96.0).bfloat16()]
CHOICES: list[OnNonfinite] = ["keep", "zero", "keep", "zero"]
SETTINGS = [*zip(SCALED_BY, CHOICES, strict=True), *zip(SCALED_BY, reversed(CHOICES), strict=True)]


@pytest.mark.parametrize(
    ("groups", "ranges", "settings"),
    paired([1, 63, 64, 65, 127, 128, 129, 1000], [(0,), (1,), (0, 1), (0, 1, 2)], SETTINGS),
    ids=str,
)
def test_decides_as_the_core_does(
    groups: int, ranges: tuple[int, ...], settings: tuple[Tensor | None, OnNonfinite]
) -> None:
    loss_scale, on_nonfinite = settings
    # One range is rounded as in the core. The root of two ranges is NumPy's `hypot` there, and one rounding here; what
    # is divided by it may be another spacing away.
    assert_decided_as_in_the_core(
        random_table(groups, ranges),
        random_strategies(groups),
        on_nonfinite,
        loss_scale=loss_scale,
        spacings=0 if len(ranges) == 1 else 2,
    )


@pytest.mark.parametrize("loss_scale", [None, torch.tensor(2.0**24)], ids=str)
@pytest.mark.parametrize("ranges", [(0,), (1,), (0, 1, 2)], ids=str)
def test_decides_as_the_core_does_where_elements_would_overflow(
    ranges: tuple[int, ...], loss_scale: Tensor | None
) -> None:
    table = random_table(300, ranges)
    rng = np.random.default_rng(2)
    # Some just at the largest float64, some far from it, some without any element that may overflow.
    peaks = np.where(rng.random(300) < 0.8, sys.float_info.max * 10 ** rng.choice([0.0, -0.5, -2.0, -630.0], 300), 0)
    strategies: list[Strategy] = [Renormalize()] * 300
    decision = assert_decided_as_in_the_core(table, strategies, loss_scale=loss_scale, peaks=peaks, spacings=2)
    grown = (decision.norms_after > decision.norms) & (decision.norms_after < 1.0)
    assert grown.any()
    assert (decision.norms_after == 1.0).any()


NORMS = [0.0, 5e-324, 1e-310, 2.3e-308, 1e-300, 1e-160, 1e-150, 0.3, 1.0, 7.0, 1e150, 1e300, 1.7e308]
THRESHOLDS = [
    5e-324,
    1.5e-323,
    1e-310,
    2.2250738585072014e-308,
    1e-300,
    1e-160,
    0.7,
    1.0,
    1e160,
    1e300,
    1.7e308,
    math.inf,
]


@pytest.mark.parametrize("loss_scale", [None, torch.tensor(2.0**16), torch.tensor(1e-5)], ids=str)
def test_decides_as_the_core_does_on_extreme_norms_and_targets(loss_scale: Tensor | None) -> None:
    strategies: list[Strategy] = [*map(Clip, THRESHOLDS), Renormalize(), Keep()]
    norms, chosen = zip(*itertools.product(NORMS, strategies), strict=True)
    assert_decided_as_in_the_core(a_table(list(norms)), list(chosen), loss_scale=loss_scale)


def test_decides_as_the_core_does_at_the_edges_of_what_can_be_measured() -> None:
    # Of each range nothing, the smallest and nearly the largest square, something between, and what is not finite.
    small = [0.0, 2.0**-1074, 2.0**-500, 2.0**52]
    middle = [0.0, 2.0**-1022, 2.0**-1021, 4.0, 2.0**972, math.inf, math.nan]
    big = [0.0, 2.0**-104, 1.7, 2.0**960, math.inf]
    sums = np.array(list(itertools.product(big, middle, small)))[:, ::-1]
    # A norm of exactly 2 is left alone.
    strategies = [Clip(1e-300), Clip(2.0), Clip(1e300), Renormalize(), Keep(), ClipValue(0.5)]
    chosen = strategies * len(sums)
    table = np.zeros((len(chosen), COLUMNS))
    table[:, BEFORE] = np.repeat(sums, len(strategies), 0)
    # Cutting makes a norm smaller, and the sums are in ascending order.
    table[len(strategies) :, AFTER] = np.nan_to_num(table[: -len(strategies), BEFORE], posinf=0.0)
    table[:, NONFINITE.start] = ~np.isfinite(table[:, BEFORE]).all(1)
    table[len(strategies) - 1 :: len(strategies), CUT] = 2.0
    table[: len(strategies), CUT] = 0.0
    assert_decided_as_in_the_core(table, chosen, "zero", spacings=3)
    finite = table[:, NONFINITE.start] == 0
    kept = [strategy for strategy, chosen_ in zip(chosen, finite, strict=True) if chosen_]
    decision = assert_decided_as_in_the_core(table[finite], kept, "keep", spacings=3)
    assert decision.total_norm.isfinite()


@pytest.mark.parametrize("loss_scale", [None, torch.tensor(8.0)], ids=str)
def test_the_total_norm_of_a_pipeline_is_that_of_all_stages(loss_scale: Tensor | None) -> None:
    total = np.zeros(COLUMNS)
    # Only the loss scale takes this norm past what a float64 holds.
    total[2] = 4 * (1.7e308 * BIG_FACTOR) ** 2
    decision = assert_decided_as_in_the_core(
        random_table(130, (1,)), random_strategies(130), loss_scale=loss_scale, total=total
    )
    assert decision.total_norm.item() == (math.inf if loss_scale is None else pytest.approx(1.7e308 / 4))


def test_limits_and_zeroed_are_there_only_if_something_may_need_them() -> None:
    table = random_table(3, (1,))
    plain = assert_decided_as_in_the_core(table, [Clip(1.0)] * 3)
    assert (plain.limits, plain.zeroed) == (None, None)
    both = assert_decided_as_in_the_core(table, [ClipValue(1.0)] * 3, "zero")
    assert both.limits is not None
    assert both.zeroed is not None


@dataclass(frozen=True)
class Halve(Strategy):
    """Halves norms."""

    per: Any = "layer"

    def target(self, norms: Any, xp: ModuleType) -> Any:
        del xp
        return norms / 2


@dataclass(frozen=True)
class HalvedClip(Clip):
    """A subclass of a built-in strategy with another meaning."""

    def target(self, norms: Any, xp: ModuleType) -> Any:
        return xp.minimum(norms, self.threshold / 2)


@pytest.mark.parametrize("loss_scale", [None, torch.tensor(64.0)], ids=str)
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize(("strategy", "target"), [(Halve("tensor"), 2.5), (HalvedClip(3.0, "tensor"), 1.5)], ids=str)
def test_strategies_of_users_take_plain_operations(
    strategy: Strategy,
    target: float,
    on_nonfinite: OnNonfinite,
    loss_scale: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "decide_groups", None)
    scale = 1.0 if loss_scale is None else loss_scale.item()
    good, bad = torch.tensor([3.0, -4.0]) * scale, torch.tensor([math.nan, 1.0])
    model = model_with([good, bad])
    report = GradientNormalizer(model, strategy, on_nonfinite=on_nonfinite, backend="gpu")._normalize(loss_scale)
    assert report.norms[0] == 5.0
    assert report.norms_after[0] == target
    assert report.nonfinite.tolist() == [0, 1]
    torch.testing.assert_close(good, torch.tensor([3.0, -4.0]) * (target / 5 * scale))
    assert bad.equal(torch.zeros(2)) if on_nonfinite == "zero" else bad[1] == 1.0


def test_the_core_decides_where_there_is_no_gradient_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "decide_groups", None)
    backend = GpuBackend(plan_of([Clip(1.0)]), [True])
    table = backend.measure(Gradients([None], Memory.of([]).scattered(np.zeros(0, np.int64), 1)), None)
    decision = backend.decide(
        table, on_nonfinite="keep", nonfinite_steps=torch.zeros(1, dtype=torch.int64), loss_scale=None, total=None
    )
    assert decision.norms.tolist() == [0]
