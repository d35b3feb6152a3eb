"""The Triton kernels that measure and apply, over all tensors of a model at once, whatever their dtypes.

A program of `measure_chunk` and `apply_chunk` works on one chunk of one tensor, which it looks up in the tables of
`layout.py`; a program of `add_chunks` works on one group. All arithmetic is in float64, as in every backend: sums of
squares in float32 would be wrong in the seventh digit, and norms are held to thirteen. Sums are added up in an order
that depends on sizes alone, so the same input gives the same bits.

Every value is read once, even where values are cut. Only a chunk whose sums are not finite is read again, to count.
"""

import math
import sys

import torch
import triton
import triton.language as tl

from tamegrad import decide
from tamegrad.torch.backends import base
from tamegrad.torch.memory import DTYPES

__all__ = ["INTERPRETED", "add_chunks", "apply_chunk", "measure_chunk", "peak_chunk"]

# The columns of `Layout.facts`; a dtype is its position in `DTYPES`.
SIZE, GROUP, DTYPE_OF = (tl.constexpr(column) for column in range(3))
FACTS = tl.constexpr(3)

DTYPE_COUNT = tl.constexpr(len(DTYPES))
FLOAT16, BFLOAT16 = tl.constexpr(DTYPES.index(torch.float16)), tl.constexpr(DTYPES.index(torch.bfloat16))
FLOAT32, COMPLEX64 = tl.constexpr(DTYPES.index(torch.float32)), tl.constexpr(DTYPES.index(torch.complex64))

# Kernels see a module's constants only as `constexpr`.
COLUMNS = tl.constexpr(decide.COLUMNS)
BEFORE, NONFINITE, AFTER = (tl.constexpr(part.start) for part in (decide.BEFORE, decide.NONFINITE, decide.AFTER))
CUT = tl.constexpr(decide.CUT)
SMALL_BELOW, BIG_ABOVE = tl.constexpr(decide.SMALL_BELOW), tl.constexpr(decide.BIG_ABOVE)
SMALL_FACTOR, BIG_FACTOR = tl.constexpr(decide.SMALL_FACTOR), tl.constexpr(decide.BIG_FACTOR)
INFINITY = tl.constexpr(math.inf)
# The bytes of a real number of each dtype.
SIZES = tl.constexpr(tuple(dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize for dtype in DTYPES))
# The widest loads of a thread need addresses that are multiples of this many bytes.
WIDEST = tl.constexpr(16)
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
                        values, shift = _pointer(address, DTYPE, False)
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
                    values, shift = _pointer(address, DTYPE, AS_PAIRS)
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
def _pointer(address, DTYPE: tl.constexpr, AS_PAIRS: tl.constexpr):
    """Returns a pointer that allows the widest loads, and how many real numbers behind it the tensor starts.

    One gradient that is not aligned, in a bucket of another library, thus takes the same loads as all others: with one
    more block that is masked. Without the hint Triton loads every value on its own, as it does for pairs anyway.
    """
    SIZE_OF: tl.constexpr = SIZES[DTYPE]
    shift = (address % WIDEST) // SIZE_OF
    if AS_PAIRS:
        shift = shift * 0
    start = address - shift * SIZE_OF
    if DTYPE == FLOAT16:
        values = start.to(tl.pointer_type(tl.float16))
    elif DTYPE == BFLOAT16:
        # As bits: Triton's interpreter converts subnormals wrongly, and GPUs before 2020 have no bfloat16.
        values = start.to(tl.pointer_type(tl.int16))
    elif DTYPE == FLOAT32 or DTYPE == COMPLEX64:
        values = start.to(tl.pointer_type(tl.float32))
    else:
        values = start.to(tl.pointer_type(tl.float64))
    if not AS_PAIRS:
        values = tl.multiple_of(values, WIDEST)
    return values, shift


@triton.jit
def _blocks(start, stop, shift, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the range of the blocks of a chunk that are whole, or of those that are not: the first and the last."""
    high = stop + shift
    end = start + (high - start) // BLOCK * BLOCK
    if WHOLE:
        first, last, step = tl.where(shift > 0, start + BLOCK, start), end, BLOCK
    else:
        first, last, step = tl.where(shift > 0, start, end), high, tl.maximum(end - start, BLOCK)
    return tl.multiple_of(first, BLOCK), last, step


@triton.jit
def _measure(address, start, stop, limit, row, DTYPE: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    AS_PAIRS: tl.constexpr = LIMITED and DTYPE >= COMPLEX64
    values, shift = _pointer(address, DTYPE, AS_PAIRS)
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
        first, last, step = _blocks(start, stop, shift, PART == 0, BLOCK)
        for begin in range(first, last, step):
            real, imaginary = _load(values, begin, start + shift, stop + shift, AS_PAIRS, PART == 1, BLOCK)
            small, middle, big = _add(real, imaginary, small, middle, big, RANGES, AS_PAIRS)
            if LIMITED:
                cut += tl.where(_magnitude(real, imaginary, AS_PAIRS) > limit, 1.0, 0.0)
                real, imaginary = _limited(real, imaginary, limit, AS_PAIRS)
                # The square of a small threshold can be below the middle range, whatever the dtype.
                small_after, middle_after, big_after = _add(
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
        wide, _ = _load(values, begin, start + shift, stop + shift, False, True, BLOCK)
        nan += tl.where(wide != wide, 1.0, 0.0)
        plus += tl.where(wide == INFINITY, 1.0, 0.0)
        minus += tl.where(wide == -INFINITY, 1.0, 0.0)
    _store3(row + NONFINITE, tl.sum(nan), tl.sum(plus), tl.sum(minus))


@triton.jit
def _largest(values, start, stop, shift, BLOCK: tl.constexpr):
    """Returns the largest magnitude of a chunk's real numbers; what it is for NaN does not matter."""
    largest = tl.zeros((BLOCK,), tl.float64)
    for begin in range(start, stop + shift, BLOCK):
        wide, _ = _load(values, begin, start + shift, stop + shift, False, True, BLOCK)
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
        from_block, to_block, step = _blocks(start, stop, shift, PART == 0, BLOCK)
        for begin in range(from_block, to_block, step):
            real, imaginary = _load(values, begin, low, high, AS_PAIRS, PART == 1, BLOCK)
            if WIDE:
                real, imaginary = real * first * second, imaginary * first * second
            else:
                # Consumer GPUs have few units for float64: there every product counts.
                real, imaginary = real * factor, imaginary * factor
            if LIMITED:
                real, imaginary = _limited(real, imaginary, limit, AS_PAIRS)
            if ZEROES:
                # A product with 0 would keep NaN.
                real, imaginary = tl.where(zero, 0.0, real), tl.where(zero, 0.0, imaginary)
            _store(values, begin, low, high, real, imaginary, AS_PAIRS, PART == 1, BLOCK)


@triton.jit
def _load(values, begin, low, high, AS_PAIRS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns a block in float64: real and imaginary parts, or without `AS_PAIRS` the same real numbers twice."""
    if AS_PAIRS:
        offsets = begin + 2 * tl.arange(0, BLOCK // 2)
        real = _widened(tl.load(values + offsets, mask=(offsets >= low) & (offsets < high), other=0.0))
        imaginary = _widened(tl.load(values + offsets + 1, mask=(offsets >= low) & (offsets < high), other=0.0))
    else:
        offsets = begin + tl.arange(0, BLOCK)
        if MASKED:
            real = _widened(tl.load(values + offsets, mask=(offsets >= low) & (offsets < high), other=0.0))
        else:
            real = _widened(tl.load(values + offsets))
        imaginary = real
    return real, imaginary


@triton.jit
def _store(
    values, begin, low, high, real, imaginary, AS_PAIRS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    if AS_PAIRS:
        offsets = begin + 2 * tl.arange(0, BLOCK // 2)
        inside = (offsets >= low) & (offsets < high)
        tl.store(values + offsets, _narrowed(real, values.dtype.element_ty), mask=inside)
        tl.store(
            values + offsets + 1,
            _narrowed(imaginary, values.dtype.element_ty),
            mask=inside,
        )
    else:
        offsets = begin + tl.arange(0, BLOCK)
        if MASKED:
            inside = (offsets >= low) & (offsets < high)
            tl.store(values + offsets, _narrowed(real, values.dtype.element_ty), mask=inside)
        else:
            tl.store(values + offsets, _narrowed(real, values.dtype.element_ty))


@triton.jit
def _widened(raw):
    if raw.dtype == tl.int16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    return raw.to(tl.float64)


@triton.jit
def _narrowed(wide, STORED: tl.constexpr):
    if STORED == tl.float64:
        return wide
    # Through float32, like PyTorch: not every device converts float64 to the 16-bit types.
    narrow = wide.to(tl.float32)
    if STORED == tl.int16:
        # Rounds to nearest, ties to even. NaN never gets here: its group is zeroed or left as it is.
        bits = narrow.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    return narrow.to(STORED)


@triton.jit
def _add(real, imaginary, small, middle, big, RANGES: tl.constexpr, AS_PAIRS: tl.constexpr):
    """Adds squares to the sums of Blue's three ranges; those of float32 and narrower dtypes all fit the middle one."""
    if RANGES:
        small, middle, big = _add_ranges(real, small, middle, big)
        if AS_PAIRS:
            small, middle, big = _add_ranges(imaginary, small, middle, big)
    else:
        middle += real * real
        if AS_PAIRS:
            middle += imaginary * imaginary
    return small, middle, big


@triton.jit
def _add_ranges(wide, small, middle, big):
    magnitude = tl.abs(wide)
    is_small, is_big = magnitude < SMALL_BELOW, magnitude > BIG_ABOVE
    raised = tl.where(is_small, magnitude, 0.0) * SMALL_FACTOR
    lowered = tl.where(is_big, magnitude, 0.0) * BIG_FACTOR
    between = tl.where(is_small | is_big, 0.0, magnitude)
    return small + raised * raised, middle + between * between, big + lowered * lowered


@triton.jit
def _magnitude(real, imaginary, AS_PAIRS: tl.constexpr):
    if not AS_PAIRS:
        return tl.abs(real)
    largest = tl.maximum(tl.abs(real), tl.abs(imaginary))
    # A power of two rounds nothing, and with this one no square overflows or underflows.
    factor = tl.where(largest > BIG_ABOVE, BIG_FACTOR, tl.where(largest < SMALL_BELOW, SMALL_FACTOR, 1.0))
    real, imaginary = real * factor, imaginary * factor
    return tl.sqrt(real * real + imaginary * imaginary) / factor


@triton.jit
def _limited(real, imaginary, limit, AS_PAIRS: tl.constexpr):
    """Cuts magnitudes to a limit; complex values keep their direction."""
    if AS_PAIRS:
        magnitude = _magnitude(real, imaginary, AS_PAIRS)
        over = magnitude > limit
        # The magnitude may overflow float64; half of it never does.
        factor = tl.where(magnitude == INFINITY, 0.5, 1.0)
        divisor = tl.where(over, _magnitude(real * factor, imaginary * factor, AS_PAIRS), 1.0)
        real = tl.where(over, real * factor / divisor * limit, real)
        imaginary = tl.where(over, imaginary * factor / divisor * limit, imaginary)
    else:
        real = tl.where(real > limit, limit, tl.where(real < -limit, -limit, real))
        imaginary = real
    return real, imaginary


@triton.jit
def _store3(row, first, second, third):
    tl.store(row, first)
    tl.store(row + 1, second)
    tl.store(row + 2, third)


# With TRITON_INTERPRET=1, NumPy runs the kernels in host memory.
INTERPRETED = not isinstance(measure_chunk, triton.runtime.JITFunction)
