"""The four steps for a PyTorch model: measure, reduce, decide, apply."""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from tamegrad.errors import NonFiniteGradientError, SettingError, TamegradWarning, UnmatchedError
from tamegrad.groups import Plan, make_plan, unmatched_overrides
from tamegrad.policy import Overrides, as_policy
from tamegrad.report import Report
from tamegrad.strategies import GradientNormalization, OnNonfinite, check_on_nonfinite
from tamegrad.torch.decide import NONFINITE, Decision, Thresholds, norm_of
from tamegrad.torch.deferred import Deferred
from tamegrad.torch.distributed import Reduction, check_process_groups
from tamegrad.torch.gradients import Collector, Gradients
from tamegrad.torch.kernels import BACKENDS, BackendName, Choice, StepTaker, choose
from tamegrad.torch.layers import ModelLayers, check_patterns, find_layers
from tamegrad.torch.pairs import read_pairs
from tamegrad.torch.unsupported import refuse_unsupported
from tamegrad.torch.watch import ModuleWatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GradientNormalizer", "Model", "normalize_grad_"]

Model: TypeAlias = nn.Module | Iterable[tuple[str, nn.Parameter]]
# The gradients of a step, what becomes of them, and the sums over a whole pipeline if there is one.
_Decided: TypeAlias = tuple[Gradients, Decision, Tensor | None]


class GradientNormalizer:
    """Normalizes the gradients of a model in place, whenever `normalize_` is called.

    Args:
        model: The model; its layers are the modules that own parameters. Or pairs of a name and a parameter, as
            `model.named_parameters()` gives them; then the layers are read off the names.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        overrides: Strategies for some layers, as in `Policy`; only beside a strategy.
        layers: Globs on module paths: each module that matches is one layer with all below it.
        parameters: The parameters to normalize, where not all of the model's.
        on_nonfinite: What happens to a group with NaN or infinity. `"keep"` leaves it as it is, `"zero"` makes it zero,
            and other groups are normalized as ever; `"skip"` leaves all groups as they are, `"raise"` raises. The last
            two read the device once a step.
        backend: `"auto"`, which picks by the devices of the parameters; or the backend to use: `"cpu"`, `"eager"`, or
            `"gpu"`, which was checked in Triton's interpreter but has not run on a GPU yet.
        process_groups: For a pipeline: groups with one rank of every stage. Groups with `per="model"` are then of all
            stages, as are `total_norm` and what `on_nonfinite="skip"` and `"raise"` look at, and an override may match
            layers of one stage alone.

    If parameters are DTensors, every rank has to make its normalizer, and call it, when the others do: making compares
    the plans of the ranks, and every step adds up the norms in one all-reduce. What is a plain tensor beside DTensors
    has to be the same on all of their ranks.

    Attributes:
        plan: Every layer, its parameter types, its strategy.
        backend: The backend that is used, and why.
        report: What the last step did; None before the first.
        skipped_steps: How many steps were skipped so far because of non-finite gradients.

    Raises:
        SettingError: If a setting is unknown, there is no parameter to normalize, the ranks' plans differ, or FSDP1 or
            DeepSpeed has the gradients.
        MissingExtraError: If the backend that was asked for is not installed.
        UnmatchedError: If an override or a pattern of `layers` matches nothing; the message names the closest. When the
            model changes later, the plan follows and does not complain again.

    Example:
        >>> import torch
        >>> from tamegrad import Clip
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> normalizer = GradientNormalizer(model, Clip(1.0))
        >>> normalizer.normalize_()["(root)"].norm
        5.0
        >>> model.weight.grad
        tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self,
        model: Model,
        policy: object,
        *,
        overrides: Overrides | None = None,
        layers: Sequence[str] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        on_nonfinite: OnNonfinite = "keep",
        backend: BackendName = "auto",
        process_groups: Sequence["ProcessGroup"] = (),
    ) -> None:
        check_on_nonfinite(on_nonfinite)
        check_process_groups(process_groups)
        self.report: Report[Tensor] | None = None
        self.skipped_steps = 0
        self._on_nonfinite = on_nonfinite
        self._asked_backend = backend
        self._policy = as_policy(policy, overrides, "policy")
        self._merged = layers or ()
        self._process_groups = tuple(process_groups)
        self._only = None if parameters is None else list(parameters)
        self._said_no_gradient = False
        self._nonfinite_before: Counter[str] = Counter()

        self._model = model if isinstance(model, nn.Module) else None
        whole = find_layers(model, self._merged) if isinstance(model, nn.Module) else read_pairs(model, self._merged)
        refuse_unsupported(model, whole)
        self._make_plan(whole, first=True)

    def normalize_(self) -> Report[Tensor]:
        """Normalizes the gradients that the parameters have now, in place.

        A parameter without a gradient counts as nothing; a group without any has norm 0. If the model has changed since
        the last step, the plan is made anew.

        Returns:
            What was done; also kept as `report`. Each of its tensors is made when it is first read.

        Raises:
            SettingError: If a gradient is of a kind that cannot be normalized. No gradient was changed.
            NonFiniteGradientError: If a gradient is not finite under `on_nonfinite="raise"`. No gradient was changed.

        Warns:
            TamegradWarning: Once, if no parameter has a gradient.
        """
        return self._normalize()

    @property
    def nonfinite_steps(self) -> dict[str, int]:
        """In how many steps so far each group held NaN or infinity; groups that never did are left out.

        Reads the device.
        """
        return dict(self._nonfinite_before + self._nonfinite_since())

    def _normalize(self, loss_scale: Tensor | None = None, *, scaler_skips: bool = False) -> Report[Tensor]:
        """The four steps; gradients that are multiplied by a loss scale are treated as if they were not."""
        self._refuse_capture()
        gradients, decision, total = self._take_step_like_the_last(loss_scale) or self._take_step(loss_scale)
        # Reading the device is what "keep" and "zero" spare.
        stopped = self._on_nonfinite in {"skip", "raise"} and _some_nonfinite(decision, total)
        if stopped and self._on_nonfinite == "raise" and not scaler_skips:
            raise self._nonfinite_error(gradients)
        if stopped:
            self.skipped_steps += 1
        elif decision.may_change:
            self._apply(gradients, decision)
        self.report = _StepReport(self._group_names, decision, total, loss_scale, skipped=stopped)
        return self.report

    def _take_step_like_the_last(self, loss_scale: Tensor | None) -> _Decided | None:
        """Measures and decides in one call of a backend that can; None if this is no step like the last."""
        parameters, modules = self._collector.objects, self._watch.tables
        if self._step_taker is None or parameters is None or modules is None or not self._keeps_parameters():
            return None
        step = self._step_taker.take_step(
            parameters,
            modules,
            self._thresholds_under(loss_scale),
            self._on_nonfinite,
            self._nonfinite_counts,
        )
        return None if step is None else (Gradients(step[0]), step[1], None)

    @torch.no_grad()
    def _take_step(self, loss_scale: Tensor | None) -> _Decided:
        """Measures, reduces and decides."""
        if self._plan_is_old():
            self._nonfinite_before += self._nonfinite_since()
            whole = find_layers(self._model, self._merged) if self._model is not None else self._whole
            self._make_plan(whole, first=False)
        thresholds = self._thresholds_under(loss_scale)
        gradients = self._collector.collect()
        self._warn_without_gradients(gradients)
        table, total = self._reduction.reduce(self._kernels.measure(gradients.values, thresholds))
        self._move_to(table.device)
        # Decides and counts the steps at once, which on a GPU is one launch.
        decision = self._kernels.decide(table, thresholds.to(table.device), self._on_nonfinite, self._nonfinite_counts)
        return gradients, decision, total

    @torch.no_grad()
    def _apply(self, gradients: Gradients, decision: Decision) -> None:
        self._kernels.apply_(gradients.values, decision)
        if gradients.copies:
            changed = decision.changed.tolist()
            gradients.write_back([changed[group] for group in self.plan.group_of])

    def _thresholds_under(self, loss_scale: Tensor | None) -> Thresholds:
        return self._thresholds if loss_scale is None else self._thresholds.times(loss_scale)

    def _refuse_capture(self) -> None:
        if self._on_nonfinite not in {"skip", "raise"}:
            return
        # A PyTorch without CUDA raises when asked for its stream.
        initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # PyTorch has no type there
        if initialized and torch.cuda.is_current_stream_capturing():
            raise SettingError(
                f'on_nonfinite="{self._on_nonfinite}"',
                got="a step while a CUDA graph is captured, which cannot read the device",
                allowed='"keep" or "zero" inside a CUDA graph',
                advice='pass on_nonfinite="keep" or "zero", or normalize outside of the graph',
            )

    def _make_plan(self, whole: ModelLayers, *, first: bool) -> None:
        chosen = self._choose(whole)

        def make() -> tuple[Plan, dict[str, UnmatchedError]]:
            if first:
                check_patterns(self._merged, whole.paths)
            unmatched = unmatched_overrides(whole.layers, self._policy) if first else {}
            return make_plan(chosen.layers, self._policy), unmatched

        # If the ranks do not agree, what was made before stays whole.
        reduction = Reduction(chosen.parameters, self._process_groups)
        self.plan: Plan = reduction.agree(make)
        self._reduction = reduction
        self._whole = whole
        self._parameters = chosen.parameters
        self._device = chosen.parameters[0].device
        self._group_names = tuple(group.name for group in self.plan.groups)
        self.backend: Choice = choose(self._asked_backend, chosen.parameters)
        self._kernels = BACKENDS[self.backend.name](self.plan, self._reduction.counted)
        step_taker = self._kernels if isinstance(self._kernels, StepTaker) else None
        compiled = step_taker is not None
        names = (parameter.name for parameter in self.plan.parameters)
        self._collector = Collector(self._parameters, names, located=compiled)
        self._thresholds: Thresholds = Thresholds.of(self.plan)
        self._nonfinite_counts: Tensor = torch.zeros(len(self.plan.groups), dtype=torch.int64)
        # Pairs of names and parameters have no modules, and so none that change.
        self._watch = ModuleWatch(nn.Module() if self._model is None else self._model, compiled=compiled)
        self._step_taker = step_taker if self._reduction.is_local else None

    def _move_to(self, device: torch.device) -> None:
        if device != self._nonfinite_counts.device:
            self._thresholds = self._thresholds.to(device)
            self._nonfinite_counts = self._nonfinite_counts.to(device)

    def _choose(self, whole: ModelLayers) -> ModelLayers:
        """Returns what of the model is normalized."""
        return whole if self._only is None else whole.restricted_to(self._only)

    def _plan_is_old(self) -> bool:
        # A model moves as a whole: one parameter tells whether another backend is the best now.
        moved = self._parameters[0].device != self._device
        return moved or not self._keeps_parameters() or self._watch.changed()

    def _keeps_parameters(self) -> bool:
        """Says whether the plan is made of what it would be made of now, as far as its modules do not tell."""
        return True

    def _nonfinite_since(self) -> Counter[str]:
        """Returns in how many steps each group was not finite since the plan was made."""
        counts = zip(self.plan.groups, self._nonfinite_counts.tolist(), strict=True)
        return Counter({group.name: count for group, count in counts if count})

    def _warn_without_gradients(self, gradients: Gradients) -> None:
        if not self._said_no_gradient and all(values is None for values in gradients.values):
            self._said_no_gradient = True
            warnings.warn(
                f"nothing to normalize: none of {len(self._parameters)} parameters has a gradient in this step; "
                "call loss.backward() before, on the model that was given (this is said once)",
                TamegradWarning,
                stacklevel=2,
            )

    def _nonfinite_error(self, gradients: Gradients) -> NonFiniteGradientError:
        found = torch.zeros(len(self.plan.parameters), 3, dtype=torch.int64)
        for row, values in zip(found, gradients.values, strict=True):
            if values is not None and not values.isfinite().all():
                real = torch.view_as_real(values) if values.is_complex() else values
                row[:] = torch.stack([kind.sum() for kind in (real.isnan(), real.isposinf(), real.isneginf())])
        rows = self._reduction.reduce_counts(found).tolist()
        named = zip(self.plan.parameters, rows, strict=True)
        counts = {entry.name: (nan, plus, minus) for entry, (nan, plus, minus) in named if nan or plus or minus}
        return NonFiniteGradientError(counts, self.plan.layers_of(counts))


def normalize_grad_(
    model: Model,
    policy: object,
    *,
    threshold: float | None = None,
    overrides: Overrides | None = None,
    layers: Sequence[str] | None = None,
    on_nonfinite: OnNonfinite = "keep",
    backend: BackendName = "auto",
    process_groups: Sequence["ProcessGroup"] = (),
) -> Report[Tensor]:
    """Normalizes the gradients of a model once, now, in place.

    Args:
        model: The model, or pairs of a name and a parameter.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization`.
        threshold: The threshold for a member of `GradientNormalization` (1.0 if not given); strategies have their own.
        overrides: As in `GradientNormalizer`.
        layers: As in `GradientNormalizer`.
        on_nonfinite: As in `GradientNormalizer`.
        backend: As in `GradientNormalizer`.
        process_groups: As in `GradientNormalizer`.

    Returns:
        What was done.

    Raises:
        SettingError: As `GradientNormalizer` does, and if a threshold stands beside a strategy or a policy.
        UnmatchedError: As `GradientNormalizer` does.
        NonFiniteGradientError: As `GradientNormalizer.normalize_` does.

    Example:
        >>> import torch
        >>> from tamegrad import GradientNormalization
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> report = normalize_grad_(model, GradientNormalization.CLIP_L2_PER_LAYER, threshold=0.5)
        >>> report["(root)"].norm_after
        0.5
    """
    if threshold is not None:
        if not isinstance(policy, GradientNormalization):
            raise SettingError(
                "normalize_grad_(threshold)",
                got=f"{threshold!r} together with {policy!r}, which has thresholds of its own",
                allowed="threshold= beside a member of GradientNormalization only",
                advice="leave threshold= out, or build the strategy with it: Clip(threshold)",
            )
        policy = policy(threshold)
    normalizer = GradientNormalizer(
        model,
        policy,
        overrides=overrides,
        layers=layers,
        on_nonfinite=on_nonfinite,
        backend=backend,
        process_groups=process_groups,
    )
    return normalizer.normalize_()


def _some_nonfinite(decision: Decision, total: Tensor | None) -> bool:
    """Says whether a gradient is not finite: one of any process, if sums over all of them are there."""
    if total is not None:
        return bool(total[NONFINITE].any())
    return decision.may_be_nonfinite and bool(decision.nonfinite.any())


class _StepReport(Deferred, Report[Tensor]):
    """A report each of whose tensors is made when it is first read.

    Args:
        groups: The names of the groups.
        decision: What became of them.
        total: The sums over a whole pipeline, if there is one.
        loss_scale: What the gradients were multiplied by, if they were.
        skipped: Whether nothing was changed, whatever was decided.
    """

    _decision: Decision
    _total: Tensor | None
    _loss_scale: Tensor | None

    def __init__(
        self,
        groups: tuple[str, ...],
        decision: Decision,
        total: Tensor | None,
        loss_scale: Tensor | None,
        *,
        skipped: bool,
    ) -> None:
        # By the time that the report is looked at, a scaler may have changed its scale.
        scale = None if loss_scale is None else loss_scale.clone()
        vars(self).update(groups=groups, skipped=skipped, _decision=decision, _total=total, _loss_scale=scale)

    def _make(self, name: str) -> Tensor:
        value: Tensor = getattr(self._decision, "norms" if self.skipped and name == "norms_after" else name)
        if self.skipped and name == "scales":
            return torch.ones_like(value)
        if self.skipped and name == "clipped":
            return torch.zeros_like(value)
        if name == "total_norm" and self._total is not None:
            value = norm_of(self._total)
        if self._loss_scale is not None and name in {"norms", "norms_after", "total_norm"}:
            value = value / self._loss_scale.to(value)
        return value
