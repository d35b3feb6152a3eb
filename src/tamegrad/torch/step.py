"""The four steps for one plan: measure, reduce, decide, apply."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tamegrad.decide import LARGEST_ANYWHERE, NONFINITE, Decision, may_overflow
from tamegrad.errors import NonFiniteGradientError, SettingError
from tamegrad.report import Report
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.backends import BACKENDS, Backend, SelectedBackend, is_capturing, select
from tamegrad.torch.backends.tensorwise import SMALLEST_LIMIT, count_nonfinite
from tamegrad.torch.gradients import Gradients, collect
from tamegrad.torch.memory import NARROW, NARROW_DTYPES
from tamegrad.torch.model.planning import PlannedModel
from tamegrad.torch.settings import Settings
from tamegrad.torch.sharded.sharding import mesh_of

__all__ = ["Step", "TensorReport"]

# What to do with non-finite gradients is up to the host in these cases, which reads the device for it.
_READ_BY_THE_HOST = frozenset[OnNonfinite]({"skip_group", "skip", "raise"})


class Step:
    """Takes the four steps for the gradients that the parameters of one plan have.

    Args:
        planned: The plan and its parameters.
        settings: What the user set.

    Raises:
        SettingError: If the backend that was asked for cannot be used.
        MissingExtraError: If its dependency is missing.

    Attributes:
        plan: The plan.
        parameters: The parameters, in its order.
        backend: Which backend is used, and why.
        is_sharded: Whether some of them are DTensors.
        nonfinite_steps: `(G,)` int64: in how many steps so far each group held NaN or infinity.
    """

    def __init__(self, planned: PlannedModel, settings: Settings) -> None:
        self.plan = planned.plan
        self.parameters = planned.parameters
        self.backend: SelectedBackend = select(settings.backend, planned.parameters)
        self.nonfinite_steps = torch.zeros(len(self.plan.groups), dtype=torch.int64, device="cpu")
        self._reduction = planned.reduction
        self._on_nonfinite: OnNonfinite = settings.on_nonfinite
        self._may_stop = settings.on_nonfinite in {"skip", "raise"}
        self._backend: Backend = BACKENDS[self.backend.name](self.plan, planned.reduction.counted)
        self._names = tuple(parameter.name for parameter in self.plan.parameters)
        self.is_sharded = any(mesh_of(parameter) is not None for parameter in self.parameters)
        self._on_host = all(parameter.device.type == "cpu" for parameter in self.parameters)
        is_narrow = all(parameter.dtype in NARROW_DTYPES for parameter in self.parameters)
        self._is_narrow = is_narrow and bool((self._backend.rules.limits > SMALLEST_LIMIT).all())
        self._group_names = tuple(group.name for group in self.plan.groups)

    def announce_change(self) -> None:
        """Tells the other ranks that this one is to plan anew; called before it does.

        Raises:
            SettingError: If the model of another rank did not change; then that rank raises, too.
        """
        self._reduction.announce_change(len(self.plan.groups))

    def on(self, parameters: Sequence[Any]) -> "Step":
        """Returns the same step for these tensors, of a number and kind that the plan was made for; or for none."""
        other = copy.copy(self)
        other.parameters = tuple(parameters)
        return other

    def collect(self) -> Gradients:
        """Collects the gradients that the parameters have now.

        Raises:
            SettingError: If a gradient is of a kind that cannot be normalized, or the device would have to be read
                while a CUDA graph is captured; nothing was changed.
        """
        self._refuse_capture()
        return collect(self.parameters, self._names, sharded=self.is_sharded)

    def decide(self, gradients: Gradients, loss_scale: Tensor | None) -> tuple[Decision[Any], bool]:
        """Measures, reduces and decides.

        Args:
            gradients: The gradients.
            loss_scale: Their loss scale, 0-dim; None without one.

        Returns:
            The decision, and whether a non-finite gradient stops the step: then nothing is to be applied.

        Raises:
            SettingError: If the model of another rank changed, and not of this one.
        """
        looks = self._on_host or self._on_nonfinite in _READ_BY_THE_HOST
        table, total = self._reduction.reduce(self._backend.measure(gradients, loss_scale), looks=looks)
        self.nonfinite_steps = self.nonfinite_steps.to(table.device)
        known: dict[str, Any] = {
            "on_nonfinite": self._on_nonfinite,
            "loss_scale": loss_scale,
            "total": total,
            "middle_only": self._is_middle_only(gradients),
        }
        decision = self._backend.decide(table, nonfinite_steps=self.nonfinite_steps, **known)
        if self._may_overflow(decision, loss_scale):
            peaks = self._backend.peaks(gradients, decision, loss_scale)
            peaks = self._reduction.reduce_peaks(peaks, scaled=loss_scale is not None)
            decision = self._backend.decide(table, nonfinite_steps=None, peaks=peaks, **known)
        if not self._may_stop:
            # Reading the device is what "keep" and "zero" spare.
            return decision, False
        # A gradient of any stage of a pipeline stops all of them.
        return decision, bool((decision.nonfinite if total is None else total[NONFINITE]).any())

    def apply_(self, gradients: Gradients, decision: Decision[Any]) -> None:
        """Applies a decision in place.

        Raises:
            SettingError: If a gradient cannot be changed; then none was.
        """
        if decision.first is None:
            return
        on_host = isinstance(decision.first, np.ndarray)
        changed = decision.changed[self._backend.group_of] if on_host else self._backend.may_change(self._on_nonfinite)
        if changed.any():
            gradients.refuse_unwritable(changed, self._names)
            self._backend.apply_(gradients, decision, changed)
        gradients.write_back(changed)

    def report(self, decision: Decision[Any], *, skipped: bool) -> Report[Tensor]:
        """Returns the report of a step in which a decision was applied, or everything was left as it is."""
        return _StepReport(self._group_names, decision, skipped=skipped)

    def left_out(self, report: Report[Tensor]) -> list[nn.Parameter]:
        """Returns the parameters that the optimizer must leave out of this step; this may read the device.

        Args:
            report: The report of the step.

        Returns:
            Those of non-finite groups under `on_nonfinite="skip_group"`, else none.
        """
        if self._on_nonfinite != "skip_group":
            return []
        groups = zip(self.plan.groups, report.nonfinite.tolist(), strict=True)
        return [self.parameters[member] for group, count in groups if count for member in group.members]

    @torch.no_grad()
    def nonfinite_error(self, gradients: Gradients) -> NonFiniteGradientError:
        """Returns the error that names the parameters whose gradients are not finite."""
        found = torch.zeros(len(self.parameters), 3, dtype=torch.int64, device="cpu")
        for row, values in zip(found, gradients.values, strict=True):
            if values is not None:
                row[:] = count_nonfinite(values)
        rows = self._reduction.reduce_counts(found).tolist()
        named = zip(self._names, rows, strict=True)
        counts = {name: (nan, plus, minus) for name, (nan, plus, minus) in named if nan or plus or minus}
        return NonFiniteGradientError(counts, self.plan.layers_of(counts))

    def _is_middle_only(self, gradients: Gradients) -> bool:
        """Returns whether the host knows that all squares are in the middle range of float64; the same on every rank.

        Other ranks may have gradients where this one has none, but the dtypes of the parameters are those of all ranks.
        """
        dtypes = gradients.memory.dtypes
        known = self._is_narrow and not self._reduction.has_stages
        return known and bool(NARROW[dtypes[dtypes >= 0]].all())

    def _may_overflow(self, decision: Decision[Any], loss_scale: Tensor | None) -> bool:
        """Returns whether an element may grow past the largest number of its dtype; the same on every rank."""
        grows_to = max(self._backend.rules.grows_to, self._reduction.grows_to)
        if not may_overflow(grows_to, scaled=loss_scale is not None):
            return False
        if self._on_host and not self._reduction.has_stages:
            reach: Any = decision.reach(None if loss_scale is None else loss_scale.item())
            return bool((reach > LARGEST_ANYWHERE).any())
        # To look would make the host wait for the device, and other stages see other groups.
        return True

    def _refuse_capture(self) -> None:
        if self._on_nonfinite in _READ_BY_THE_HOST and is_capturing():
            raise SettingError(
                f'on_nonfinite="{self._on_nonfinite}"',
                got="a step while a CUDA graph is captured, which cannot read the device",
                allowed='"keep" or "zero" inside a CUDA graph',
                advice='pass on_nonfinite="keep" or "zero", or normalize outside of the graph',
            )


class TensorReport(Report[Tensor]):
    """A report of tensors, which may be on a device."""

    def _read(self) -> list[list[Any]]:
        # One transfer; float64 holds every count of values.
        columns = (self.norms, self.scales, self.norms_after, self.clipped, self.nonfinite)
        read = torch.cat([*(column.to(torch.float64) for column in columns), self.total_norm.view(1)]).tolist()
        size = len(self.groups)
        return [read[start : start + size] for start in range(0, len(read), size)]


class _StepReport(TensorReport):
    """A report that makes its tensors when they are read, since in most steps they are not."""

    _decision: Decision[Any]

    def __init__(self, groups: tuple[str, ...], decision: Decision[Any], *, skipped: bool) -> None:
        vars(self).update(groups=groups, skipped=skipped, _decision=decision)

    @property
    def norms(self) -> Tensor:
        return _as_tensor(self._decision.norms)

    @property
    def scales(self) -> Tensor:
        scales = _as_tensor(self._decision.scales)
        return torch.ones_like(scales) if self.skipped else scales

    @property
    def norms_after(self) -> Tensor:
        return self.norms if self.skipped else _as_tensor(self._decision.norms_after)

    @property
    def clipped(self) -> Tensor:
        clipped = _as_tensor(self._decision.clipped)
        return torch.zeros_like(clipped) if self.skipped else clipped

    @property
    def nonfinite(self) -> Tensor:
        return _as_tensor(self._decision.nonfinite)

    @property
    def total_norm(self) -> Tensor:
        return _as_tensor(self._decision.total_norm)


def _as_tensor(array: Any) -> Tensor:  # noqa: ANN401  an array of NumPy or PyTorch
    if isinstance(array, Tensor):
        return array
    # The total norm is a number.
    tensor: Tensor = torch.from_numpy(np.asarray(array))
    return tensor
