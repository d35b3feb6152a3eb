"""The step between measuring and applying: arithmetic on one small table, on the device, without reading it.

`G` is the number of groups. What a backend measures is a `(G, COLUMNS)` float64 table of sums; it adds up over tensors,
devices and ranks. Squares are summed in three ranges (J. L. Blue, A Portable Fortran Program to Find the Euclidean
Norm of a Vector, ACM TOMS 4(1), 1978, with the constants of LAPACK's dnrm2), so that no finite float64 overflows or
underflows; the squares of float32 and smaller dtypes all fit the middle range.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.groups import Plan
from tamegrad.strategies import Clip, ClipValue, OnNonfinite, Renormalize

__all__ = ["Decision", "Thresholds", "decide", "norm_of"]

# Columns of the table: sums of squares before (small, middle, big), counts of NaN, +inf and -inf, and for groups under
# `ClipValue` the sums of squares after (small, middle, big) and how many values, or blocks of them, are cut.
BEFORE, NONFINITE, AFTER, CUT = slice(0, 3), slice(3, 6), slice(6, 9), 9
COLUMNS = 10

SMALL_BELOW, BIG_ABOVE = 2.0**-511, 2.0**486
SMALL_FACTOR, BIG_FACTOR = 2.0**537, 2.0**-538
SMALLEST_NORMAL = 2.0**-1022


@dataclass(frozen=True)
class Thresholds:
    """The strategies of a plan's groups as `(G,)` float64 vectors.

    Args:
        norms: The largest norm that is left alone: the threshold of `Clip`, 1 for `Renormalize`, else infinity.
        values: The largest magnitude that is left alone: the threshold of `ClipValue`, else infinity.
        renormalizes: Whether smaller norms are raised to `norms` as well; bool.
    """

    norms: Tensor
    values: Tensor
    renormalizes: Tensor

    @classmethod
    def of(cls, plan: Plan) -> "Thresholds":
        """Reads them off a plan."""
        norms, values, renormalizes = [], [], []
        for group in plan.groups:
            strategy = group.strategy
            renormalizes.append(isinstance(strategy, Renormalize))
            largest = strategy.threshold if isinstance(strategy, Clip) else math.inf
            norms.append(1.0 if renormalizes[-1] else largest)
            values.append(strategy.threshold if isinstance(strategy, ClipValue) else math.inf)
        wide = torch.float64
        return cls(torch.tensor(norms, dtype=wide), torch.tensor(values, dtype=wide), torch.tensor(renormalizes))

    @cached_property
    def on_host(self) -> bool:
        """Whether they are on the CPU."""
        return self.norms.device.type == "cpu"

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """The three as NumPy's; only where they are on the host."""
        return self.norms.numpy(), self.values.numpy(), self.renormalizes.numpy()

    def to(self, device: torch.device) -> "Thresholds":
        """Returns them on a device."""
        if self.norms.device == device:
            return self
        return Thresholds(self.norms.to(device), self.values.to(device), self.renormalizes.to(device))

    def times(self, factor: Tensor) -> "Thresholds":
        """Returns the thresholds for gradients that are multiplied by a factor, as a loss scale does."""
        factor = factor.to(self.norms)
        return Thresholds(self.norms * factor, self.values * factor, self.renormalizes)


@dataclass(frozen=True)
class Decision:
    """What becomes of every group, as `(G,)` vectors on the device of the table; the first six are a report's.

    A gradient `g` of the group becomes `g·first·second`, then at most `limit` in magnitude, or 0 where `zeroed`. There
    are two factors because one float64 cannot hold the scale of every float64 group; elsewhere the first is 1.

    The last two are False where the host knows, without reading a device, that no group changes or that all are finite.
    """

    norms: Tensor
    scales: Tensor
    norms_after: Tensor
    clipped: Tensor
    nonfinite: Tensor
    total_norm: Tensor
    first: Tensor
    second: Tensor
    limits: Tensor
    zeroed: Tensor
    may_change: bool = field(default=True, kw_only=True)
    may_be_nonfinite: bool = field(default=True, kw_only=True)

    @property
    def changed(self) -> Tensor:
        """Whether a group's values change at all; `(G,)` bool."""
        return (self.first != 1) | (self.second != 1) | (self.limits < math.inf) | self.zeroed


def decide(table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, steps: Tensor) -> Decision:
    """Decides on every group from what was measured; nothing is read from the device.

    Args:
        table: `(G, COLUMNS)` float64, as the backends measure it.
        thresholds: The plan's, on the same device.
        on_nonfinite: `"zero"` zeroes groups with a NaN or an infinity; with any other choice they are left as they are.
        steps: `(G,)` int64 on the same device; 1 is added to it for each group with a NaN or an infinity.

    Returns:
        The decision.
    """
    vectors = table, thresholds.norms, thresholds.values, thresholds.renormalizes
    if table.device.type != "cpu":
        decision = Decision(*_decide(torch, on_nonfinite, *vectors))
    else:
        # On the host NumPy does the same in a fifth of the time, most of which is the cost of a call.
        with np.errstate(all="ignore"):
            decided = _decide(np, on_nonfinite, table.numpy(), *thresholds.arrays)
        decision = Decision(*(torch.from_numpy(np.asarray(vector)) for vector in decided))
    steps += decision.nonfinite > 0
    return decision


def _decide(xp: ModuleType, on_nonfinite: OnNonfinite, *vectors: Any) -> tuple[Any, ...]:  # noqa: ANN401  see below
    """Decides on arrays of NumPy or PyTorch, whose functions `xp` has; returns the fields of a `Decision`."""
    table, largest, limits, renormalizes = vectors
    root, unit = _norm(xp, table[:, BEFORE])
    norms = root * unit
    nonfinite = table[:, NONFINITE].sum(1)
    finite = nonfinite == 0
    over = finite & (norms > largest)
    rescaled = over | (finite & renormalizes & (root > 0) & (norms < largest))
    cut = finite & (table[:, CUT] > 0)
    zeroed = ~finite if on_nonfinite == "zero" else xp.zeros_like(finite)

    one = xp.ones_like(norms)
    ratio = xp.where(rescaled, largest / root, one)
    scale = xp.where(rescaled, ratio / unit, one)
    fits = (scale >= SMALLEST_NORMAL) & (scale < math.inf)

    norms_after, scales = xp.where(rescaled, largest, norms), scale
    if xp is not np or cut.any():
        root_after, unit_after = _norm(xp, table[:, AFTER])
        norms_after = xp.where(cut, root_after * unit_after, norms_after)
        scales = xp.where(cut, root_after / root * (unit_after / unit), scale)
    total_root, total_unit = _norm(xp, table[:, BEFORE].sum(0)[None])
    return (
        norms,
        xp.where(zeroed, 0.0, scales),
        xp.where(zeroed, 0.0, norms_after),
        over | cut,
        xp.asarray(nonfinite, dtype=xp.int64),
        (total_root * total_unit)[0],
        xp.where(fits, one, 1 / unit),
        xp.where(fits, scale, ratio),
        xp.where(cut, limits, math.inf),
        zeroed,
    )


def norm_of(sums: Tensor) -> Tensor:
    """Returns the norm that `(COLUMNS,)` sums stand for, before anything is changed; 0-dim."""
    root, unit = _norm(torch, sums[BEFORE][None])
    norm: Tensor = (root * unit)[0]
    return norm


def _norm(xp: ModuleType, sums: Any) -> tuple[Any, Any]:  # noqa: ANN401  arrays of NumPy or PyTorch
    """Combines the three ranges of `(G, 3)` sums of squares to norms `root·unit`, where `unit` is a power of two."""
    small, middle, big = sums[:, 0], sums[:, 1], sums[:, 2]
    if xp is np and not (small.any() or big.any()):
        # The usual case, which only the host can afford to look for.
        return xp.sqrt(middle), xp.ones_like(middle)
    is_big, is_small = big > 0, (big == 0) & (middle == 0)
    # In the big range the smallest values no longer count; below it, small and middle ones may both.
    root_big = xp.sqrt(big + middle * BIG_FACTOR * BIG_FACTOR)
    root_middle = xp.hypot(xp.sqrt(middle), xp.sqrt(small) / SMALL_FACTOR)
    root = xp.where(is_big, root_big, xp.where(is_small, xp.sqrt(small), root_middle))
    one = xp.ones_like(root)
    unit = xp.where(is_big, one / BIG_FACTOR, xp.where(is_small, one / SMALL_FACTOR, one))
    return root, unit
