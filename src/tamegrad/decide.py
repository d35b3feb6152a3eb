"""The step between measuring and applying: one pure function on one small table, for NumPy, PyTorch and JAX arrays.

`G` is the number of groups. Backends measure a `(G, COLUMNS)` float64 table of sums, which add up over tensors, devices
and ranks. Squares are summed in three ranges (`tamegrad.ranges`), so that no finite float64 overflows or underflows;
those of float32 and smaller dtypes all fit the middle range.

`xp` is the namespace of the arrays: `numpy`, `torch` or `jax.numpy`.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from tamegrad.errors import SettingError
from tamegrad.groups import Group
from tamegrad.ranges import FORMATS, LARGEST_EXPONENT, ldexp, norms_of
from tamegrad.strategies import AnyArray, OnNonfinite, Strategy

__all__ = [
    "AFTER",
    "BEFORE",
    "COLUMNS",
    "CUT",
    "FULL",
    "LARGEST_ANYWHERE",
    "NONFINITE",
    "Decision",
    "Rules",
    "decide",
    "may_overflow",
]

# Columns of the table: sums of squares before (small, middle, big), counts of NaN, +inf and -inf, and for groups with a
# limit on elements the sums of squares after (small, middle, big) and how many values, or blocks of them, are cut.
BEFORE, NONFINITE, AFTER, CUT = slice(0, 3), slice(3, 6), slice(6, 9), 9
COLUMNS = 10
# The columns that are zero where a group is finite and no element of it is cut.
CHANGES = (3, 4, 5, 9)

# The largest number of float16: up to here no dtype overflows.
LARGEST_ANYWHERE = 65504.0
# What an element may become where it has to be limited, as a part of the largest number of its dtype. Products of
# float64 round to that number from here, and none is infinite.
FULL = 1 - 2.0**-50


ArrayT = TypeVar("ArrayT")


@dataclass(frozen=True)
class Rules(Generic[ArrayT]):
    """The strategies of a plan, each class once, with its settings as arrays.

    Args:
        groups: The names of the groups, for messages.
        strategies: For each strategy class an instance whose float fields are `(G,)` float64 arrays, and a `(G,)` bool
            array of the groups that it governs; None if it governs all.
        limits: `(G,)` float64: the largest magnitude of an element; infinity where there is no limit.
        has_limits: Whether any limit is finite.
        grows_to: The largest norm that a strategy may give a group whose norm is smaller.
    """

    groups: tuple[str, ...]
    strategies: tuple[tuple[Strategy, ArrayT | None], ...]
    limits: ArrayT
    has_limits: bool
    grows_to: float

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "Rules[NDArray[Any]]":
        """Returns the rules of a plan's groups, as NumPy arrays."""
        members: dict[Hashable, list[int]] = {}
        limits = np.array([group.strategy.limit for group in groups])
        for index in np.flatnonzero(np.isinf(limits)).tolist():
            members.setdefault(_callable_together(groups[index].strategy), []).append(index)
        strategies = []
        for indices in members.values():
            governed = np.zeros(len(groups), dtype=np.bool_)
            governed[indices] = True
            stacked = _stacked([groups[index].strategy for index in indices], governed)
            strategies.append((stacked, None if governed.all() else governed))
        names = tuple(group.name for group in groups)
        grows_to = max((groups[index].strategy.grows_to for index in itertools.chain(*members.values())), default=0.0)
        return Rules(names, tuple(strategies), limits, bool(np.isfinite(limits).any()), grows_to)

    def converted(self, convert: Callable[[Any], Any]) -> "Rules[Any]":
        """Returns the rules with every array converted, to another framework or a device."""
        strategies = []
        for strategy, governed in self.strategies:
            arrays = {name: convert(value) for name, value in _floats(strategy).items()}
            strategies.append((_replaced(strategy, arrays), None if governed is None else convert(governed)))
        return Rules(self.groups, tuple(strategies), convert(self.limits), self.has_limits, self.grows_to)

    def targets(self, norms: AnyArray, xp: ModuleType) -> AnyArray:
        """Returns the norms that groups should end with; one call a strategy class.

        Args:
            norms: `(G,)` float64, the norms before.
            xp: Their namespace.

        Returns:
            `(G,)` targets; equal to the norms where elements are limited instead.

        Raises:
            SettingError: If a strategy returns an array of another shape.
        """
        targets = norms
        for strategy, governed in self.strategies:
            own = strategy.target(norms, xp)
            if getattr(own, "shape", None) != norms.shape:
                given = f"an array of shape {tuple(own.shape)}" if hasattr(own, "shape") else f"a {type(own).__name__}"
                raise _target_error(strategy, given, "return one target a group: an array like `norms`")
            targets = own if governed is None else xp.where(governed, own, targets)
        return targets


@dataclass(slots=True, eq=False)
class Decision(Generic[ArrayT]):
    """What happens to every group, as `(G,)` arrays; the first six go into the report.

    A gradient `g` of the group becomes `g·first·second`, then at most `limit` in magnitude, or 0 where `zeroed`. There
    are two factors because one float64 cannot hold the scale of every float64 group; elsewhere the first is 1. `limits`
    is None if no strategy limits elements, `zeroed` unless `on_nonfinite="zero"`, and the factors if the host knows
    that no group changes.
    """

    norms: ArrayT
    scales: ArrayT
    norms_after: ArrayT
    clipped: ArrayT
    nonfinite: ArrayT
    total_norm: ArrayT
    first: ArrayT | None
    second: ArrayT | None
    limits: ArrayT | None
    zeroed: ArrayT | None

    @property
    def changed(self) -> AnyArray:
        """Whether a group's values change at all; `(G,)` bool."""
        decision: Any = self
        if decision.first is None:
            return decision.clipped & False
        changed = (decision.first != 1) | (decision.second != 1)
        if decision.limits is not None:
            changed = changed | (decision.limits < math.inf)
        return changed if decision.zeroed is None else changed | decision.zeroed

    def reach(self, loss_scale: float | AnyArray | None) -> AnyArray:
        """Returns the largest magnitude that an element may have afterwards in groups that grow, else 0; `(G,)`.

        Args:
            loss_scale: As in `decide`: elements are multiplied by it, norms are not.
        """
        decision: Any = self
        with np.errstate(all="ignore"):
            stored = decision.norms_after if loss_scale is None else decision.norms_after * loss_scale
            # No element is larger than the norm. Where that is infinite or NaN, no group grows.
            return stored * (decision.norms_after > decision.norms)


def decide(
    table: AnyArray,
    rules: Rules[Any],
    xp: ModuleType,
    *,
    on_nonfinite: OnNonfinite,
    loss_scale: float | AnyArray | None = None,
    total: AnyArray | None = None,
    peaks: AnyArray | None = None,
    middle_only: bool = False,
) -> Decision[Any]:
    """Decides on every group from the measurements; never reads a device.

    Args:
        table: `(G, COLUMNS)` float64, as the backends measure it; float32 where JAX has no float64. Everything that is
            returned has the same precision.
        rules: The plan's, as arrays of the same framework on the same device.
        xp: Their namespace.
        on_nonfinite: `"zero"` zeroes groups with a NaN or an infinity; with any other choice they are left as they are.
        loss_scale: The loss scale of the gradients, a number or a 0-dim array; None without one. Reports and strategies
            get norms without it.
        total: `(COLUMNS,)` sums over all groups of all pipeline stages; None if this is the only stage.
        peaks: `(G,)` float64: the largest magnitude of each group, times the largest float64 over the largest number of
            its dtype; 0 where no element can overflow. A group grows no further than its peak allows. None if nothing
            can overflow, or to find out with `Decision.reach` what might.
        middle_only: Whether the host knows that all squares are in the middle range, and that no gradient is of a dtype
            wider than float32. Then there is less to compute, which on a device is less to launch. A scale that one
            float64 cannot hold takes what is smaller than a float32 to zero, so one factor will do.

    Returns:
        The decision. A group that is not finite has scale 1, or 0 if it is zeroed. Where a strategy returned no usable
        target, a group on a device is left as it is and has the scale NaN.

    Raises:
        SettingError: If a strategy returns targets of another shape, or on NumPy arrays a target that is NaN, negative
            or infinite.

    Example:
        >>> from tamegrad import Clip
        >>> table = np.zeros((1, COLUMNS))
        >>> table[0, 1] = 25.0
        >>> decision = decide(table, Rules.of([Group("out", Clip(1.0), (0,))]), np, on_nonfinite="keep")
        >>> decision.norms, decision.scales
        (array([5.]), array([0.2]))
    """
    with np.errstate(all="ignore"):
        sums = table.sum(0)
        # The last row is of everything.
        squares = xp.concatenate([table[:, BEFORE], (sums if total is None else total)[None, BEFORE]])
        root, exponent = (xp.sqrt(squares[:, 1]), None) if middle_only else norms_of(xp, squares)
        if loss_scale is not None:
            root = root / loss_scale
        # Only the host can afford to look whether the exponents are zero, as they usually are.
        all_norms = root if exponent is None else ldexp(xp, root, exponent)
        norms, total_norm = all_norms[:-1], all_norms[-1]
        targets = rules.targets(norms, xp)
        if xp is np and not sums.take(CHANGES).any() and (targets == norms).all():
            # The usual case, which only the host can afford to look for.
            one, none = np.ones(len(norms)), np.zeros(len(norms), dtype=np.int64)
            return Decision(norms, one, norms, none > 0, none, total_norm, None, None, None, None)

        integers = getattr(xp, FORMATS[root.dtype.itemsize].integers)
        root, exponent = root[:-1], xp.zeros_like(norms, dtype=integers) if exponent is None else exponent[:-1]
        nonfinite = xp.asarray(table[:, NONFINITE].sum(1), dtype=integers)
        finite = nonfinite == 0
        wanted = finite & (root > 0) & (targets != norms)
        usable = (targets >= 0) & (targets < math.inf)
        if xp is np:
            _refuse_unusable(rules, norms, targets, wanted & ~usable)
        rescaled = wanted & usable
        if peaks is not None:
            most = xp.maximum(norms, xp.minimum(targets, _ceilings(xp, root, exponent, peaks)))
            targets = xp.where(targets > norms, most, targets)
            rescaled = rescaled & (targets != norms)
        norms_after = xp.where(rescaled, targets, norms)
        if middle_only:
            first = xp.ones_like(norms)
            second = scale = xp.where(rescaled, norms_after / norms, first)
        else:
            first, second, scale = _factors(xp, norms_after, root, exponent, rescaled)
        scales, clipped = xp.where(wanted & ~usable, math.nan, scale), rescaled & (targets < norms)
        limits, zeroed = None, None
        if rules.has_limits:
            cut = finite & (table[:, CUT] > 0)
            measured, ratio = _after(xp, table[:, AFTER], root, exponent, loss_scale, middle_only=middle_only)
            norms_after, scales = xp.where(cut, measured, norms_after), xp.where(cut, ratio, scales)
            limits = xp.where(cut, rules.limits if loss_scale is None else rules.limits * loss_scale, math.inf)
            clipped = clipped | cut
        if on_nonfinite == "zero":
            zeroed = ~finite
            norms_after, scales = xp.where(zeroed, 0.0, norms_after), xp.where(zeroed, 0.0, scales)
        return Decision(norms, scales, norms_after, clipped, nonfinite, total_norm, first, second, limits, zeroed)


def may_overflow(grows_to: float, *, scaled: bool) -> bool:
    """Returns whether an element may grow past the largest number of some dtype, as far as strategies alone tell.

    Args:
        grows_to: As in `Rules`.
        scaled: Whether gradients are multiplied by a loss scale.
    """
    return grows_to > (0.0 if scaled else LARGEST_ANYWHERE)


def _factors(
    xp: ModuleType, targets: AnyArray, root: AnyArray, exponent: AnyArray, rescaled: AnyArray
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Returns the two factors that bring norms `root·2^exponent` to targets, and their product.

    Where one float64 holds the scale the first factor is 1. Elsewhere its exponent is split evenly, so that neither
    factor overflows, and no value underflows between them that would not underflow at the end.
    """
    form, one = FORMATS[root.dtype.itemsize], xp.ones_like(root)
    mantissa, power = xp.frexp(targets)
    root_mantissa, root_power = xp.frexp(root)
    ratio = xp.where(rescaled, mantissa / root_mantissa, one)
    power = xp.where(rescaled, power - root_power - exponent, xp.zeros_like(power))
    scale = ldexp(xp, ratio, power)
    fits = (scale >= form.smallest_normal) & (scale < math.inf)
    half = xp.clip(power // 2, form.smallest_exponent, form.largest_exponent)
    rest = xp.clip(power - half, form.smallest_exponent, form.largest_exponent)
    first = xp.where(fits, one, ldexp(xp, one, half))
    second = xp.where(fits, scale, ldexp(xp, ratio, rest))
    return first, second, scale


def _after(
    xp: ModuleType,
    squares: AnyArray,
    root: AnyArray,
    exponent: AnyArray,
    loss_scale: float | AnyArray | None,
    *,
    middle_only: bool,
) -> tuple[AnyArray, AnyArray]:
    """Returns the norms after, of `(G, 3)` sums of squares, and their ratio to norms `root·2^exponent`."""
    after, exponent_after = (xp.sqrt(squares[:, 1]), None) if middle_only else norms_of(xp, squares)
    if loss_scale is not None:
        after = after / loss_scale
    if middle_only:
        return after, after / root
    exponent_after = xp.zeros_like(exponent) if exponent_after is None else exponent_after
    return ldexp(xp, after, exponent_after), ldexp(xp, after / root, exponent_after - exponent)


def _ceilings(xp: ModuleType, root: AnyArray, exponent: AnyArray, peaks: AnyArray) -> AnyArray:
    """Returns the norms that groups with norms `root·2^exponent` have when their largest elements are at the limit."""
    mantissa, power = xp.frexp(peaks)
    root_mantissa, root_power = xp.frexp(root)
    # The largest float64 is 2^1024, but for its last bit.
    ratio = root_mantissa * FULL / mantissa
    ceilings = ldexp(xp, ratio, root_power - power + exponent + (LARGEST_EXPONENT + 1))
    return xp.where(peaks > 0, ceilings, math.inf)


def _floats(strategy: Strategy) -> dict[str, Any]:
    """Returns the fields of a strategy that are floats, numbers annotated as floats, or arrays of them."""
    floats = {}
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        is_number = isinstance(value, Real) and field.type in {float, "float"}
        if is_number or isinstance(value, float | np.ndarray):
            floats[field.name] = value
    return floats


def _callable_together(strategy: Strategy) -> Hashable:
    """Returns what strategies must have in common to share a call of `target`: everything but their floats."""
    floats = _floats(strategy)
    fields = dataclasses.fields(strategy)
    others = tuple((field.name, getattr(strategy, field.name)) for field in fields if field.name not in floats)
    return type(strategy), tuple(floats), others


def _stacked(strategies: Sequence[Strategy], governed: NDArray[np.bool_]) -> Strategy:
    """Returns one strategy for the governed groups, with floats as `(G,)` arrays; other groups get placeholders."""
    stacked = {}
    for name, value in _floats(strategies[0]).items():
        stacked[name] = np.full(len(governed), float(value))
        stacked[name][governed] = [float(getattr(strategy, name)) for strategy in strategies]
    return _replaced(strategies[0], stacked)


def _replaced(strategy: Strategy, values: dict[str, Any]) -> Strategy:
    """Returns a copy with other values, without the checks of the constructor."""
    made = copy.copy(strategy)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _refuse_unusable(
    rules: Rules[Any], norms: NDArray[np.float64], targets: NDArray[np.float64], unusable: NDArray[np.bool_]
) -> None:
    if unusable.any():
        index = int(unusable.argmax())
        strategy = next(one for one, governed in rules.strategies if governed is None or governed[index])
        raise _target_error(
            strategy,
            f"{targets[index]} for the group {rules.groups[index]!r}, whose norm is {norms[index]}",
            "return the norm itself where nothing should change; no gradient was changed",
        )


def _target_error(strategy: Strategy, got: str, advice: str) -> SettingError:
    return SettingError(
        f"{type(strategy).__name__}.target", got=got, allowed="finite norms, 0 or larger, one a group", advice=advice
    )
