"""What `tamegrad.torch.decide.decide` says, compiled: one walk over the groups instead of thirty calls of NumPy.

What is decided is one array, a row a group: several arrays take several times as long to make, and so do tensors.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.strategies import OnNonfinite
from tamegrad.torch.decide import AFTER, BIG_FACTOR, CUT, NONFINITE, SMALL_FACTOR, SMALLEST_NORMAL, Decision, Thresholds
from tamegrad.torch.deferred import Deferred
from tamegrad.torch.kernels.jit import Entry, inlined

__all__ = ["HostDecision", "Kept", "are_kept", "changes_of", "decide_compiled"]

# The columns of what is decided, as `Decision` names them: first what the loops that apply it read. One more row begins
# with the total norm.
_COLUMNS = ("first", "second", "limits", "zeroed", "norms", "scales", "norms_after", "clipped", "nonfinite")
_DTYPES = {"zeroed": np.bool_, "clipped": np.bool_, "nonfinite": np.int64}
# What they are of a group that is left as it is, but for its norm.
_KEPT = {
    "first": 1.0,
    "second": 1.0,
    "limits": math.inf,
    "zeroed": False,
    "scales": 1.0,
    "clipped": False,
    "nonfinite": 0,
}
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


@inlined
def are_kept(sums: Any, groups: Any, largest: Any, renormalizes: Any, norms: Any) -> Any:
    """Says whether all groups are finite and left as they are, as mostly. Only for compiled code.

    Args:
        sums: `(M,)`: the sum of squares of each chunk, all of them in the middle range; -1 where there is more to say.
        groups: `(M,)`: the group of each chunk.
        largest: `Thresholds.norms`.
        renormalizes: `Thresholds.renormalizes`.
        norms: `(G + 1,)`, written if they are: the norm of each group, and of all of them.
    """
    norms[:] = 0.0
    for index in range(sums.size):
        if not sums[index] >= 0.0:
            return False
        norms[groups[index]] += sums[index]
    total = 0.0
    for group in range(largest.size):
        total += norms[group]
        norms[group] = math.sqrt(norms[group])
        if norms[group] > largest[group] or (renormalizes[group] and 0.0 < norms[group] < largest[group]):
            return False
    norms[-1] = math.sqrt(total)
    return True


def _decide(table: Any, largest: Any, limits: Any, renormalizes: Any, zero: Any, decided: Any) -> Any:
    """Decides on every group; returns whether any changes, and whether any is not finite."""
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
        cut, zeroed = finite and row[CUT] > 0.0, zero and not finite

        norm_after, scale, first, second = norm, 1.0, 1.0, 1.0
        if over or (finite and renormalizes[group] and root > 0.0 and norm < largest[group]):
            ratio = largest[group] / root
            norm_after, scale, first, second = largest[group], ratio / unit, 1.0, ratio / unit
            if not SMALLEST_NORMAL <= scale < math.inf:
                first, second = 1.0 / unit, ratio
        if cut:
            root_after, unit_after = _norm(row[_AFTER], row[_AFTER + 1], row[_AFTER + 2])
            norm_after, scale = root_after * unit_after, root_after / root * (unit_after / unit)
        if zeroed:
            norm_after, scale = 0.0, 0.0

        out = decided[group]
        out[0], out[1], out[2], out[3] = first, second, limits[group] if cut else math.inf, zeroed
        out[4], out[5], out[6], out[7], out[8] = norm, scale, norm_after, over or cut, nonfinite
        any_changes |= _changes(out)
        any_nonfinite |= not finite
    root, unit = _norm(sums[0], sums[1], sums[2])
    decided[-1, 0] = root * unit
    return any_changes, any_nonfinite


@inlined
def _changes(row: Any) -> Any:
    return row[0] != 1.0 or row[1] != 1.0 or row[2] != math.inf or row[3] != 0.0


def _changes_of(decided: Any, group_of: Any, changes: Any) -> Any:
    all_change = True
    for position in range(group_of.size):
        changes[position] = _changes(decided[group_of[position]])
        all_change &= changes[position]
    return all_change


_decide_compiled = Entry(_decide, nogil=True)
_changes_of_compiled = Entry(_changes_of, nogil=True)


class HostDecision(Deferred, Decision):
    """A decision that compiled code made and reads; each of its tensors is made when it is first read.

    Args:
        decided: `(G + 1, 9)`: in the columns what `_COLUMNS` says; the last row begins with the total norm.
        may_change: Whether any group changes.
        may_be_nonfinite: Whether any group has a NaN or an infinity.
    """

    decided: NDArray[np.float64]

    def __init__(self, decided: NDArray[np.float64], *, may_change: bool, may_be_nonfinite: bool) -> None:
        vars(self).update(decided=decided, may_change=may_change, may_be_nonfinite=may_be_nonfinite)

    def _make(self, name: str) -> Tensor:
        if name == "total_norm":
            return torch.tensor(self.decided[-1, 0])
        column = self.decided[:-1, _COLUMNS.index(name)]
        return torch.from_numpy(column.astype(_DTYPES.get(name, np.float64)))


class Kept(Deferred, Decision):
    """The decision to leave all groups, which are finite, as they are; each tensor is made when it is first read.

    Args:
        norms: `(G + 1,)` float64: the norm of each group, and of all of them.
    """

    may_change = False
    may_be_nonfinite = False
    _all_norms: NDArray[np.float64]

    def __init__(self, norms: NDArray[np.float64]) -> None:
        vars(self)["_all_norms"] = norms

    def _make(self, name: str) -> Tensor:
        if name == "total_norm":
            return torch.tensor(self._all_norms[-1])
        if name in _KEPT:
            return torch.from_numpy(np.full(len(self._all_norms) - 1, _KEPT[name]))
        return torch.from_numpy(self._all_norms[:-1].copy())


def decide_compiled(table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, steps: Tensor) -> HostDecision:
    """Decides on every group from what was measured.

    Args:
        table: `(G, COLUMNS)` float64 on the CPU.
        thresholds: The plan's, on the CPU.
        on_nonfinite: What happens to a group with NaN or infinity.
        steps: As in `decide`.

    Returns:
        What `decide` returns, and whether there is anything to do.
    """
    decided = np.empty((len(table) + 1, len(_COLUMNS)))
    may_change, may_be_nonfinite = _decide_compiled(table.numpy(), *thresholds.arrays, on_nonfinite == "zero", decided)
    decision = HostDecision(decided, may_change=may_change, may_be_nonfinite=may_be_nonfinite)
    if may_be_nonfinite:
        steps += decision.nonfinite > 0
    return decision


def changes_of(decided: NDArray[np.float64], group_of: NDArray[np.int64]) -> tuple[NDArray[np.bool_], bool]:
    """Returns which gradients change.

    Args:
        decided: Of a `HostDecision`.
        group_of: `(P,)`: the group of each parameter.

    Returns:
        `(P,)`: whether each parameter's gradient changes; and whether all do.
    """
    changes = np.empty(group_of.shape, np.bool_)
    return changes, bool(_changes_of_compiled(decided, group_of, changes))
