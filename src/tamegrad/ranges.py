"""The ranges in which squares are summed, so that none overflows or underflows, and norms from the sums of all three.

Small and big values are multiplied by a power of two before they are squared (J. L. Blue, A Portable Fortran Program to
Find the Euclidean Norm of a Vector, ACM TOMS 4(1), 1978, with the constants of LAPACK's dnrm2).

`xp` is the namespace of the arrays: `numpy`, `torch` or `jax.numpy`.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from tamegrad.strategies import AnyArray

__all__ = [
    "BIG_ABOVE",
    "BIG_EXPONENT",
    "BIG_FACTOR",
    "FORMATS",
    "LARGEST_EXPONENT",
    "SAFE_ABOVE",
    "SAFE_BELOW",
    "SMALLEST_EXPONENT",
    "SMALLEST_NORMAL",
    "SMALL_BELOW",
    "SMALL_EXPONENT",
    "SMALL_FACTOR",
    "Format",
    "ldexp",
    "norms_of",
]

SMALL_BELOW, BIG_ABOVE = 2.0**-511, 2.0**486
# What values are multiplied by before they are squared.
SMALL_EXPONENT, BIG_EXPONENT = 537, -538
SMALL_FACTOR, BIG_FACTOR = 2.0**SMALL_EXPONENT, 2.0**BIG_EXPONENT
SMALLEST_NORMAL = 2.0**-1022
# A sum of squares between these is accurate: no square overflowed, and squares below the smallest normal number are too
# few to matter in a tensor, or a piece of one.
SAFE_ABOVE, SAFE_BELOW = 2.0**-900, 2.0**972
# The powers of two that a float64 holds.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -1074, 1023


@dataclass(frozen=True, slots=True)
class Format:
    """The floats that a table consists of, and the ranges of its sums.

    Args:
        small_exponent: Small values are multiplied by two to this power before they are squared.
        big_exponent: The same for big values.
        smallest_exponent: The smallest power of two that there is.
        largest_exponent: The largest.
        fraction_bits: How many bits stand behind the point.
        floats: The name of the dtype.
        integers: The name of the dtype of integers of the same size.
    """

    small_exponent: int
    big_exponent: int
    smallest_exponent: int
    largest_exponent: int
    fraction_bits: int
    floats: str
    integers: str

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all bits behind the point."""
        return 2.0 ** (1 - self.largest_exponent)


# By the size of a number in bytes. Tables are of float64; by default JAX has only float32. There the big factor leaves
# room for the squares of 2^51 values as large as float32 has them.
FORMATS = {
    8: Format(SMALL_EXPONENT, BIG_EXPONENT, SMALLEST_EXPONENT, LARGEST_EXPONENT, 52, "float64", "int64"),
    4: Format(75, -90, -149, 127, 23, "float32", "int32"),
}


def ldexp(xp: ModuleType, values: AnyArray, exponent: AnyArray) -> AnyArray:
    """Multiplies by powers of two that may be past what one float holds, and rounds at most once."""
    if xp is np:
        return np.ldexp(values, exponent)
    # PyTorch's ldexp takes its power of two in float32, and JAX's exp2 is not exact.
    largest = FORMATS[exponent.dtype.itemsize].largest_exponent
    half = xp.clip(exponent // 2, -largest, largest)
    return values * _power_of_two(xp, half) * _power_of_two(xp, exponent - half)


def _power_of_two(xp: ModuleType, exponent: AnyArray) -> AnyArray:
    """Returns powers of two, subnormal ones included: two normal ones, made of their bits and multiplied."""
    form, half = FORMATS[exponent.dtype.itemsize], exponent // 2
    floats = getattr(xp, form.floats)
    first, second = (
        ((part + form.largest_exponent) << form.fraction_bits).view(floats) for part in (half, exponent - half)
    )
    return first * second


def norms_of(xp: ModuleType, squares: AnyArray) -> tuple[AnyArray, AnyArray | None]:
    """Combines the three ranges of `(G, 3)` sums of squares to norms `root·2^exponent`; None stands for zeros."""
    small, middle, big = squares[:, 0], squares[:, 1], squares[:, 2]
    if xp is np and not squares[:, ::2].any():
        # The usual case, which only the host can afford to look for.
        return np.sqrt(middle), None
    form = FORMATS[squares.dtype.itemsize]
    small_factor, big_factor = 2.0**form.small_exponent, 2.0**form.big_exponent
    is_big, is_small = big > 0, (big == 0) & (middle == 0)
    # In the big range the smallest values no longer count; below it, small and middle ones may both.
    # XLA would multiply the two factors first, which is 0 in float32. hypot(inf, nan) is inf.
    root_big = xp.sqrt(big + xp.square(xp.sqrt(middle) * big_factor))
    root_middle = xp.hypot(xp.sqrt(middle), xp.sqrt(small) / small_factor)
    root = xp.where(is_big, root_big, xp.where(is_small, xp.sqrt(small), root_middle))
    none = xp.zeros_like(root, dtype=getattr(xp, form.integers))
    exponent = xp.where(is_big, none - form.big_exponent, xp.where(is_small, none - form.small_exponent, none))
    return root, exponent
