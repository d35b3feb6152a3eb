"""The Triton kernels that measure and apply, over all tensors of a model at once, whatever their dtypes.

A program of `measure_chunk` and `apply_chunk` works on one chunk of one tensor, which it looks up in the tables of
`layout.py`; a program of `add_chunks` works on one group. All arithmetic is in float64, as in every backend: sums of
squares in float32 would be wrong in the seventh digit, and norms are held to thirteen. Sums are added up in an order
that depends on sizes alone, so the same input gives the same bits.

Every value is read once, even where values are cut. Only a chunk whose sums are not finite is read again, to count.
"""

import sys

import triton
import triton.language as tl

from tamegrad import decide
from tamegrad.torch.backends import base
from tamegrad.torch.backends.gpu.values import (
    COMPLEX64,
    INFINITY,
    add_squares,
    blocks_of,
    limited,
    load,
    magnitude_of,
    pointer_to,
    store,
)
from tamegrad.torch.memory import DTYPES

__all__ = ["INTERPRETED", "add_chunks", "apply_chunk", "measure_chunk", "peak_chunk"]

# The columns of `Layout.facts`; a dtype is its position in `DTYPES`.
SIZE, GROUP, DTYPE_OF = (tl.constexpr(column) for column in range(3))
FACTS = tl.constexpr(3)

DTYPE_COUNT = tl.constexpr(len(DTYPES))

# Kernels see a module's constants only as `constexpr`.
COLUMNS = tl.constexpr(decide.COLUMNS)
BEFORE, NONFINITE, AFTER = (tl.constexpr(part.start) for part in (decide.BEFORE, decide.NONFINITE, decide.AFTER))
CUT = tl.constexpr(decide.CUT)
LARGEST_ANYWHERE, MAX = tl.constexpr(decide.LARGEST_ANYWHERE), tl.constexpr(sys.float_info.max)
LARGEST, STRETCH = tl.constexpr(tuple(base.LARGEST.tolist())), tl.constexpr(tuple(base.STRETCH.tolist()))


@triton.jit
def measure_chunk(
    addresses,
    facts,
    chunks,
    limits,
    loss_scale,
    partial,
    PRESENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the sums of one chunk to its row of `partial`.

    `limits` and `loss_scale` may be None. The code is specialized for the dtypes of the plan (`PRESENT` has a bit for
    each), and for groups with and without a limit, since what a limit takes in registers would slow down all others.
    """
    chunk = tl.program_id(0)
    address, fact, start, stop = _find(addresses, facts, chunks, chunk, CHUNK)
    LIMITED: tl.constexpr = limits is not None
    limit = INFINITY
    if LIMITED:
        limit = tl.load(limits + tl.load(fact + GROUP))
        if loss_scale is not None:
            limit *= tl.load(loss_scale).to(tl.float64)
    dtype = tl.load(fact + DTYPE_OF)
    row = partial + chunk.to(tl.int64) * COLUMNS
    for DTYPE in tl.static_range(DTYPE_COUNT):
        if PRESENT >> DTYPE & 1:
            if dtype == DTYPE:
                _measure(address, start, stop, limit, row, DTYPE, LIMITED, BLOCK)


@triton.jit
def add_chunks(partial, spans, table, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds up the rows of a span of one group's chunks, or of one group's spans, into a row of `table`.

    `spans` says where they start and end. The order of the sum depends on sizes alone.
    """
    group = tl.program_id(0).to(tl.int64)
    first, last = tl.load(spans + 2 * group), tl.load(spans + 2 * group + 1)
    columns = tl.arange(0, WIDTH)
    sums = tl.zeros((ROWS, WIDTH), tl.float64)
    for begin in range(first, last, ROWS):
        rows = begin + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & (columns < COLUMNS)[None, :]
        sums += tl.load(partial + rows[:, None] * COLUMNS + columns[None, :], mask=inside, other=0.0)
    tl.store(table + group * COLUMNS + columns, tl.sum(sums, 0), mask=columns < COLUMNS)


@triton.jit
def peak_chunk(
    addresses,
    facts,
    chunks,
    norms,
    norms_after,
    loss_scale,
    peak_bits,
    PRESENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Raises the peak of a chunk's group to that of the chunk; returns at once if no element can overflow.

    `loss_scale` may be None. `peak_bits` holds the bits of non-negative float64, which have the order of the numbers.
    """
    address, fact, start, stop = _find(addresses, facts, chunks, tl.program_id(0), CHUNK)
    group = tl.load(fact + GROUP)
    # The same as Decision.reach.
    norm, reach = tl.load(norms + group), tl.load(norms_after + group)
    grows = reach > norm
    if loss_scale is not None:
        reach *= tl.load(loss_scale).to(tl.float64)
    dtype = tl.load(fact + DTYPE_OF)
    if grows & (reach > LARGEST_ANYWHERE):
        for DTYPE in tl.static_range(DTYPE_COUNT):
            if PRESENT >> DTYPE & 1:
                if dtype == DTYPE:
                    if reach > LARGEST[DTYPE]:
                        values, shift = pointer_to(address, DTYPE, False)
                        peak = _largest(values, start, stop, shift, BLOCK) * STRETCH[DTYPE]
                        tl.atomic_max(peak_bits + group, tl.minimum(peak, MAX).to(tl.int64, bitcast=True))


@triton.jit
def apply_chunk(
    addresses,
    facts,
    chunks,
    firsts,
    seconds,
    limits,
    zeroed,
    PRESENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Changes the values of one chunk as decided for its group; returns at once if they stay as they are.

    `limits` and `zeroed` may be None.
    """
    address, fact, start, stop = _find(addresses, facts, chunks, tl.program_id(0), CHUNK)
    group = tl.load(fact + GROUP)
    first, second = tl.load(firsts + group), tl.load(seconds + group)
    LIMITED: tl.constexpr = limits is not None
    ZEROES: tl.constexpr = zeroed is not None
    limit, zero = INFINITY, False
    # The same as Decision.changed.
    changed = (first != 1.0) | (second != 1.0)
    if LIMITED:
        limit = tl.load(limits + group)
        changed = changed | (limit < INFINITY)
    if ZEROES:
        zero = tl.load(zeroed + group) != 0
        changed = changed | zero
    dtype = tl.load(fact + DTYPE_OF)
    if changed:
        for DTYPE in tl.static_range(DTYPE_COUNT):
            if PRESENT >> DTYPE & 1:
                if dtype == DTYPE:
                    # Real factors treat both parts of a complex value alike; only a limit needs to see them together.
                    AS_PAIRS: tl.constexpr = LIMITED and DTYPE >= COMPLEX64
                    values, shift = pointer_to(address, DTYPE, AS_PAIRS)
                    _change_chunk(
                        values, start, stop, shift, first, second, limit, zero, LIMITED, ZEROES, AS_PAIRS, BLOCK
                    )


@triton.jit
def _find(addresses, facts, chunks, chunk, CHUNK: tl.constexpr):
    """Returns the address of a chunk's tensor, its row of facts, and where in it the chunk starts and stops."""
    row = chunks + chunk.to(tl.int64) * 2
    tensor, start = tl.load(row), tl.multiple_of(tl.load(row + 1), CHUNK)
    fact = facts + tensor * FACTS
    return tl.load(addresses + tensor), fact, start, tl.minimum(start + CHUNK, tl.load(fact + SIZE))


@triton.jit
def _measure(address, start, stop, limit, row, DTYPE: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    AS_PAIRS: tl.constexpr = LIMITED and DTYPE >= COMPLEX64
    values, shift = pointer_to(address, DTYPE, AS_PAIRS)
    total = _sum_chunk(values, start, stop, shift, limit, row, LIMITED, AS_PAIRS, BLOCK)
    # Sums are finite exactly if all values are. NaN compares false.
    if total < INFINITY:
        _store3(row + NONFINITE, 0.0, 0.0, 0.0)
    else:
        _count_nonfinite(values, start, stop, shift, row, BLOCK)


@triton.jit
def _sum_chunk(
    values, start, stop, shift, limit, row, LIMITED: tl.constexpr, AS_PAIRS: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores the sums of squares before and after, and the count of cut values; returns the sum before."""
    LANES: tl.constexpr = BLOCK // 2 if AS_PAIRS else BLOCK
    small, middle, big = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    small_after, middle_after, big_after, cut = small, middle, big, small
    RANGES: tl.constexpr = values.dtype.element_ty == tl.float64
    # Whole blocks first, without a mask, which would make Triton load every value on its own; then the others.
    for PART in tl.static_range(2):
        first, last, step = blocks_of(start, stop, shift, PART == 0, BLOCK)
        for begin in range(first, last, step):
            real, imaginary = load(values, begin, start + shift, stop + shift, AS_PAIRS, PART == 1, BLOCK)
            small, middle, big = add_squares(real, imaginary, small, middle, big, RANGES, AS_PAIRS)
            if LIMITED:
                cut += tl.where(magnitude_of(real, imaginary, AS_PAIRS) > limit, 1.0, 0.0)
                real, imaginary = limited(real, imaginary, limit, AS_PAIRS)
                # The square of a small threshold can be below the middle range, whatever the dtype.
                small_after, middle_after, big_after = add_squares(
                    real, imaginary, small_after, middle_after, big_after, True, AS_PAIRS
                )
    before = tl.sum(small), tl.sum(middle), tl.sum(big)
    _store3(row + BEFORE, before[0], before[1], before[2])
    _store3(row + AFTER, tl.sum(small_after), tl.sum(middle_after), tl.sum(big_after))
    tl.store(row + CUT, tl.sum(cut))
    return before[0] + before[1] + before[2]


@triton.jit
def _count_nonfinite(values, start, stop, shift, row, BLOCK: tl.constexpr):
    nan, plus, minus = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for begin in range(start, stop + shift, BLOCK):
        wide, _ = load(values, begin, start + shift, stop + shift, False, True, BLOCK)
        nan += tl.where(wide != wide, 1.0, 0.0)
        plus += tl.where(wide == INFINITY, 1.0, 0.0)
        minus += tl.where(wide == -INFINITY, 1.0, 0.0)
    _store3(row + NONFINITE, tl.sum(nan), tl.sum(plus), tl.sum(minus))


@triton.jit
def _largest(values, start, stop, shift, BLOCK: tl.constexpr):
    """Returns the largest magnitude of a chunk's real numbers; what it is for NaN does not matter."""
    largest = tl.zeros((BLOCK,), tl.float64)
    for begin in range(start, stop + shift, BLOCK):
        wide, _ = load(values, begin, start + shift, stop + shift, False, True, BLOCK)
        largest = tl.maximum(largest, tl.abs(wide))
    return tl.max(largest)


@triton.jit
def _change_chunk(
    values,
    start,
    stop,
    shift,
    first,
    second,
    limit,
    zero,
    LIMITED: tl.constexpr,
    ZEROES: tl.constexpr,
    AS_PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WIDE: tl.constexpr = values.dtype.element_ty == tl.float64
    # What one float64 cannot hold takes the values of other dtypes to zero or infinity anyway.
    factor = tl.minimum(first * second, MAX)
    low, high = start + shift, stop + shift
    for PART in tl.static_range(2):
        from_block, to_block, step = blocks_of(start, stop, shift, PART == 0, BLOCK)
        for begin in range(from_block, to_block, step):
            real, imaginary = load(values, begin, low, high, AS_PAIRS, PART == 1, BLOCK)
            if WIDE:
                real, imaginary = real * first * second, imaginary * first * second
            else:
                # Consumer GPUs have few units for float64: there every product counts.
                real, imaginary = real * factor, imaginary * factor
            if LIMITED:
                real, imaginary = limited(real, imaginary, limit, AS_PAIRS)
            if ZEROES:
                # A product with 0 would keep NaN.
                real, imaginary = tl.where(zero, 0.0, real), tl.where(zero, 0.0, imaginary)
            store(values, begin, low, high, real, imaginary, AS_PAIRS, PART == 1, BLOCK)


@triton.jit
def _store3(row, first, second, third):
    tl.store(row, first)
    tl.store(row + 1, second)
    tl.store(row + 2, third)


# With TRITON_INTERPRET=1, NumPy runs the kernels in host memory.
INTERPRETED = not isinstance(measure_chunk, triton.runtime.JITFunction)
