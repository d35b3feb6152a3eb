"""`GradientNormalizer`: normalizes the gradients of a model in place, whenever it is called."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from tamegrad.decide import Decision
from tamegrad.errors import SettingError, warn
from tamegrad.groups import Plan
from tamegrad.policy import Policy
from tamegrad.report import Report
from tamegrad.strategies import GradientNormalization
from tamegrad.torch.backends import SelectedBackend
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.model.gradient_dictionary import GradientDictionary, NamedGradients
from tamegrad.torch.model.planning import Model, PlannedModel, Planner
from tamegrad.torch.model.selection import Selection
from tamegrad.torch.settings import Keywords, Settings, checked_state
from tamegrad.torch.step import Step

__all__ = ["GradientNormalizer", "normalize_grad_"]


class GradientNormalizer:
    """Normalizes the gradients of a model in place, whenever `normalize_` is called.

    Args:
        model: The model; its layers are the modules that own parameters. Or pairs of a name and a parameter, as
            `model.named_parameters()` gives them; then the layers are read off the names.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        parameters: The parameters to normalize, where not all of the model's.
        **settings: Any of the following.

            overrides: Strategies for some layers, as in `Policy`; only beside a strategy.

            layers: Globs on module paths: each module that matches is one layer with all below it.

            on_nonfinite: What happens to a group with NaN or infinity. `"keep"` (the default) leaves it as it is,
            `"zero"` makes it zero, and other groups are normalized as usual; `"skip_group"` sets its gradients to None
            as well, so that the optimizer's next step leaves it out; `"skip"` leaves all groups as they are, `"raise"`
            raises. The last three read the device once a step.

            backend: `"auto"` (the default), which picks by the devices of the parameters; or the backend to use:
            `"cpu"`, `"foreach"`, or `"gpu"`, which was checked in Triton's interpreter but has not run on a GPU yet.

            process_groups: For a pipeline: groups with one rank of every stage. Groups with `per="model"` then span all
            stages, as do `total_norm` and what `on_nonfinite="skip"` and `"raise"` look at, and an override may match
            layers of one stage alone.

            sinks: Where reports are written to, every `log_every` steps (50 if not given): those of
            `tamegrad.integrations`, or objects of your own with a method `write(step, report)`. Rank 0 writes, and
            reads the device once for it. A sink that raises `OSError` is left out from then on, with a warning.

    If parameters are DTensors, every rank has to make its normalizer, and call it, when the others do: making compares
    the plans of the ranks, and every step adds up the norms in one all-reduce. A plain tensor beside DTensors has to be
    the same on all of their ranks.

    A copy (`copy.deepcopy`, pickle) works on its own copy of the model, and has no sinks. Several threads may share a
    normalizer.

    Attributes:
        settings: What was set.
        report: What the last step did; None before the first.
        steps: How many times gradients were normalized so far, skipped steps included.
        skipped_steps: How many steps were skipped so far because of non-finite gradients.

    Raises:
        SettingError: If a setting is unknown, there is no parameter to normalize, the ranks' plans differ, or FSDP1 or
            DeepSpeed has the gradients.
        MissingExtraError: If the requested backend's dependency is missing.
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
        parameters: Iterable[nn.Parameter] | Selection | None = None,
        **settings: Unpack[Keywords],
    ) -> None:
        self.settings = Settings.of(policy, **settings)
        self.report: Report[Tensor] | None = None
        self.steps = 0
        self.skipped_steps = 0
        self._warned_no_gradient = False
        self._nonfinite_before: Counter[str] = Counter()
        self._planner = Planner(model, self.settings, Selection.of(parameters))
        self._planned = self._planner.first_plan(self.settings.policy)
        self._step = Step(self._planned, self.settings)

    @property
    def policy(self) -> Policy:
        """Which layer gets which strategy. Assign a policy or a strategy to change it; counters and report stay.

        Raises:
            SettingError: If what is assigned is neither; then nothing changes.
            UnmatchedError: If an override matches nothing; then nothing changes.
        """
        return self.settings.policy

    @policy.setter
    def policy(self, policy: object) -> None:
        settings = self.settings.with_policy(policy)
        self._replan(self._planner.first_plan, settings)

    @property
    def plan(self) -> Plan:
        """Every layer, its parameter types, its strategy."""
        return self._step.plan

    @property
    def backend(self) -> SelectedBackend:
        """The backend that is used, and why."""
        return self._step.backend

    @property
    def nonfinite_steps(self) -> dict[str, int]:
        """In how many steps so far each group held NaN or infinity; groups that never did are left out.

        Reads the device.
        """
        return dict(self._nonfinite_before + self._nonfinite_since())

    def normalize_(self) -> Report[Tensor]:
        """Normalizes the gradients that the parameters have now, in place.

        A parameter without a gradient counts as nothing; a group without any has norm 0. If the model has changed since
        the last step, the plan is made anew.

        Returns:
            What was done; also kept as `report`.

        Raises:
            SettingError: If a gradient is of a kind that cannot be normalized, or a strategy of your own returned
                targets that cannot be used. No gradient was changed.
            NonFiniteGradientError: If a gradient is not finite under `on_nonfinite="raise"`. No gradient was changed.

        Warns:
            TamegradWarning: Once, if no parameter has a gradient.
        """
        report = self._normalize()
        for parameter in self._left_out(report):
            parameter.grad = None
        self.settings.log.after_step(self.steps, report)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters, for a checkpoint; `torch.load(..., weights_only=True)` loads it. Reads the device."""
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "nonfinite_steps": self.nonfinite_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the counters of a checkpoint.

        Args:
            state: What `state_dict` returned.

        Raises:
            SettingError: If it is something else; then nothing changes.

        Example:
            >>> import torch
            >>> from tamegrad import Clip
            >>> normalizer = GradientNormalizer(torch.nn.Linear(2, 1), Clip(1.0))
            >>> normalizer.load_state_dict({"steps": 7, "skipped_steps": 1, "nonfinite_steps": {"(root)": 1}})
            >>> normalizer.steps, normalizer.nonfinite_steps
            (7, {'(root)': 1})
        """
        counters = checked_state(state)
        self.steps, self.skipped_steps = counters["steps"], counters["skipped_steps"]
        self._nonfinite_before = Counter(counters["nonfinite_steps"])
        self._step.nonfinite_steps.zero_()

    def _normalize(self, loss_scale: Tensor | None = None, *, scaler_skips: bool = False) -> Report[Tensor]:
        """The four steps; gradients that are multiplied by a loss scale are treated as if they were not."""
        if self._planner.is_stale(self._planned):
            self._replan(self._planner.new_plan, self.settings)
        step = self._step
        gradients = step.collect()
        self._warn_without_gradients(gradients)
        decision, stopped = step.decide(gradients, loss_scale)
        if stopped and self.settings.on_nonfinite == "raise" and not scaler_skips:
            raise step.nonfinite_error(gradients)
        if stopped:
            self.skipped_steps += 1
        else:
            self._apply(step, gradients, decision)
        self.steps += 1
        self.report = step.report(decision, skipped=stopped)
        return self.report

    def _left_out(self, report: Report[Tensor]) -> list[nn.Parameter]:
        """Returns the parameters that the optimizer must leave out of a step that it takes; may read the device."""
        return self._step.left_out(report)

    def _apply(self, step: Step, gradients: Gradients, decision: Decision[Any]) -> None:
        step.apply_(gradients, decision)

    def _replan(self, plan: Callable[[Policy], PlannedModel], settings: Settings) -> None:
        # If this raises, for example because ranks do not agree, the step that was made before stays whole.
        self._step.announce_change()
        planned = plan(settings.policy)
        step = Step(planned, settings)
        self._nonfinite_before += self._nonfinite_since()
        self._planned, self._step, self.settings = planned, step, settings

    def _nonfinite_since(self) -> Counter[str]:
        """Returns in how many steps each group was not finite since the plan was made."""
        counts = zip(self.plan.groups, self._step.nonfinite_steps.tolist(), strict=True)
        return Counter({group.name: count for group, count in counts if count})

    def _warn_without_gradients(self, gradients: Gradients) -> None:
        if (
            not self._warned_no_gradient
            and not gradients.memory.counts.any()
            and not any(values is not None for values in gradients.values)
        ):
            self._warned_no_gradient = True
            warn(
                f"nothing to normalize: none of {len(self._step.parameters)} parameters has a gradient in this step; "
                "call loss.backward() first, on the model that was given (tamegrad warns once)"
            )


def normalize_grad_(
    model: Model | NamedGradients,
    policy: object,
    *,
    threshold: float | None = None,
    **settings: Unpack[Keywords],
) -> Report[Tensor]:
    """Normalizes the gradients of a model, or those in a dictionary, once, now, in place.

    Args:
        model: Either what has the gradients in `.grad`: the model, or names and parameters, as pairs or in a
            dictionary. Or the gradients: a dictionary from names to tensors that are no parameters and do not require
            grad, as `torch.func.grad` returns it; None stands for no gradient. It may hold dictionaries in turn, as in
            `{"encoder": {"weight": gradient}}`. Dots and slashes in names separate layers. A gradient that cannot be
            changed in place (expanded, lazily conjugated, or sparse and not coalesced) is replaced in the dictionary,
            and so is one that two names share: it is the gradient of both.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization`.
        threshold: The threshold for a member of `GradientNormalization` (1.0 if not given); strategies have their own.
        **settings: As in `GradientNormalizer`.

    Returns:
        What was done.

    Raises:
        SettingError: As `GradientNormalizer` does; if a threshold stands beside a strategy or a policy, or a dictionary
            holds gradients beside something else; and for sinks. No gradient was changed.
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
        >>> gradients = {"out.weight": torch.tensor([3.0]), "out.bias": torch.tensor([4.0])}
        >>> normalize_grad_(gradients, GradientNormalization.RENORMALIZE_L2_PER_LAYER)["out"].norm
        5.0
        >>> gradients
        {'out.weight': tensor([0.6000]), 'out.bias': tensor([0.8000])}
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
    if settings.get("sinks"):
        raise SettingError(
            "normalize_grad_(sinks)",
            got=repr(settings["sinks"]),
            allowed="no sinks: there is one step, whose report is returned",
            advice="pass sinks= to GradientNormalizer or attach",
        )
    given = GradientDictionary.of(model)
    if given is None:
        return GradientNormalizer(model, policy, **settings).normalize_()
    report = GradientNormalizer(given.pairs, policy, **settings).normalize_()
    given.put_back()
    return report
