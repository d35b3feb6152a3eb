"""What `tamegrad.torch.decide.decide` says, compiled: one walk over the groups instead of thirty calls of NumPy."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.strategies import OnNonfinite
from tamegrad.torch.decide import AFTER, BIG_FACTOR, CUT, NONFINITE, SMALL_FACTOR, SMALLEST_NORMAL, Decision, Thresholds
from tamegrad.torch.kernels.jit import Entry, inlined

__all__ = ["decide_compiled", "factors_of"]

# Where in a row of the table the counts and the sums after begin.
_NONFINITE, _AFTER = NONFINITE.start, AFTER.start


@inlined
def _norm(small: Any, middle: Any, big: Any) -> Any:
    """Combines three sums of squares to a norm `root·unit`, where `unit` is a power of two."""
    if big > 0.0:
        return math.sqrt(big + middle * BIG_FACTOR * BIG_FACTOR), 1.0 / BIG_FACTOR
    if small == 0.0:
        return math.sqrt(middle), 1.0
    if middle == 0.0:
        return math.sqrt(small), 1.0 / SMALL_FACTOR
    return math.hypot(math.sqrt(middle), math.sqrt(small) / SMALL_FACTOR), 1.0


def _decide_rows(
    table: Any, largest: Any, limits: Any, renormalizes: Any, zero: Any, reals: Any, counts: Any, flags: Any, total: Any
) -> Any:
    """Writes the fields of a `Decision`; returns whether any group changes, and whether any is not finite."""
    norms, scales, norms_after, firsts, seconds, cuts = reals
    clipped, zeroed = flags
    any_changes, any_nonfinite = False, False
    sums = np.zeros(3)
    for group in range(table.shape[0]):
        row = table[group]
        for column in range(3):
            sums[column] += row[column]
        root, unit = _norm(row[0], row[1], row[2])
        nonfinite = row[_NONFINITE] + row[_NONFINITE + 1] + row[_NONFINITE + 2]
        norm, finite = root * unit, nonfinite == 0.0
        over = finite and norm > largest[group]
        cut = finite and row[CUT] > 0.0

        norm_after, scale, first, second = norm, 1.0, 1.0, 1.0
        if over or (finite and renormalizes[group] and root > 0.0 and norm < largest[group]):
            ratio = largest[group] / root
            norm_after, scale, first, second = largest[group], ratio / unit, 1.0, ratio / unit
            if not SMALLEST_NORMAL <= scale < math.inf:
                first, second = 1.0 / unit, ratio
        if cut:
            root_after, unit_after = _norm(row[_AFTER], row[_AFTER + 1], row[_AFTER + 2])
            norm_after, scale = root_after * unit_after, root_after / root * (unit_after / unit)
        if zero and not finite:
            norm_after, scale = 0.0, 0.0

        norms[group], scales[group], norms_after[group] = norm, scale, norm_after
        firsts[group], seconds[group], cuts[group] = first, second, limits[group] if cut else math.inf
        clipped[group], zeroed[group], counts[group] = over or cut, zero and not finite, np.int64(nonfinite)
        any_changes |= first != 1.0 or second != 1.0 or cuts[group] < math.inf or zeroed[group]
        any_nonfinite |= not finite
    root, unit = _norm(sums[0], sums[1], sums[2])
    total[()] = root * unit
    return any_changes, any_nonfinite


def _factors_of(columns: Any, group_of: Any, factors: Any, changes: Any) -> Any:
    first, second, limits, zeroed = columns
    for group in range(factors.shape[0]):
        row = factors[group]
        row[0], row[1], row[2], row[3] = first[group], second[group], limits[group], zeroed[group]
    all_change = True
    for position in range(group_of.size):
        row = factors[group_of[position]]
        changes[position] = row[0] != 1.0 or row[1] != 1.0 or row[2] != math.inf or row[3] != 0.0
        all_change &= changes[position]
    return all_change


_decide_rows_compiled = Entry(_decide_rows, nogil=True)
_factors_of_compiled = Entry(_factors_of, nogil=True)


def decide_compiled(table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, steps: Tensor) -> Decision:
    """Decides on every group from what was measured.

    Args:
        table: `(G, COLUMNS)` float64 on the CPU.
        thresholds: The plan's, on the CPU.
        on_nonfinite: What happens to a group with NaN or infinity.
        steps: As in `decide`.

    Returns:
        What `decide` returns, and whether there is anything to do.
    """
    groups = table.shape[0]
    reals, counts, flags = np.empty((6, groups)), np.empty(groups, np.int64), np.empty((2, groups), np.bool_)
    total = np.empty(())
    may_change, may_be_nonfinite = _decide_rows_compiled(
        table.numpy(),
        *thresholds.arrays,
        on_nonfinite == "zero",
        reals,
        counts,
        flags,
        total,
    )
    nonfinite = torch.from_numpy(counts)
    if may_be_nonfinite:
        steps += nonfinite > 0
    # Not unbind: with caches cold every other function of PyTorch takes tens of microseconds.
    norms, scales, norms_after, first, second, limits = map(torch.from_numpy, reals)
    clipped, zeroed = map(torch.from_numpy, flags)
    return Decision(
        norms=norms,
        scales=scales,
        norms_after=norms_after,
        clipped=clipped,
        nonfinite=nonfinite,
        total_norm=torch.from_numpy(total),
        first=first,
        second=second,
        limits=limits,
        zeroed=zeroed,
        may_change=may_change,
        may_be_nonfinite=may_be_nonfinite,
    )


def factors_of(decision: Decision, group_of: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_], bool]:
    """Lays a decision out for the loops that apply it.

    Args:
        decision: The decision, on the CPU.
        group_of: `(P,)`: the group of each parameter.

    Returns:
        `(G, 4)`: the factors, the limit, and whether to zero it of each group; `(P,)`: whether each parameter's
        gradient changes; and whether all do.
    """
    columns = decision.first, decision.second, decision.limits, decision.zeroed
    factors, changes = np.empty((len(decision.first), 4)), np.empty(group_of.shape, np.bool_)
    all_change = _factors_of_compiled(tuple(column.numpy() for column in columns), group_of, factors, changes)
    return factors, changes, bool(all_change)
