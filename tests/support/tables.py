"""Tables of sums, as backends measure them."""

import numpy as np
from numpy.typing import NDArray

from tamegrad.decide import COLUMNS
from tamegrad.ranges import BIG_ABOVE, BIG_FACTOR, SMALL_BELOW, SMALL_FACTOR

__all__ = ["a_table"]


def a_table(norms: list[float]) -> NDArray[np.float64]:
    """Returns what is measured of groups of one value each."""
    table = np.zeros((len(norms), COLUMNS))
    for row, norm in zip(table, norms, strict=True):
        if norm > BIG_ABOVE:
            row[2] = (norm * BIG_FACTOR) ** 2
        elif norm < SMALL_BELOW:
            row[0] = (norm * SMALL_FACTOR) ** 2
        else:
            row[1] = norm**2
    return table
