"""`tamegrad.decide.decide` for the built-in strategies, fused into one Triton kernel instead of some fifty operations.

This is the only copy of that function. Change both together; tests hold the copy to the original.
"""

from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from tamegrad import decide, ranges
from tamegrad.groups import Group
from tamegrad.strategies import Clip, ClipValue, Keep, Renormalize
from tamegrad.torch.backends.gpu.kernels import AFTER, BEFORE, COLUMNS, CUT, NONFINITE
from tamegrad.torch.backends.gpu.values import BIG_FACTOR, INFINITY, SMALL_FACTOR

__all__ = ["NUMBERS", "decide_groups", "target_bounds"]

SMALLEST_NORMAL = tl.constexpr(ranges.SMALLEST_NORMAL)
FULL = tl.constexpr(decide.FULL)
SMALLEST_EXPONENT, LARGEST_EXPONENT = tl.constexpr(ranges.SMALLEST_EXPONENT), tl.constexpr(ranges.LARGEST_EXPONENT)
# The roots of the small and the big range are in units of these powers of two.
SMALL_UNIT, BIG_UNIT = tl.constexpr(-ranges.SMALL_EXPONENT), tl.constexpr(-ranges.BIG_EXPONENT)

# The rows of float64 that `decide_groups` writes, named as in `Decision`. The last has one number.
NUMBERS = ("norms", "scales", "norms_after", "first", "second", "limits", "total_norm")
NORMS, SCALES, NORMS_AFTER, FIRST, SECOND, LIMITS, TOTAL_NORM = (tl.constexpr(row) for row in range(len(NUMBERS)))

# How float64 is stored: the bits of its fraction, and the exponent field of 1.
FRACTION_BITS, BIAS = tl.constexpr(52), tl.constexpr(1023)
FRACTION = tl.constexpr(2**52 - 1)
# A subnormal number times this power of two is normal.
RAISE = tl.constexpr(54)
RAISED = tl.constexpr(2.0**54)


def target_bounds(groups: Sequence[Group]) -> NDArray[np.float64] | None:
    """Returns the bounds on the norms that groups end with.

    Args:
        groups: The groups of a plan.

    Returns:
        `(2, G)`: the target of a group is its norm, at most the second bound and at least the first. None if a strategy
        is not built in.
    """
    bounds = np.empty((2, len(groups)))
    for index, group in enumerate(groups):
        strategy = group.strategy
        # A subclass may have another target.
        if type(strategy) is Renormalize:
            bounds[:, index] = 1.0
        elif type(strategy) is Clip:
            bounds[:, index] = 0.0, strategy.threshold
        elif type(strategy) in {Keep, ClipValue}:
            bounds[:, index] = 0.0, np.inf
        else:
            return None
    return bounds


@triton.jit(do_not_specialize=["groups"])
def decide_groups(
    table,
    bounds,
    limits,
    loss_scale,
    total,
    peaks,
    numbers,
    nonfinite,
    flags,
    nonfinite_steps,
    groups,
    ZEROES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Decides; the first program computes the total norm, each of the others decides on a block of groups.

    `limits`, `loss_scale`, `total`, `peaks` and `nonfinite_steps` may be None.
    """
    block = tl.program_id(0) - 1
    scaled_by = 1.0
    if loss_scale is not None:
        scaled_by = tl.load(loss_scale).to(tl.float64)
    if block < 0:
        if total is not None:
            _total_norm(total, 1, scaled_by, numbers + TOTAL_NORM * groups, ROWS)
        else:
            _total_norm(table, groups, scaled_by, numbers + TOTAL_NORM * groups, ROWS)
    else:
        group = block * BLOCK + tl.arange(0, BLOCK)
        _decide(
            table, bounds, limits, scaled_by, peaks, numbers, nonfinite, flags, nonfinite_steps, group, groups, ZEROES
        )


@triton.jit
def _total_norm(table, groups, scaled_by, total_norm, ROWS: tl.constexpr):
    small, middle, big = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for begin in range(0, groups, ROWS):
        group = begin + tl.arange(0, ROWS)
        sums = _load3(table + group * COLUMNS + BEFORE, group < groups)
        small, middle, big = small + sums[0], middle + sums[1], big + sums[2]
    root, exponent = _norm(tl.sum(small), tl.sum(middle), tl.sum(big))
    tl.store(total_norm, _ldexp(root / scaled_by, exponent))


@triton.jit
def _decide(
    table,
    bounds,
    limits,
    scaled_by,
    peaks,
    numbers,
    nonfinite,
    flags,
    nonfinite_steps,
    group,
    groups,
    ZEROES: tl.constexpr,
):
    """Decides on a block of groups, in the order of `tamegrad.decide.decide`, which says why."""
    inside = group < groups
    row = table + group * COLUMNS
    small, middle, big = _load3(row + BEFORE, inside)
    root, exponent = _norm(small, middle, big)
    root = root / scaled_by
    norm = _ldexp(root, exponent)
    nan, plus, minus = _load3(row + NONFINITE, inside)
    bad = nan + plus + minus
    finite = bad == 0
    lowest = tl.load(bounds + group, mask=inside, other=0.0)
    target = tl.minimum(norm, tl.load(bounds + groups + group, mask=inside, other=INFINITY))
    target = tl.maximum(target, lowest)
    if peaks is not None:
        peak = tl.load(peaks + group, mask=inside, other=0.0)
        grows = finite & (root > 0) & (target > norm)
        target = tl.where(grows & (peak > 0), _limited_target(target, norm, root, exponent, peak), target)

    rescaled = finite & (root > 0) & (target != norm)
    first, second, scale = _factors(tl.where(rescaled, target, 1.0), tl.where(rescaled, root, 1.0), exponent, rescaled)
    norm_after = tl.where(rescaled, target, norm)
    clipped = rescaled & (target < norm)
    if limits is not None:
        cut = finite & (tl.load(row + CUT, mask=inside, other=0.0) > 0)
        small, middle, big = _load3(row + AFTER, inside)
        root_after, exponent_after = _norm(small, middle, big)
        root_after = root_after / scaled_by
        norm_after = tl.where(cut, _ldexp(root_after, exponent_after), norm_after)
        ratio = root_after / tl.where(cut, root, 1.0)
        scale = tl.where(cut, _ldexp(ratio, exponent_after - exponent), scale)
        limit = tl.load(limits + group, mask=inside, other=INFINITY) * scaled_by
        tl.store(numbers + LIMITS * groups + group, tl.where(cut, limit, INFINITY), mask=inside)
        clipped = clipped | cut
    if ZEROES:
        norm_after, scale = tl.where(finite, norm_after, 0.0), tl.where(finite, scale, 0.0)
        tl.store(flags + groups + group, bad != 0, mask=inside)
    tl.store(numbers + NORMS * groups + group, norm, mask=inside)
    tl.store(numbers + SCALES * groups + group, scale, mask=inside)
    tl.store(numbers + NORMS_AFTER * groups + group, norm_after, mask=inside)
    tl.store(numbers + FIRST * groups + group, first, mask=inside)
    tl.store(numbers + SECOND * groups + group, second, mask=inside)
    tl.store(flags + group, clipped, mask=inside)
    tl.store(nonfinite + group, bad.to(tl.int64), mask=inside)
    if nonfinite_steps is not None:
        steps = tl.load(nonfinite_steps + group, mask=inside, other=0)
        tl.store(nonfinite_steps + group, steps + (bad != 0), mask=inside)


@triton.jit
def _limited_target(target, norm, root, exponent, peak):
    """Limits targets above norms `root·2^exponent` to those at which the largest elements are at their limit."""
    fits = (peak > 0) & (peak < INFINITY)
    mantissa, power = _frexp(tl.where(fits, peak, 1.0))
    root_mantissa, root_power = _frexp(tl.where(root > 0, root, 1.0))
    ceiling = _ldexp(root_mantissa * FULL / mantissa, root_power - power + exponent + LARGEST_EXPONENT + 1)
    return tl.maximum(norm, tl.minimum(target, ceiling))


@triton.jit
def _factors(target, root, exponent, rescaled):
    """Returns the two factors that bring norms `root·2^exponent` to positive targets, and their product."""
    mantissa, power = _frexp(target)
    root_mantissa, root_power = _frexp(root)
    ratio = mantissa / root_mantissa
    power = tl.where(rescaled, power - root_power - exponent, 0)
    scale = _ldexp(ratio, power)
    fits = (scale >= SMALLEST_NORMAL) & (scale < INFINITY)
    half = _clipped(power >> 1)
    first = tl.where(fits, 1.0, _ldexp(tl.full(half.shape, 1.0, tl.float64), half))
    return first, tl.where(fits, scale, _ldexp(ratio, _clipped(power - half))), scale


@triton.jit
def _clipped(exponent):
    return tl.minimum(tl.maximum(exponent, SMALLEST_EXPONENT), LARGEST_EXPONENT)


@triton.jit
def _frexp(values):
    """Splits positive finite float64 into a mantissa in [0.5, 1) and a power of two."""
    subnormal = values < SMALLEST_NORMAL
    bits = tl.where(subnormal, values * RAISED, values).to(tl.int64, bitcast=True)
    power = (bits >> FRACTION_BITS) - (BIAS - 1) - tl.where(subnormal, RAISE, 0)
    mantissa = ((bits & FRACTION) | ((BIAS - 1) << FRACTION_BITS)).to(tl.float64, bitcast=True)
    return mantissa, power


@triton.jit
def _ldexp(values, exponent):
    """Multiplies by powers of two, which may be too large or small for one float64, and rounds at most once."""
    half = exponent >> 1
    return values * _power_of_two(half) * _power_of_two(exponent - half)


@triton.jit
def _power_of_two(exponent):
    # If an exponent has to be clipped, its other half takes the product to zero or infinity anyway.
    normal = tl.minimum(tl.maximum(exponent, 1 - BIAS), LARGEST_EXPONENT)
    return ((normal + BIAS) << FRACTION_BITS).to(tl.float64, bitcast=True)


@triton.jit
def _norm(small, middle, big):
    """Combines sums of squares to norms `root·2^exponent`."""
    is_big, is_small = big > 0, (big == 0) & (middle == 0)
    root_big = tl.sqrt(big + middle * BIG_FACTOR * BIG_FACTOR)
    # No square in the middle range is below 2^-1022: next to it, what small squares lose to underflow is below one bit.
    root_middle = tl.sqrt(middle + small / SMALL_FACTOR / SMALL_FACTOR)
    root = tl.where(is_big, root_big, tl.where(is_small, tl.sqrt(small), root_middle))
    exponent = tl.where(is_big, BIG_UNIT, tl.where(is_small, SMALL_UNIT, 0)).to(tl.int64)
    return root, exponent


@triton.jit
def _load3(row, inside):
    first = tl.load(row, mask=inside, other=0.0)
    return first, tl.load(row + 1, mask=inside, other=0.0), tl.load(row + 2, mask=inside, other=0.0)
