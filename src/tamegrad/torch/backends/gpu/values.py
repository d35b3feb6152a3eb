"""What the Triton kernels do with values: loads and stores in all dtypes, sums of squares in three ranges, limits.

All arithmetic is in float64. Kernels see a module's constants only as `constexpr`.
"""

import math

import torch
import triton
import triton.language as tl

from tamegrad import ranges
from tamegrad.torch.memory import DTYPES

__all__ = [
    "BIG_FACTOR",
    "COMPLEX64",
    "INFINITY",
    "SMALL_FACTOR",
    "add_squares",
    "blocks_of",
    "limited",
    "load",
    "magnitude_of",
    "pointer_to",
    "store",
]

FLOAT16, BFLOAT16 = tl.constexpr(DTYPES.index(torch.float16)), tl.constexpr(DTYPES.index(torch.bfloat16))
FLOAT32, COMPLEX64 = tl.constexpr(DTYPES.index(torch.float32)), tl.constexpr(DTYPES.index(torch.complex64))
# The bytes of a real number of each dtype.
SIZES = tl.constexpr(tuple(dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize for dtype in DTYPES))
# The widest loads of a thread need addresses that are multiples of this many bytes.
WIDEST = tl.constexpr(16)

SMALL_BELOW, BIG_ABOVE = tl.constexpr(ranges.SMALL_BELOW), tl.constexpr(ranges.BIG_ABOVE)
SMALL_FACTOR, BIG_FACTOR = tl.constexpr(ranges.SMALL_FACTOR), tl.constexpr(ranges.BIG_FACTOR)
INFINITY = tl.constexpr(math.inf)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, AS_PAIRS: tl.constexpr):
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
def blocks_of(start, stop, shift, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the range of the blocks of a chunk that are whole, or of those that are not: the first and the last."""
    high = stop + shift
    end = start + (high - start) // BLOCK * BLOCK
    if WHOLE:
        first, last, step = tl.where(shift > 0, start + BLOCK, start), end, BLOCK
    else:
        first, last, step = tl.where(shift > 0, start, end), high, tl.maximum(end - start, BLOCK)
    return tl.multiple_of(first, BLOCK), last, step


@triton.jit
def load(values, begin, low, high, AS_PAIRS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
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
def store(values, begin, low, high, real, imaginary, AS_PAIRS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a block that `load` returned; `low` and `high` bound what is written if it is masked."""
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
def add_squares(real, imaginary, small, middle, big, RANGES: tl.constexpr, AS_PAIRS: tl.constexpr):
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
def magnitude_of(real, imaginary, AS_PAIRS: tl.constexpr):
    """Returns magnitudes; those of complex values neither overflow nor underflow on the way."""
    if not AS_PAIRS:
        return tl.abs(real)
    largest = tl.maximum(tl.abs(real), tl.abs(imaginary))
    # A power of two rounds nothing, and with this one no square overflows or underflows.
    factor = tl.where(largest > BIG_ABOVE, BIG_FACTOR, tl.where(largest < SMALL_BELOW, SMALL_FACTOR, 1.0))
    real, imaginary = real * factor, imaginary * factor
    return tl.sqrt(real * real + imaginary * imaginary) / factor


@triton.jit
def limited(real, imaginary, limit, AS_PAIRS: tl.constexpr):
    """Cuts magnitudes to a limit; complex values keep their direction."""
    if AS_PAIRS:
        magnitude = magnitude_of(real, imaginary, AS_PAIRS)
        over = magnitude > limit
        # The magnitude may overflow float64; half of it never does.
        factor = tl.where(magnitude == INFINITY, 0.5, 1.0)
        divisor = tl.where(over, magnitude_of(real * factor, imaginary * factor, AS_PAIRS), 1.0)
        real = tl.where(over, real * factor / divisor * limit, real)
        imaginary = tl.where(over, imaginary * factor / divisor * limit, imaginary)
    else:
        real = tl.where(real > limit, limit, tl.where(real < -limit, -limit, real))
        imaginary = real
    return real, imaginary
