"""Thousands of groups at once, of any magnitude and dtype, and what must become of each in arithmetic of 80 bits.

NumPy's `longdouble` on x86 has 64 bits of mantissa, 11 more than float64, and exponents to ±16,383: no square, sum or
product here overflows or underflows, and after some ten roundings a result is off by less than a hundredth of a spacing
of float64. What is compared is held to whole spacings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from support.contract import as_real, bits
from tamegrad import Clip, ClipValue, Keep, Per, Policy, Renormalize, Report, Strategy
from tamegrad.groups import Group, Layer, Parameter, Plan
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.memory import DTYPES
from tamegrad.torch.model.planning import PlannedModel
from tamegrad.torch.model.watch import ModuleWatch
from tamegrad.torch.settings import Settings
from tamegrad.torch.sharded.distributed import Reduction
from tamegrad.torch.step import Step

__all__ = ["IS_EXACT", "assert_all_groups_are_right"]

IS_EXACT = np.finfo(np.longdouble).nmant >= 63
# Of two tensors each; and one of the whole of a model beside them.
GROUPS, IN_MODEL, WIDTH = 4_000, 100, 4
LOSS_SCALES = [None, 65536.0, 2.0**24, None, 3.7, 2.0**-10, 8.0]
PERS: tuple[Per, ...] = get_args(Per)
# Float64 is rounded for the scale, for each of two factors, and at the end; other dtypes at the end, where a tie may
# round either way.
SPACINGS = np.array([4 if torch.finfo(dtype).bits == 64 else 1 for dtype in DTYPES])
NORM_SPACINGS = 4
# The sums of a group of many tensors are rounded more often: once a tensor.
MORE_IN_MODEL = 12
# A group that its dtype limits ends this many spacings of float64 below the limit, so that no rounding is infinite.
MARGIN = 4

INFOS = [torch.finfo(dtype) for dtype in DTYPES]
MAX, EPS = np.array([info.max for info in INFOS]), np.array([info.eps for info in INFOS])
SMALLEST = np.array([info.smallest_normal * info.eps for info in INFOS])
IS_COMPLEX = np.array([dtype.is_complex for dtype in DTYPES])

Wide = NDArray[np.longdouble]


@dataclass(frozen=True)
class Multiply(Strategy):
    """Multiplies norms by a factor."""

    factor: float
    per: Per = "layer"

    def target(self, norms: Any, xp: ModuleType) -> Any:
        # The product may be infinite, which a target must not be.
        return xp.minimum(norms * self.factor, 1e300 * xp.ones_like(norms))


KEEP, CLIP, RENORMALIZE, CLIP_VALUE, MULTIPLY = range(5)


def _strategy(kind: int, number: float, per: Per) -> Strategy:
    made: list[Callable[[], Strategy]] = [Keep, lambda: Clip(number, per), lambda: Renormalize(per)]
    made += [lambda: ClipValue(number), lambda: Multiply(number, per)]
    return made[kind]()


@dataclass
class Drawn:
    """Gradients of `WIDTH` real numbers each, in groups.

    Args:
        dtypes: `(P,)`: their dtypes, as positions in `DTYPES`.
        group_of: `(P,)`: their groups.
        kinds: `(G,)`: which strategy each group has.
        numbers: `(G,)`: its threshold or factor.
        is_tie: `(G,)`: whether a group is exactly at the threshold of a `Clip`.
        loss_scale: What gradients are multiplied by.
        tables: For each dtype the gradients of it, one a row, and their positions.
    """

    dtypes: NDArray[np.int64]
    group_of: NDArray[np.int64]
    kinds: NDArray[np.int64]
    numbers: NDArray[np.float64]
    is_tie: NDArray[np.bool_]
    loss_scale: float | None
    tables: list[tuple[NDArray[np.int64], Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, seed: int) -> "Drawn":
        """Draws gradients, strategies and a loss scale."""
        rng = np.random.default_rng(seed)
        loss_scale = LOSS_SCALES[seed % len(LOSS_SCALES)]
        group_of = np.append(np.repeat(np.arange(GROUPS), 2), np.full(IN_MODEL, GROUPS))
        # Most groups are of one dtype.
        dtypes = rng.integers(0, len(DTYPES), GROUPS + 1)[group_of]
        mixed = np.flatnonzero(rng.random(len(dtypes)) < 0.1)
        dtypes[mixed] = rng.integers(0, len(DTYPES), len(mixed))
        values = _values(rng, dtypes, group_of)

        tied = np.flatnonzero(rng.random(GROUPS) < 0.05)
        values[2 * tied] = values[2 * tied + 1] = 0.0
        # So few bits that every dtype holds them.
        units = np.ldexp(rng.integers(1, 64, len(tied)), rng.integers(-8, 2, len(tied)))
        values[2 * tied, 0], values[2 * tied + 1, 1] = 3 * units, -4 * units
        kinds, numbers = rng.integers(0, 5, GROUPS + 1), 10.0 ** rng.uniform(-300, 300, GROUPS + 1)
        drawn = cls(dtypes, group_of, kinds, numbers, np.zeros(GROUPS + 1, dtype=bool), loss_scale)
        drawn._fill(values)
        drawn._set_numbers(rng)
        drawn.kinds[tied], drawn.numbers[tied] = CLIP, 5 * units / drawn.scaled_by
        # By another loss scale than a power of two the threshold is rounded.
        drawn.is_tie[tied] = math.frexp(drawn.scaled_by)[0] == 0.5
        return drawn

    @property
    def scaled_by(self) -> float:
        """The loss scale, or 1."""
        return self.loss_scale or 1.0

    @property
    def wide(self) -> Wide:
        """`(P, WIDTH)`: the gradients as they are now."""
        wide = np.empty((len(self.dtypes), WIDTH), dtype=np.longdouble)
        for positions, table in self.tables:
            wide[positions] = as_real(table).double().reshape(-1, WIDTH).numpy()
        return wide

    @property
    def bits(self) -> list[Tensor]:
        """Copies of the bits of the gradients as they are now."""
        return [bits(table).reshape(len(table), -1).clone() for _, table in self.tables]

    def step(self, backend: Any, on_nonfinite: OnNonfinite) -> tuple[Step, Report[Tensor]]:
        """Takes the four steps, without the time it takes to plan for so many groups."""
        parameters: list[Any] = [None] * len(self.dtypes)
        for positions, table in self.tables:
            for position, gradient in zip(positions.tolist(), table.unbind(), strict=True):
                parameters[position] = nn.Parameter(torch.zeros_like(gradient))
                parameters[position].grad = gradient
        layers = tuple(Layer(f"l{k}", (Parameter(f"l{k}.weight", "weight"),)) for k in range(len(parameters)))
        pers: list[Per] = [PERS[k % len(PERS)] for k in range(GROUPS)] + ["model"]
        strategies = map(_strategy, self.kinds.tolist(), self.numbers.tolist(), pers)
        members = np.split(np.arange(len(parameters)), np.flatnonzero(np.diff(self.group_of)) + 1)
        groups = tuple(
            Group(f"g{k}", strategy, tuple(own.tolist()))
            for k, (strategy, own) in enumerate(zip(strategies, members, strict=True))
        )
        reduction = Reduction(parameters, [])
        plan = reduction.agree(parameters, lambda: (Plan(layers, groups), {}))
        planned = PlannedModel(plan, tuple(parameters), reduction, torch.device("cpu"), ModuleWatch(nn.Module()))
        step = Step(planned, Settings(Policy(), on_nonfinite=on_nonfinite, backend=backend))
        gradients = step.collect()
        scale = None if self.loss_scale is None else torch.tensor(self.loss_scale, dtype=torch.float64)
        decision, _ = step.decide(gradients, scale)
        step.apply_(gradients, decision)
        return step, step.report(decision, skipped=False)

    def _fill(self, values: NDArray[np.float64]) -> None:
        for position, dtype in enumerate(DTYPES):
            positions = np.flatnonzero(self.dtypes == position)
            wide = torch.from_numpy(values[positions])
            held = torch.where(wide.isfinite(), wide.clamp(-INFOS[position].max, INFOS[position].max), wide)
            rows = torch.view_as_complex(held.view(-1, WIDTH // 2, 2)) if dtype.is_complex else held
            self.tables.append((positions, rows.to(dtype)))

    def _set_numbers(self, rng: np.random.Generator) -> None:
        """Puts half of the thresholds close to what they are compared with, and factors where norms stay usual."""
        wide = self.wide
        squares, largest = np.zeros(GROUPS + 1, dtype=np.longdouble), np.zeros(GROUPS + 1)
        with np.errstate(all="ignore"):
            np.add.at(squares, self.group_of, np.square(wide).sum(1))
            np.maximum.at(largest, self.group_of, np.abs(wide).max(1).astype(np.float64))
            near = rng.choice([0.5, 1 - 2**-53, 1.0, 1 + 2**-52, 2.0], GROUPS + 1)
            about = np.where(self.kinds == CLIP_VALUE, largest, np.sqrt(squares)) / self.scaled_by * near
            usable = (about > 0) & (about < MAX[-1]) & (rng.random(GROUPS + 1) < 0.5)
            self.numbers = np.where(usable, about, self.numbers).astype(np.float64)
        self.numbers[self.numbers == 0] = 1.0
        factors = 10.0 ** rng.uniform(-40, 40, GROUPS + 1)
        self.numbers = np.where(self.kinds == MULTIPLY, factors, self.numbers)


def _values(rng: np.random.Generator, dtypes: NDArray[np.int64], group_of: NDArray[np.int64]) -> NDArray[np.float64]:
    """Draws numbers from the smallest to the largest of each dtype: alike in a group, or each of any magnitude."""
    shape = len(dtypes), WIDTH
    lowest, highest = np.log2(SMALLEST)[dtypes, None], np.log2(MAX)[dtypes, None]
    alike = (rng.random(GROUPS + 1) < 0.5)[group_of, None]
    share = np.where(alike, rng.random(GROUPS + 1)[group_of, None], rng.random(shape))
    powers = np.minimum(lowest + share * (highest - lowest), 1023.99)
    values: NDArray[np.float64] = np.exp2(powers) * rng.uniform(0.5, 1.0, shape) * rng.choice([-1, 1], shape)
    values[rng.random(shape) < 0.05] = 0.0
    values[(rng.random(GROUPS + 1) < 0.02)[group_of]] = 0.0
    bad = np.flatnonzero(rng.random(len(dtypes)) < 0.01)
    values[bad[:-1], 0] = rng.choice([math.nan, math.inf, -math.inf], len(bad) - 1)
    # The group of the whole model is usually finite.
    if rng.random() < 0.9:
        values[group_of == GROUPS] = np.nan_to_num(values[group_of == GROUPS], nan=1.0, posinf=1.0, neginf=1.0)
    return values


def assert_all_groups_are_right(seed: int, backend: Any) -> int:
    """Normalizes drawn gradients and compares every value and every row of the report; returns how many groups."""
    drawn = Drawn.of(seed)
    on_nonfinite: OnNonfinite = "zero" if seed % 2 else "keep"
    before, bits_before = drawn.wide, drawn.bits
    step, report = drawn.step(backend, on_nonfinite)
    with np.errstate(all="ignore"):
        check = _Check(drawn, before, report, zeroes=on_nonfinite == "zero", where=f"seed {seed}, {backend}")
        check.report()
        check.values()
    # A group that is not changed keeps its bits, and one exactly at its threshold is not changed.
    kept = (report.scales.numpy() == 1) & ~report.clipped.numpy()
    assert kept[drawn.is_tie & check.finite].all(), f"{check.where}: a group at its threshold was changed"
    for (positions, _), old, new in zip(drawn.tables, bits_before, drawn.bits, strict=True):
        same = (old == new).all(1).numpy()
        assert same[kept[drawn.group_of[positions]]].all(), f"{check.where}: the bits of a group changed"
    return len(step.plan.groups)


class _Check:
    """Compares what became of groups with what must become of them."""

    def __init__(self, drawn: Drawn, before: Wide, report: Report[Tensor], *, zeroes: bool, where: str) -> None:
        self.drawn, self.before, self.reported, self.where = drawn, before, report, where
        self.finite = np.ones(GROUPS + 1, dtype=bool)
        np.logical_and.at(self.finite, drawn.group_of, np.isfinite(before).all(1))
        self.stored = self._norms_of(before)
        self.norms = self.stored / drawn.scaled_by
        # Targets are a function of the norm as it was measured, which is held to the exact one.
        measured, numbers = report.norms.numpy(), drawn.numbers
        multiplied = np.minimum(measured * numbers, 1e300)
        ones = np.ones(GROUPS + 1)
        targets = np.choose(drawn.kinds, [measured, np.minimum(measured, numbers), ones, measured, multiplied])
        room = np.full(GROUPS + 1, np.inf, dtype=np.longdouble)
        np.minimum.at(room, drawn.group_of, MAX[drawn.dtypes] / np.abs(before).max(1))
        kept = (targets == measured) | (self.stored == 0) | ~self.finite
        self.factors = np.where(kept, 1, targets / self.norms)
        self.held = (self.factors > room * (1 - 2.0**-49)) & (targets > measured) & ~kept
        self.factors = np.where(self.held, np.maximum(np.minimum(room, self.factors), 1), self.factors)
        self.margin = MARGIN * self.held + MORE_IN_MODEL * (np.arange(GROUPS + 1) == GROUPS)
        self.factors[~self.finite] = 0.0 if zeroes else 1.0
        self.norms_after = np.where(kept | self.held, self.norms * self.factors, targets)
        self.limits = np.where(
            (drawn.kinds == CLIP_VALUE) & self.finite, numbers * np.longdouble(drawn.scaled_by), np.inf
        )

    def report(self) -> None:
        """Holds the report to exact norms."""
        report, finite = self.reported, self.finite
        np.testing.assert_array_equal(report.nonfinite.numpy() > 0, ~finite, self.where)
        self._close("norms", report.norms, self.norms, 0)
        cut = np.isfinite(self.limits)
        after = np.where(cut, self._norms_of(self._expected()) / self.drawn.scaled_by, self.norms_after)
        # Limits and what they leave are measured in the unit of the gradients.
        smallest = np.where(cut, 8 * np.longdouble(2.0**-1074) / self.drawn.scaled_by, 0)
        self._close("norms_after", report.norms_after, after, smallest)
        some = np.where(self.stored > 0, self.norms, 1)
        self._close("scales", report.scales, np.where(self.stored > 0, after / some, 1), smallest / some)

    def values(self) -> None:
        """Holds every value to the spacing of its dtype."""
        drawn, expected, after = self.drawn, self._expected(), self.drawn.wide
        spacing = np.maximum(np.abs(expected) * EPS[drawn.dtypes, None], SMALLEST[drawn.dtypes, None])
        margin = np.where(EPS[drawn.dtypes] == EPS[-1], self.margin[drawn.group_of], 0)
        allowed = (SPACINGS[drawn.dtypes] + margin)[:, None] * spacing
        # A part of a complex number that is nothing beside the other part may underflow when the number is cut.
        cut = np.where(np.isfinite(self.limits), self.limits, 0)[drawn.group_of, None]
        allowed = allowed + cut * np.longdouble(2.0**-1074)
        same = (np.abs(after - expected) <= allowed) | (after == expected) | (np.isnan(after) & np.isnan(expected))
        if not same.all():
            row, column = np.argwhere(~same)[0]
            group = drawn.group_of[row]
            raise AssertionError(
                f"{self.where}: {int((~same).sum())} values, first of group {group} (kind {drawn.kinds[group]}, "
                f"{drawn.numbers[group]!r}), {DTYPES[drawn.dtypes[row]]}: {self.before[row]} became "
                f"{after[row, column]!r} instead of {expected[row, column]!r}"
            )

    def _expected(self) -> Wide:
        drawn = self.drawn
        factors, limits = self.factors[drawn.group_of, None], self.limits[drawn.group_of, None]
        values = np.where(factors == 0, 0, self.before * factors)
        pairs = np.hypot(values[:, ::2], values[:, 1::2]).repeat(2, 1)
        magnitudes = np.where(IS_COMPLEX[drawn.dtypes, None], pairs, np.abs(values))
        return np.where(magnitudes > limits, values / magnitudes * limits, values)

    def _norms_of(self, values: Wide) -> Wide:
        squares = np.zeros(GROUPS + 1, dtype=np.longdouble)
        np.add.at(squares, self.drawn.group_of, np.square(values).sum(1))
        return np.sqrt(squares)

    def _close(self, what: str, reported: Tensor, exact: Wide, smallest: Any) -> None:
        actual, spacing = reported.numpy(), np.maximum(np.abs(exact) * 2.0**-52, 2.0**-1074)
        allowed = np.maximum((NORM_SPACINGS + self.margin) * spacing, smallest)
        # A norm, or a scale, may be past the largest float64.
        same = (np.abs(actual - exact) <= allowed) | (actual == exact.astype(np.float64))
        wrong = self.finite & ~same
        if wrong.any():
            group = int(wrong.argmax())
            raise AssertionError(
                f"{self.where}: {what} of {int(wrong.sum())} groups, first of group {group} "
                f"(kind {self.drawn.kinds[group]}, {self.drawn.numbers[group]!r}): "
                f"{actual[group]!r} instead of {exact[group]!r}"
            )
