"""What `tamegrad.torch.decide.decide` says, as one Triton kernel instead of a hundred operations of PyTorch."""

import triton
import triton.language as tl

from tamegrad.torch import decide
from tamegrad.torch.kernels.gpu_kernels import (
    AFTER,
    BEFORE,
    BIG_FACTOR,
    COLUMNS,
    CUT,
    INFINITY,
    NONFINITE,
    SMALL_FACTOR,
)

__all__ = ["NUMBERS", "decide_groups"]

SMALLEST_NORMAL = tl.constexpr(decide.SMALLEST_NORMAL)

# The rows of float64 that `decide_groups` writes, as `Decision` names them. The last is of one number.
NUMBERS = ("norms", "scales", "norms_after", "first", "second", "limits", "total_norm")
NORMS, SCALES, NORMS_AFTER, FIRST, SECOND, LIMITS, TOTAL_NORM = (tl.constexpr(row) for row in range(len(NUMBERS)))


@triton.jit(do_not_specialize=["groups"])
def decide_groups(
    table,
    largest,
    limits,
    renormalizes,
    numbers,
    nonfinite,
    flags,
    steps,
    groups,
    ZEROES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Does what `tamegrad.torch.decide.decide` does; the first program has the total norm, others a block of groups."""
    block = tl.program_id(0) - 1
    if block < 0:
        _total_norm(table, groups, numbers + TOTAL_NORM * groups, ROWS)
    else:
        group = block * BLOCK + tl.arange(0, BLOCK)
        _decide(table, largest, limits, renormalizes, numbers, nonfinite, flags, steps, group, groups, ZEROES)


@triton.jit
def _total_norm(table, groups, total, ROWS: tl.constexpr):
    small, middle, big = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for begin in range(0, groups, ROWS):
        group = begin + tl.arange(0, ROWS)
        sums = _load3(table + group * COLUMNS + BEFORE, group < groups)
        small, middle, big = small + sums[0], middle + sums[1], big + sums[2]
    root, unit = _norm(tl.sum(small), tl.sum(middle), tl.sum(big))
    tl.store(total, root * unit)


@triton.jit
def _decide(
    table, largest, limits, renormalizes, numbers, nonfinite, flags, steps, group, groups, ZEROES: tl.constexpr
):
    """Decides on a block of groups; `decide.py` has the same in the same order and says why."""
    inside = group < groups
    row = table + group * COLUMNS
    small, middle, big = _load3(row + BEFORE, inside)
    root, unit = _norm(small, middle, big)
    norm = root * unit
    nan, plus, minus = _load3(row + NONFINITE, inside)
    bad = nan + plus + minus
    finite = bad == 0
    threshold = tl.load(largest + group, mask=inside, other=INFINITY)
    over = finite & (norm > threshold)
    raises = tl.load(renormalizes + group, mask=inside, other=0) != 0
    rescaled = over | (finite & raises & (root > 0) & (norm < threshold))
    cut = finite & (tl.load(row + CUT, mask=inside, other=0.0) > 0)
    zero = (bad != 0) & ZEROES
    tl.store(nonfinite + group, bad.to(tl.int64), mask=inside)
    tl.store(steps + group, tl.load(steps + group, mask=inside, other=0) + (bad != 0), mask=inside)
    tl.store(flags + group, over | cut, mask=inside)
    tl.store(flags + groups + group, zero, mask=inside)

    # Groups that keep their values divide 1 by 1, so that nothing here divides by zero.
    ratio = tl.where(rescaled, threshold, 1.0) / tl.where(rescaled, root, 1.0)
    scale = ratio / tl.where(rescaled, unit, 1.0)
    fits = (scale >= SMALLEST_NORMAL) & (scale < INFINITY)
    limit = tl.load(limits + group, mask=inside, other=INFINITY)
    tl.store(numbers + FIRST * groups + group, tl.where(fits, 1.0, 1.0 / unit), mask=inside)
    tl.store(numbers + SECOND * groups + group, tl.where(fits, scale, ratio), mask=inside)
    tl.store(numbers + LIMITS * groups + group, tl.where(cut, limit, INFINITY), mask=inside)

    small, middle, big = _load3(row + AFTER, inside)
    root_after, unit_after = _norm(small, middle, big)
    norm_after = tl.where(cut, root_after * unit_after, tl.where(rescaled, threshold, norm))
    scale = tl.where(cut, root_after / tl.where(cut, root, 1.0) * (unit_after / unit), scale)
    tl.store(numbers + NORMS * groups + group, norm, mask=inside)
    tl.store(numbers + SCALES * groups + group, tl.where(zero, 0.0, scale), mask=inside)
    tl.store(numbers + NORMS_AFTER * groups + group, tl.where(zero, 0.0, norm_after), mask=inside)


@triton.jit
def _norm(small, middle, big):
    """Combines sums of squares to norms `root·unit`, where `unit` is a power of two, as `decide.py` does."""
    is_big, is_small = big > 0, (big == 0) & (middle == 0)
    root_big = tl.sqrt(big + middle * BIG_FACTOR * BIG_FACTOR)
    # No square in the middle range is below 2^-1022: beside it, what is lost where small ones underflow is no bit.
    root_middle = tl.sqrt(middle + small / SMALL_FACTOR / SMALL_FACTOR)
    root = tl.where(is_big, root_big, tl.where(is_small, tl.sqrt(small), root_middle))
    return root, tl.where(is_big, 1.0 / BIG_FACTOR, tl.where(is_small, 1.0 / SMALL_FACTOR, 1.0))


@triton.jit
def _load3(row, inside):
    first = tl.load(row, mask=inside, other=0.0)
    return first, tl.load(row + 1, mask=inside, other=0.0), tl.load(row + 2, mask=inside, other=0.0)
