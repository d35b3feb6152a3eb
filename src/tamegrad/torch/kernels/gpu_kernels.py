"""What runs on the device to measure and apply: Triton kernels over all tensors of a model, whatever their dtypes.

A program of the first and the last has one chunk of one tensor; which one, the tables say that `gpu.py` makes. Programs
of the one in between have groups. All arithmetic is in float64, as in every backend: a sum of squares in float32 would
be wrong in the seventh digit, and the norms are held to thirteen. Sums are added up in an order that only the sizes
decide, so the same input gives the same bits.

Every value is read once, also where values are cut. Only a chunk whose sums are not finite is read again, to count.
"""

import math

import triton
import triton.language as tl

from tamegrad.torch import decide

__all__ = ["INTERPRETED", "KINDS", "add_chunks", "apply_chunk", "measure_chunk"]

# The columns of the table of tensors.
SIZE, GROUP, KIND_OF = (tl.constexpr(column) for column in range(3))
FACTS = tl.constexpr(3)

# What the column KIND_OF counts. A complex value is a pair of real ones.
KINDS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
FLOAT16, BFLOAT16, FLOAT32, FLOAT64, COMPLEX64, COMPLEX128 = (tl.constexpr(kind) for kind in range(len(KINDS)))
HOW_MANY = tl.constexpr(len(KINDS))

# Triton's kernels see constants of a module as these only.
COLUMNS = tl.constexpr(decide.COLUMNS)
BEFORE, NONFINITE, AFTER = (tl.constexpr(part.start) for part in (decide.BEFORE, decide.NONFINITE, decide.AFTER))
CUT = tl.constexpr(decide.CUT)
SMALL_BELOW, BIG_ABOVE = tl.constexpr(decide.SMALL_BELOW), tl.constexpr(decide.BIG_ABOVE)
SMALL_FACTOR, BIG_FACTOR = tl.constexpr(decide.SMALL_FACTOR), tl.constexpr(decide.BIG_FACTOR)
INFINITY = tl.constexpr(math.inf)


@triton.jit
def measure_chunk(
    addresses,
    facts,
    chunks,
    limits,
    partial,
    PRESENT: tl.constexpr,
    LIMITED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the sums of one chunk to its row of `partial`.

    It is compiled for what there is: `PRESENT` has a bit for each dtype, `LIMITED` says whether a group may have a
    limit, `ALIGNED` whether all addresses allow for the widest loads.
    """
    chunk = tl.program_id(0)
    address, fact, start, stop = _find(addresses, facts, chunks, chunk, CHUNK)
    limit = tl.load(limits + tl.load(fact + GROUP))
    kind = tl.load(fact + KIND_OF)
    row = partial + chunk.to(tl.int64) * COLUMNS
    for KIND in tl.static_range(HOW_MANY):
        if PRESENT >> KIND & 1:
            if kind == KIND:
                values = _pointer(address, KIND, ALIGNED)
                _measure(values, start, stop, limit, row, LIMITED, KIND >= COMPLEX64, BLOCK)


@triton.jit
def add_chunks(partial, ends, table, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds up the rows of one group's chunks, which follow each other, to the group's row of `table`."""
    group = tl.program_id(0)
    first, last = tl.load(ends + group), tl.load(ends + group + 1)
    columns = tl.arange(0, WIDTH)
    sums = tl.zeros((ROWS, WIDTH), tl.float64)
    for begin in range(first, last, ROWS):
        rows = begin + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & (columns < COLUMNS)[None, :]
        sums += tl.load(partial + rows[:, None] * COLUMNS + columns[None, :], mask=inside, other=0.0)
    tl.store(table + group.to(tl.int64) * COLUMNS + columns, tl.sum(sums, 0), mask=columns < COLUMNS)


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
    LIMITED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Changes the values of one chunk as was decided for its group; returns at once if that is to leave them."""
    address, fact, start, stop = _find(addresses, facts, chunks, tl.program_id(0), CHUNK)
    group = tl.load(fact + GROUP)
    first, second, limit = tl.load(firsts + group), tl.load(seconds + group), tl.load(limits + group)
    zero = tl.load(zeroed + group) != 0
    kind = tl.load(fact + KIND_OF)
    # Decision.changed
    if (first != 1.0) | (second != 1.0) | (limit < INFINITY) | zero:
        for KIND in tl.static_range(HOW_MANY):
            if PRESENT >> KIND & 1:
                if kind == KIND:
                    values = _pointer(address, KIND, ALIGNED)
                    # Real factors treat the parts of a complex value alike; only a limit must see both.
                    AS_PAIRS: tl.constexpr = LIMITED and KIND >= COMPLEX64
                    _change_chunk(values, start, stop, first, second, limit, zero, AS_PAIRS, BLOCK)


@triton.jit
def _find(addresses, facts, chunks, chunk, CHUNK: tl.constexpr):
    """Returns the address of a chunk's tensor, its row of facts, and where in it the chunk starts and stops."""
    place = chunks + chunk.to(tl.int64) * 2
    tensor, start = tl.load(place), tl.multiple_of(tl.load(place + 1), CHUNK)
    fact = facts + tensor * FACTS
    return tl.load(addresses + tensor), fact, start, tl.minimum(start + CHUNK, tl.load(fact + SIZE))


@triton.jit
def _pointer(address, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    if KIND == FLOAT16:
        values = address.to(tl.pointer_type(tl.float16))
    elif KIND == BFLOAT16:
        # As bits: Triton's interpreter converts subnormal ones wrongly, and GPUs before 2020 do not at all.
        values = address.to(tl.pointer_type(tl.int16))
    elif KIND == FLOAT32 or KIND == COMPLEX64:
        values = address.to(tl.pointer_type(tl.float32))
    else:
        values = address.to(tl.pointer_type(tl.float64))
    # Without the promise every value is loaded on its own.
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    return values


@triton.jit
def _measure(values, start, stop, limit, row, LIMITED: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    # The choice is the same for all values of a program: each way has a loop of its own, with nothing to ask in it.
    if not LIMITED or limit == INFINITY:
        total = _sum_chunk(values, start, stop, limit, row, False, False, BLOCK)
    else:
        total = _sum_chunk(values, start, stop, limit, row, True, PAIRS, BLOCK)
    # Sums are finite exactly if all values are; a NaN compares false.
    if total < INFINITY:
        _store3(row + NONFINITE, 0.0, 0.0, 0.0)
    else:
        _count_nonfinite(values, start, stop, row, BLOCK)


@triton.jit
def _sum_chunk(values, start, stop, limit, row, LIMITED: tl.constexpr, AS_PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the sums of squares before and after, and the count of cut values; returns the sum before."""
    LANES: tl.constexpr = BLOCK // 2 if AS_PAIRS else BLOCK
    small, middle, big = tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64), tl.zeros((LANES,), tl.float64)
    small_after, middle_after, big_after, cut = small, middle, big, small
    RANGES: tl.constexpr = values.dtype.element_ty == tl.float64
    whole = start + (stop - start) // BLOCK * BLOCK
    # Whole blocks first, without a mask, which would have every value loaded on its own; then what is left, if any.
    for PART in tl.static_range(2):
        for begin in range(start if PART == 0 else whole, whole if PART == 0 else stop, BLOCK):
            real, imaginary = _load(values, begin, stop, AS_PAIRS, PART == 1, BLOCK)
            small, middle, big = _add(real, imaginary, small, middle, big, RANGES, AS_PAIRS)
            if LIMITED:
                cut += tl.where(_magnitude(real, imaginary, AS_PAIRS) > limit, 1.0, 0.0)
                real, imaginary = _limited(real, imaginary, limit, AS_PAIRS)
                # A threshold may be so small that its square is not in the middle range, whatever the dtype.
                small_after, middle_after, big_after = _add(
                    real, imaginary, small_after, middle_after, big_after, True, AS_PAIRS
                )
    before = tl.sum(small), tl.sum(middle), tl.sum(big)
    _store3(row + BEFORE, before[0], before[1], before[2])
    _store3(row + AFTER, tl.sum(small_after), tl.sum(middle_after), tl.sum(big_after))
    tl.store(row + CUT, tl.sum(cut))
    return before[0] + before[1] + before[2]


@triton.jit
def _count_nonfinite(values, start, stop, row, BLOCK: tl.constexpr):
    nan, plus, minus = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for begin in range(start, stop, BLOCK):
        wide, _ = _load(values, begin, stop, False, True, BLOCK)
        nan += tl.where(wide != wide, 1.0, 0.0)
        plus += tl.where(wide == INFINITY, 1.0, 0.0)
        minus += tl.where(wide == -INFINITY, 1.0, 0.0)
    _store3(row + NONFINITE, tl.sum(nan), tl.sum(plus), tl.sum(minus))


@triton.jit
def _change_chunk(values, start, stop, first, second, limit, zero, AS_PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    whole = start + (stop - start) // BLOCK * BLOCK
    for PART in tl.static_range(2):
        for begin in range(start if PART == 0 else whole, whole if PART == 0 else stop, BLOCK):
            real, imaginary = _load(values, begin, stop, AS_PAIRS, PART == 1, BLOCK)
            real, imaginary = _limited(real * first * second, imaginary * first * second, limit, AS_PAIRS)
            real, imaginary = tl.where(zero, 0.0, real), tl.where(zero, 0.0, imaginary)
            _store(values, begin, stop, real, imaginary, AS_PAIRS, PART == 1, BLOCK)


@triton.jit
def _load(values, begin, stop, AS_PAIRS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns a block of real numbers in float64: real and imaginary parts, or twice the same where not `AS_PAIRS`."""
    if AS_PAIRS:
        places = begin + 2 * tl.arange(0, BLOCK // 2)
        real = _widened(tl.load(values + places, mask=places < stop, other=0.0))
        imaginary = _widened(tl.load(values + places + 1, mask=places < stop, other=0.0))
    else:
        places = begin + tl.arange(0, BLOCK)
        if MASKED:
            real = _widened(tl.load(values + places, mask=places < stop, other=0.0))
        else:
            real = _widened(tl.load(values + places))
        imaginary = real
    return real, imaginary


@triton.jit
def _store(values, begin, stop, real, imaginary, AS_PAIRS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    if AS_PAIRS:
        places = begin + 2 * tl.arange(0, BLOCK // 2)
        tl.store(values + places, _narrowed(real, values.dtype.element_ty), mask=places < stop)
        tl.store(values + places + 1, _narrowed(imaginary, values.dtype.element_ty), mask=places < stop)
    else:
        places = begin + tl.arange(0, BLOCK)
        if MASKED:
            tl.store(values + places, _narrowed(real, values.dtype.element_ty), mask=places < stop)
        else:
            tl.store(values + places, _narrowed(real, values.dtype.element_ty))


@triton.jit
def _widened(raw):
    if raw.dtype == tl.int16:
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    return raw.to(tl.float64)


@triton.jit
def _narrowed(wide, STORED: tl.constexpr):
    if STORED == tl.float64:
        return wide
    # By way of float32, as PyTorch does: not every device goes from float64 to the 16-bit types.
    narrow = wide.to(tl.float32)
    if STORED == tl.int16:
        # To the nearest, a tie to the even one. No NaN comes here: a group that has one is zeroed or left as it is.
        bits = narrow.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    return narrow.to(STORED)


@triton.jit
def _add(real, imaginary, small, middle, big, RANGES: tl.constexpr, AS_PAIRS: tl.constexpr):
    """Adds squares to the sums of Blue's three ranges; those of float32 and smaller types all fit the middle one."""
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
    # A power of two, so that no square overflows or underflows and nothing is rounded.
    factor = tl.where(largest > BIG_ABOVE, BIG_FACTOR, tl.where(largest < SMALL_BELOW, SMALL_FACTOR, 1.0))
    real, imaginary = real * factor, imaginary * factor
    return tl.sqrt(real * real + imaginary * imaginary) / factor


@triton.jit
def _limited(real, imaginary, limit, AS_PAIRS: tl.constexpr):
    """Cuts magnitudes to a limit; a complex value keeps its direction."""
    if AS_PAIRS:
        magnitude = _magnitude(real, imaginary, AS_PAIRS)
        over = magnitude > limit
        # A magnitude may be past what a float64 holds; that of a half never is.
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


# Under TRITON_INTERPRET=1 the kernels are run by NumPy, on memory of the host.
INTERPRETED = not isinstance(measure_chunk, triton.runtime.JITFunction)
