"""The plain backend: PyTorch's own operations, tensor by tensor, on any device that has float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tamegrad.groups import Plan
from tamegrad.strategies import ClipValue, OnNonfinite
from tamegrad.torch.decide import (
    AFTER,
    BEFORE,
    BIG_ABOVE,
    BIG_FACTOR,
    COLUMNS,
    CUT,
    NONFINITE,
    SMALL_BELOW,
    SMALL_FACTOR,
    Decision,
    Thresholds,
    decide,
)

__all__ = ["Kernels"]


class Kernels:
    """Measures and changes the gradients of one plan.

    Args:
        plan: The plan.
        counted: For each parameter whether it is measured; all are changed.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        self._plan = plan
        self._counted = counted

    def measure(self, gradients: Sequence[Tensor | None], thresholds: Thresholds) -> Tensor:
        """Measures all groups.

        Args:
            gradients: One a parameter of the plan, of any shape; None where there is none.
            thresholds: Of the step, on any device.

        Returns:
            `(G, COLUMNS)` float64 on the device of the first gradient, or on the CPU if there is none.
        """
        groups = self._plan.groups
        placed = zip(gradients, self._plan.group_of, self._counted, strict=True)
        present = [(gradient, group) for gradient, group, counted in placed if gradient is not None and counted]
        home = present[0][0].device if present else torch.device("cpu")
        table = torch.zeros(len(groups), COLUMNS, dtype=torch.float64, device=home)
        if present:
            limits = [
                thresholds.values[group] if isinstance(groups[group].strategy, ClipValue) else None
                for _, group in present
            ]
            measured = (_row(gradient, limit) for (gradient, _), limit in zip(present, limits, strict=True))
            rows = torch.stack([row.to(home) for row in measured])
            table.index_add_(0, torch.tensor([group for _, group in present], device=home), rows)
        return table

    def decide(self, table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, steps: Tensor) -> Decision:
        """Decides on every group, as `Backend` says."""
        return decide(table, thresholds, on_nonfinite, steps)

    def apply_(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Applies a decision in place.

        On the CPU a group that keeps its values is not touched. Elsewhere everything is multiplied, with factors of 1
        too, because to look at the decision would make the host wait for the device.

        Args:
            gradients: As they were measured.
            decision: What to do with each group.
        """
        on_host = decision.changed.device.type == "cpu"
        changed = decision.changed.tolist() if on_host else [True] * len(self._plan.groups)
        for gradient, group in zip(gradients, self._plan.group_of, strict=True):
            if gradient is not None and changed[group]:
                _apply_(gradient, group, decision)


def _apply_(gradient: Tensor, group: int, decision: Decision) -> None:
    """Changes one tensor."""
    vectors = (decision.first, decision.second, decision.limits, decision.zeroed)
    first, second, limit, zeroed = (vector[group].to(gradient.device) for vector in vectors)
    # Real views: a product of complex numbers would lose the sign of zeros.
    real = _as_real(gradient)
    wide = _limited(real.to(torch.float64) * first * second, limit, pairs=gradient.is_complex())
    real.copy_(wide.masked_fill_(zeroed, 0.0))


def _row(gradient: Tensor, limit: Tensor | None) -> Tensor:
    """Measures one tensor; with a limit also what it would be if its values were cut there."""
    real = _as_real(gradient)
    row = torch.zeros(COLUMNS, dtype=torch.float64, device=gradient.device)
    row[BEFORE] = _squares(real)
    # Sums are finite exactly if all values are; on the CPU it costs nothing to look, elsewhere counting is cheaper.
    if gradient.device.type != "cpu" or not row.isfinite().all():
        kinds = torch.isnan(real), torch.isposinf(real), torch.isneginf(real)
        row[NONFINITE] = torch.stack([kind.sum() for kind in kinds]).to(torch.float64)
    if limit is not None:
        wide, limit = real.to(torch.float64), limit.to(gradient.device)
        row[AFTER] = _squares(_limited(wide, limit, pairs=gradient.is_complex()))
        row[CUT] = (_magnitudes(wide, pairs=gradient.is_complex()) > limit).sum()
    return row


def _as_real(values: Tensor) -> Tensor:
    """Shows complex values as pairs of real ones in the same memory, along a new last dimension."""
    return torch.view_as_real(values) if values.is_complex() else values


def _magnitudes(wide: Tensor, *, pairs: bool) -> Tensor:
    return torch.hypot(wide[..., :1], wide[..., 1:]) if pairs else wide.abs()


def _limited(wide: Tensor, limit: Tensor, *, pairs: bool) -> Tensor:
    """Cuts magnitudes to a limit; a complex value, which is a pair, keeps its direction."""
    if not pairs:
        return wide.clamp(-limit, limit)
    magnitudes = _magnitudes(wide, pairs=True)
    # A magnitude may be past what a float64 holds; that of a half never is.
    held = torch.where(magnitudes.isinf(), wide / 2, wide)
    return torch.where(magnitudes > limit, held / _magnitudes(held, pairs=True) * limit, wide)


def _squares(values: Tensor) -> Tensor:
    """Returns the sums of squares in the small, middle and big range, `(3,)` float64."""
    if values.dtype != torch.float64:
        middle = torch.linalg.vector_norm(values, dtype=torch.float64).square()
        return torch.stack([torch.zeros_like(middle), middle, torch.zeros_like(middle)])
    magnitudes = values.abs()
    small, big = magnitudes < SMALL_BELOW, magnitudes > BIG_ABOVE
    ranges = (
        (magnitudes * SMALL_FACTOR).masked_fill_(~small, 0.0),
        magnitudes.masked_fill(small | big, 0.0),
        (magnitudes * BIG_FACTOR).masked_fill_(~big, 0.0),
    )
    return torch.stack([scaled.square_().sum() for scaled in ranges])
