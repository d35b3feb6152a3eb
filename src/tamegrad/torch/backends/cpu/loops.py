"""The compiled loops of the CPU backend, over chunks of gradients given by address.

A chunk is a row `(position, start, length)`: the position of its gradient among the plan's parameters, and a range of
its real numbers; a complex number is two of them. Every loop runs over a slice from 0: an index that starts elsewhere
may be negative as far as Numba knows, and then it does not vectorize.

NumPy has no bfloat16, and Numba no float16 on the CPU. Both are read as 16-bit integers with the same bits: `uint16`
stands for bfloat16 and `int16` for float16.
"""

import math
from typing import Any

import numpy as np
from numba import carray
from numba.extending import overload

from tamegrad.ranges import BIG_ABOVE, BIG_FACTOR, SAFE_ABOVE, SAFE_BELOW, SMALL_BELOW, SMALL_FACTOR
from tamegrad.torch.backends.cpu.compiler import (
    Entry,
    half_to_single,
    in_parallel,
    inlined,
    pointer_to,
    reordered,
    single_to_half,
    take_one,
)

__all__ = ["BLOCK", "change_chunks", "measure_chunks"]

# Sums are taken in blocks, which keeps the rounding errors of a long sum small.
BLOCK = 4096


def widened(value: Any) -> Any:
    """Returns the value that bits encode, as float64. Only for compiled code."""
    raise NotImplementedError


def narrowed(value: Any, like: Any) -> Any:
    """Returns the bits of a float64 rounded to the dtype of an array. Only for compiled code."""
    raise NotImplementedError


def _from_bfloat16(value: Any) -> Any:
    return np.float64(np.uint32(np.uint32(value) << 16).view(np.float32))


def _from_float16(value: Any) -> Any:
    return np.float64(half_to_single(value))


def _from_float(value: Any) -> Any:
    return np.float64(value)


def _to_bfloat16(value: Any, like: Any) -> Any:
    word = np.float32(value).view(np.uint32)
    return np.uint16(np.uint32(word + 0x7FFF + ((word >> 16) & 1)) >> 16)


def _to_float16(value: Any, like: Any) -> Any:
    return single_to_half(np.float32(value))


def _to_float32(value: Any, like: Any) -> Any:
    return np.float32(value)


def _to_float64(value: Any, like: Any) -> Any:
    return value


@overload(widened)  # type: ignore[untyped-decorator]
def _widened(value: Any) -> Any:
    return {"uint16": _from_bfloat16, "int16": _from_float16}.get(value.name, _from_float)


@overload(narrowed)  # type: ignore[untyped-decorator]
def _narrowed(value: Any, like: Any) -> Any:
    del value
    roundings = {"uint16": _to_bfloat16, "int16": _to_float16, "float32": _to_float32}
    return roundings.get(like.dtype.name, _to_float64)


def largest(values: Any) -> Any:
    """Returns the largest magnitude of some values as float64; NaN counts as the largest. Only for compiled code."""
    raise NotImplementedError


@reordered
def _largest_bits(bits: Any, magnitude: Any) -> Any:
    """Returns the largest of the masked integers; without the sign bit, floats have the same order as their bits."""
    most = bits.dtype.type(0)
    for index in range(bits.size):
        most = max(most, bits.dtype.type(bits[index] & magnitude))
    return most


def _largest_half(values: Any) -> Any:
    return widened(_largest_bits(values, 0x7FFF))


def _largest_single(values: Any) -> Any:
    bits = np.int32(_largest_bits(values.view(np.int32), 0x7FFF_FFFF))
    return np.float64(bits.view(np.float32))


def _largest_double(values: Any) -> Any:
    bits = np.int64(_largest_bits(values.view(np.int64), 0x7FFF_FFFF_FFFF_FFFF))
    return bits.view(np.float64)


@overload(largest)  # type: ignore[untyped-decorator]
def _largest(values: Any) -> Any:
    return {"float32": _largest_single, "float64": _largest_double}.get(values.dtype.name, _largest_half)


@reordered
def _squares(values: Any) -> Any:
    total = 0.0
    for index in range(values.size):
        wide = widened(values[index])
        total += wide * wide
    return total


@reordered
def _squares_and_cut(values: Any, limit: Any) -> Any:
    """Sums the squares of real numbers twice: as they are, and cut to a limit."""
    before, after = 0.0, 0.0
    for index in range(values.size):
        magnitude = abs(widened(values[index]))
        before += magnitude * magnitude
        kept = min(magnitude, limit)
        after += kept * kept
    return before, after


@inlined
def _measure_quickly(values: Any) -> Any:
    total = 0.0
    for start in range(0, values.size, BLOCK):
        total += _squares(values[start : start + BLOCK])
    return total


@inlined
def _measure_cut_quickly(values: Any, limit: Any, row: Any) -> None:
    """Measures real numbers before and after a cut, reading a block twice only if it starts a run of cut ones."""
    cut = False
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        # If a block was cut, the next one usually is too.
        before, after = _squares_and_cut(block, limit) if cut else (_squares(block), 0.0)
        expected, cut = cut, largest(block) > limit
        if cut and not expected:
            before, after = _squares_and_cut(block, limit)
        row[1] += before
        row[7] += after if cut else before
        row[9] += cut


@inlined
def _add_square(magnitude: Any, sums: Any) -> None:
    """Adds a square to the sum of its range; NaN goes to the middle one, infinity to the big one."""
    if magnitude < SMALL_BELOW:
        sums[0] += (magnitude * SMALL_FACTOR) ** 2
    elif magnitude > BIG_ABOVE:
        sums[2] += (magnitude * BIG_FACTOR) ** 2
    else:
        sums[1] += magnitude * magnitude


@inlined
def _measure_slowly(values: Any, row: Any) -> None:
    """Sums squares in three ranges, and counts NaN, +inf and -inf."""
    row[0:3] = 0.0
    for index in range(values.size):
        wide = widened(values[index])
        _add_square(abs(wide), row[0:3])
        if math.isnan(wide):
            row[3] += 1.0
        elif math.isinf(wide):
            row[4 if wide > 0.0 else 5] += 1.0


@inlined
def _measure_cut_slowly(values: Any, limit: Any, row: Any, pairs: Any) -> None:
    """Sums squares after the cut in three ranges; of complex numbers, the magnitude is cut."""
    row[6:10] = 0.0
    step = 2 if pairs else 1
    for index in range(0, values.size, step):
        magnitude = abs(widened(values[index]))
        if pairs:
            magnitude = math.hypot(magnitude, widened(values[index + 1]))
        row[9] += magnitude > limit
        _add_square(min(magnitude, limit), row[6:9])


@inlined
def _is_safe(total: Any) -> Any:
    return SAFE_ABOVE < total < SAFE_BELOW


@inlined
def _measure(values: Any, row: Any) -> Any:
    """Returns the sum of squares if nothing else is to be reported, as usual; otherwise writes a row and returns -1."""
    total = _measure_quickly(values)
    if _is_safe(total) or largest(values) == 0.0:
        return total
    row[:] = 0.0
    _measure_slowly(values, row)
    return -1.0


@inlined
def _measure_cut(values: Any, limit: Any, pairs: Any, row: Any) -> Any:
    """Does the same for values with a limit; if none is cut, the sum after is the sum before."""
    if limit == np.inf:
        return _measure(values, row)
    row[:] = 0.0
    if pairs:
        row[1] = _measure_quickly(values)
    else:
        _measure_cut_quickly(values, limit, row)
    safe = _is_safe(row[1])
    if not safe and largest(values) == 0.0:
        return 0.0
    if not safe:
        _measure_slowly(values, row)
    if pairs or not _is_safe(row[7]):
        _measure_cut_slowly(values, limit, row, pairs)
    return row[1] if safe and row[9] == 0.0 else -1.0


@inlined
def _values_of(chunk: Any, addresses: Any, like: Any) -> Any:
    position, start, length = chunk
    return carray(pointer_to(addresses[position] + start * like.itemsize, like), length)


@inlined
def _measure_tasks(
    taken: Any, bounds: Any, chunks: Any, addresses: Any, limits: Any, pairs: Any, like: Any, sums: Any, rows: Any
) -> None:
    task = take_one(taken)
    while task < bounds.size - 1:
        for index in range(bounds[task], bounds[task + 1]):
            values = _values_of(chunks[index], addresses, like)
            # Numba compiles one of these, by whether the argument is None: half of the time where nothing has a limit.
            if limits is None:
                sums[index] = _measure(values, rows[index])
            else:
                sums[index] = _measure_cut(values, limits[chunks[index, 0]], pairs, rows[index])
        task = take_one(taken)


def _measure_chunks(openmp: Any, threads: Any, arguments: Any) -> None:
    if openmp != 0:
        in_parallel(openmp, threads, _measure_tasks, arguments)
    else:
        _measure_tasks(*arguments)


@inlined
def _scale(values: Any, first: Any, second: Any) -> None:
    if first == 1.0:
        for index in range(values.size):
            values[index] = narrowed(widened(values[index]) * second, values)
    else:
        for index in range(values.size):
            values[index] = narrowed(widened(values[index]) * first * second, values)


def cut(values: Any, limit: Any) -> None:
    """Cuts real numbers to a limit; NaN stays. Only for compiled code.

    Rounding the limit to their dtype first changes nothing: a value above the limit is at or above the rounded one.
    """
    raise NotImplementedError


def _cut_bits(values: Any, limit: Any) -> None:
    most, infinity = narrowed(limit, values), narrowed(np.inf, values)
    bits_of = values.dtype.type
    for index in range(values.size):
        sign, magnitude = bits_of(values[index] & 0x8000), bits_of(values[index] & 0x7FFF)
        # The bits of NaN are above those of infinity.
        values[index] = sign | (magnitude if magnitude > infinity else min(magnitude, most))


def _cut_floats(values: Any, limit: Any) -> None:
    most = narrowed(limit, values)
    for index in range(values.size):
        values[index] = min(max(values[index], -most), most)


@overload(cut)  # type: ignore[untyped-decorator]
def _cut(values: Any, limit: Any) -> Any:
    del limit
    return _cut_floats if values.dtype.name in {"float32", "float64"} else _cut_bits


@inlined
def _cut_pairs(values: Any, limit: Any) -> None:
    for index in range(0, values.size, 2):
        real, imaginary = widened(values[index]), widened(values[index + 1])
        magnitude = math.hypot(real, imaginary)
        if magnitude > limit:
            if math.isinf(magnitude):
                # The magnitude overflows float64; that of half the number never does.
                real, imaginary = real / 2, imaginary / 2
                magnitude = math.hypot(real, imaginary)
            values[index] = narrowed(real / magnitude * limit, values)
            values[index + 1] = narrowed(imaginary / magnitude * limit, values)


@inlined
def _change(values: Any, first: Any, second: Any, limit: Any, zeroed: Any, pairs: Any) -> None:
    if zeroed:
        values[:] = 0
        return
    if first != 1.0 or second != 1.0:
        _scale(values, first, second)
    if limit < np.inf and pairs:
        _cut_pairs(values, limit)
    elif limit < np.inf:
        cut(values, limit)


@inlined
def _change_tasks(
    taken: Any, bounds: Any, chunks: Any, addresses: Any, group_of: Any, decided: Any, pairs: Any, like: Any
) -> None:
    # From the last to the first: what was measured last is still in the CPU cache.
    task = bounds.size - 2 - take_one(taken)
    while task >= 0:
        for index in range(bounds[task], bounds[task + 1]):
            values = _values_of(chunks[index], addresses, like)
            first, second, limit, zeroed = decided[group_of[chunks[index, 0]], :4]
            _change(values, first, second, limit, zeroed, pairs)
        task = bounds.size - 2 - take_one(taken)


def _change_chunks(openmp: Any, threads: Any, arguments: Any) -> None:
    if openmp != 0:
        in_parallel(openmp, threads, _change_tasks, arguments)
    else:
        _change_tasks(*arguments)


measure_chunks = Entry(_measure_chunks)
change_chunks = Entry(_change_chunks)
