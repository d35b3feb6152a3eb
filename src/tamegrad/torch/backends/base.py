"""The base class of all backends.

`G` is the number of groups, `P` of parameters.
"""

import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import FULL, Decision, Rules, decide
from tamegrad.groups import Plan
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.backends.kept import Kept, uploaded
from tamegrad.torch.backends.tensorwise import as_real
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.memory import DTYPES

__all__ = ["LARGEST", "STRETCH", "Backend", "on_device"]

# `(DTYPES,)`: magnitudes up to which no element overflows when float64 is rounded to its dtype.
_MAX = np.array([torch.finfo(dtype).max for dtype in DTYPES])
LARGEST = np.where(sys.float_info.max == _MAX, _MAX * FULL, _MAX)
# What magnitudes are multiplied by to compare them with the largest float64 instead of that of their dtype.
STRETCH = sys.float_info.max / _MAX


class Backend(ABC):
    """Measures and changes the gradients of one plan.

    Between `measure` and `apply_` a backend keeps only what follows from the sizes of gradients, so several threads may
    share it.

    Args:
        plan: The plan.
        counted: For each parameter whether this rank measures it; other parameters are only changed here.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        self.plan = plan
        self.counted = np.array(counted, dtype=np.bool_)
        self.group_of: NDArray[np.int64] = np.array(plan.group_of, dtype=np.int64)
        self.rules = Rules.of(plan.groups)
        changing = [not group.strategy.only_measures for group in plan.groups]
        self._may_be_rescaled: NDArray[np.bool_] = np.array(changing, dtype=np.bool_)[self.group_of]
        self._rules_on: dict[torch.device, Rules[Tensor]] = {}
        self._peak_groups: Kept[Tensor] = Kept()

    @abstractmethod
    def measure(self, gradients: Gradients, loss_scale: Tensor | None) -> Tensor:
        """Measures all groups.

        Args:
            gradients: The gradients of the step.
            loss_scale: Their loss scale, 0-dim; None without one.

        Returns:
            The `(G, COLUMNS)` float64 table that `decide` reads, on the device of the first gradient, or on the CPU if
            there is none.
        """

    @torch.no_grad()
    def peaks(self, gradients: Gradients, decision: Decision[Any], loss_scale: Tensor | None) -> Tensor:
        """Measures the largest magnitudes of groups that may grow past what their dtypes hold.

        Args:
            gradients: The gradients that were measured.
            decision: What was decided without peaks.
            loss_scale: As in `measure`.

        Returns:
            The `(G,)` peaks that `tamegrad.decide.decide` reads, on the device of the decision.
        """
        memory, home = gradients.memory, torch.device("cpu")
        chosen = self.counted & (memory.dtypes >= 0) & (memory.counts > 0)
        if isinstance(decision.norms, np.ndarray):
            reach = decision.reach(None if loss_scale is None else loss_scale.item())
            chosen &= reach[self.group_of] > LARGEST[memory.dtypes]
        else:
            home = decision.norms.device
        buckets: dict[tuple[torch.device, int], tuple[list[int], list[Tensor]]] = {}
        for position in np.flatnonzero(chosen).tolist():
            values: Any = gradients.values[position]
            groups, bucket = buckets.setdefault((values.device, int(memory.dtypes[position])), ([], []))
            groups.append(self.group_of[position])
            bucket.append(as_real(values))
        peaks = torch.zeros(len(self.plan.groups), dtype=torch.float64, device=home)
        for (_, dtype), (groups, bucket) in buckets.items():
            largest = torch.stack(torch._foreach_norm(bucket, math.inf)).to(home).to(torch.float64)  # noqa: SLF001
            stretched = (largest * STRETCH[dtype]).clamp(max=sys.float_info.max)
            places = np.array(groups)
            index = self._peak_groups.get(home, (places.tobytes(),), functools.partial(uploaded, places, home))
            peaks.scatter_reduce_(0, index, stretched, "amax")
        return peaks

    def decide(
        self,
        table: Tensor,
        *,
        on_nonfinite: OnNonfinite,
        nonfinite_steps: Tensor | None,
        loss_scale: Tensor | None,
        total: Tensor | None,
        peaks: Tensor | None = None,
        middle_only: bool = False,
    ) -> Decision[Any]:
        """Decides on every group.

        Args:
            table: The result of `measure`, summed over the ranks.
            on_nonfinite: As in `tamegrad.decide.decide`.
            nonfinite_steps: `(G,)` int64 on the same device; 1 is added for each group with a NaN or an infinity;
                None if that was done.
            loss_scale: As in `measure`.
            total: As in `tamegrad.decide.decide`.
            peaks: As in `tamegrad.decide.decide`.
            middle_only: As in `tamegrad.decide.decide`.

        Returns:
            The decision: NumPy arrays if the table is on the CPU, else tensors on its device.
        """
        if _is_on_host(table):
            decision = decide(
                table.numpy(),
                self.rules,
                np,
                on_nonfinite=on_nonfinite,
                loss_scale=None if loss_scale is None else loss_scale.item(),
                total=None if total is None else total.numpy(),
                peaks=None if peaks is None else peaks.numpy(),
            )
            if nonfinite_steps is not None and decision.first is not None and decision.nonfinite.any():
                nonfinite_steps += torch.from_numpy(decision.nonfinite > 0)
            return decision
        decision = decide(
            table,
            self.rules_on(table.device),
            torch,
            on_nonfinite=on_nonfinite,
            loss_scale=None if loss_scale is None else loss_scale.to(table),
            total=None if total is None else total.to(table),
            peaks=None if peaks is None else peaks.to(table),
            middle_only=middle_only,
        )
        if nonfinite_steps is not None:
            nonfinite_steps += decision.nonfinite > 0
        return decision

    @abstractmethod
    def apply_(self, gradients: Gradients, decision: Decision[Any], changed: NDArray[np.bool_]) -> None:
        """Applies a decision in place, and tells autograd about it.

        Args:
            gradients: The gradients that were measured.
            decision: The decision.
            changed: `(P,)`: whether each gradient may change, as far as the host knows.
        """

    def may_change(self, on_nonfinite: OnNonfinite) -> NDArray[np.bool_]:
        """Returns which gradients may change, as far as the host knows without looking at a decision; `(P,)`."""
        # A group that is not finite is zeroed, whatever its strategy.
        return np.ones_like(self._may_be_rescaled) if on_nonfinite == "zero" else self._may_be_rescaled

    def rules_on(self, device: torch.device) -> Rules[Tensor]:
        """Returns the rules as tensors on a device; they are copied there once.

        The host waits for that copy, so that any stream may read it.
        """
        if device not in self._rules_on:
            self._rules_on[device] = self.rules.converted(lambda array: torch.from_numpy(array).to(device))
        return self._rules_on[device]

    def limits_on(self, device: torch.device, loss_scale: Tensor | None = None) -> Tensor | None:
        """Returns the `(G,)` limits on elements, times the loss scale if there is one; None if nothing is limited."""
        if not self.rules.has_limits:
            return None
        limits = self.rules_on(device).limits
        return limits if loss_scale is None else limits * loss_scale.to(limits.device).to(limits.dtype)


def _is_on_host(table: Tensor) -> bool:
    """Returns whether looking at a table does not make the host wait."""
    return table.is_cpu


def on_device(vector: Any, device: torch.device) -> Tensor:  # noqa: ANN401  an array of NumPy or PyTorch
    """Returns a part of a decision as a contiguous tensor on a device."""
    tensor: Tensor = torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector
    return tensor.to(device).contiguous()
