"""Normalizes right before an optimizer's step, whatever calls it."""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack
from weakref import WeakSet

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from tamegrad.errors import SettingError, users_line, warn
from tamegrad.groups import Plan
from tamegrad.policy import Policy
from tamegrad.report import Report
from tamegrad.torch.backends import SelectedBackend
from tamegrad.torch.model.planning import Model
from tamegrad.torch.normalizer import GradientNormalizer
from tamegrad.torch.optimizers.held import HeldParameters
from tamegrad.torch.optimizers.hooks import StepHooks
from tamegrad.torch.optimizers.stepping import NormalizedStep, check_normalized_step
from tamegrad.torch.optimizers.wrappers import optimizers_inside, optimizers_to_attach_to
from tamegrad.torch.settings import Keywords

__all__ = ["AttachedNormalizer", "attach"]

# Optimizers that have a normalizer; a second one would normalize the same gradients twice.
_attached: WeakSet[Optimizer] = WeakSet()


def attach(
    model: Model,
    optimizer: Optimizer | Sequence[Optimizer],
    policy: object,
    *,
    normalize: NormalizedStep | None = None,
    **settings: Unpack[Keywords],
) -> "AttachedNormalizer":
    """Normalizes gradients before every step of an optimizer from now on.

    With `optimizer.step(closure)`, the gradients of each evaluation of the closure are normalized. Only the parameters
    that the optimizer holds are normalized, so two optimizers of one model can have two policies. Under
    `torch.amp.GradScaler`, strategies apply to the gradients without the loss scale, whether or not `unscale_` was
    called. Of Accelerate's, Lightning's and Fabric's wrappers and of `PostLocalSGDOptimizer` it attaches to the
    optimizer inside. An optimizer that holds another one for the same parameters, like `SAM`, is attached to with it.

    A copy (`copy.deepcopy`, pickle) of the optimizer is not attached, nor is one of the normalizer, which says so.

    Args:
        model: The model, or pairs of a name and a parameter.
        optimizer: Any optimizer of `torch.optim`, or a subclass that runs its step hooks. Or a list of optimizers that
            share out the parameters of a layer: then all gradients are normalized at the first optimizer's step, so
            `backward()` has to come before all of the steps, and every optimizer has to step equally often. With
            `torch.amp.GradScaler`, call `unscale_` for each of them before the first step.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        normalize: For an optimizer whose step changes the gradients and then calls another step (`super().step()`, or
            that of an optimizer inside): `"outermost"` normalizes before the change, `"innermost"` after it. If not
            given, the outermost, with a warning where it makes a difference.
        **settings: As in `GradientNormalizer`. `on_nonfinite="skip"` here skips the optimizer's step: neither
            parameters nor the optimizer's state change; `"skip_group"` does so for the parameters of non-finite groups
            only. `LBFGS` cannot skip a step.

    Returns:
        The attached normalizer: `report` is of the last step; call `detach()` to remove it.

    Raises:
        SettingError: If a setting is unknown, the optimizer holds no parameter of the model or has a normalizer
            already, its step does not run PyTorch's step hooks (the message says what to attach to instead), skipping
            meets `LBFGS`, or as `GradientNormalizer` does.
        UnmatchedError: If an override or a pattern of `layers` matches nothing; the message names the closest.

    Warns:
        TamegradWarning: If the optimizer holds parameters that no layer of the model owns, or only a part of those that
            share a norm; once each, at a step without any gradient, if the step changes the gradients itself, and if
            parameters keep changing without a step of this optimizer.

    Example:
        >>> import torch
        >>> from tamegrad import Clip
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> normalizer = attach(model, optimizer, Clip(1.0, per="layer"))
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> normalizer.report["(root)"].clipped
        True
        >>> normalizer.detach()
    """
    optimizers = optimizers_to_attach_to(optimizer)
    check_normalized_step(normalize)
    _refuse_attached(optimizers)
    normalizer = GradientNormalizer(model, policy, parameters=HeldParameters(optimizers), **settings)
    if normalizer.settings.on_nonfinite in {"skip", "skip_group"} and any(isinstance(one, LBFGS) for one in optimizers):
        raise SettingError(
            "attach(on_nonfinite)",
            got=f'"{normalizer.settings.on_nonfinite}" with LBFGS, whose step changes its state in any case',
            allowed='"keep", "zero" or "raise" with LBFGS',
            advice='pass on_nonfinite="zero" or "raise"',
        )
    return AttachedNormalizer(normalizer, StepHooks(normalizer, optimizers, normalize, users_line()))


class AttachedNormalizer:
    """A `GradientNormalizer` that optimizers call; `attach` makes it.

    Args:
        normalizer: The normalizer.
        hooks: The optimizers' hooks that call it.
    """

    def __init__(self, normalizer: GradientNormalizer, hooks: StepHooks) -> None:
        self._normalizer = normalizer
        self._hooks: StepHooks | None = hooks
        self._report: Report[Tensor] | None = None
        self._steps_before = 0
        _attached.update(hooks.optimizers)

    @property
    def attached(self) -> bool:
        """Whether an optimizer calls this normalizer: not after `detach`, in a copy, or once the optimizer is gone."""
        return self._hooks is not None and bool(self._hooks.optimizers)

    @property
    def report(self) -> Report[Tensor] | None:
        """What the last step did; None before the first."""
        if self._hooks is None:
            return self._report
        self._hooks.watch.look()
        return self._hooks.report

    @property
    def steps(self) -> int:
        """How many steps were seen so far, skipped ones included; of several optimizers, how many steps of each."""
        return self._steps_before + (0 if self._hooks is None else self._hooks.steps)

    @property
    def policy(self) -> Policy:
        """Which layer gets which strategy; assign another to change it, as in `GradientNormalizer`."""
        return self._normalizer.policy

    @policy.setter
    def policy(self, policy: object) -> None:
        self._normalizer.policy = policy

    @property
    def plan(self) -> Plan:
        """Every layer, its parameter types, its strategy."""
        return self._normalizer.plan

    @property
    def backend(self) -> SelectedBackend:
        """The backend that is used, and why."""
        return self._normalizer.backend

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped so far because of non-finite gradients."""
        return self._normalizer.skipped_steps

    @property
    def nonfinite_steps(self) -> dict[str, int]:
        """As in `GradientNormalizer`."""
        return self._normalizer.nonfinite_steps

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters, for a checkpoint; `torch.load(..., weights_only=True)` loads it. Reads the device."""
        return {**self._normalizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the counters of a checkpoint.

        Args:
            state: What `state_dict` returned.

        Raises:
            SettingError: If it is something else; then nothing changes.
        """
        self._normalizer.load_state_dict(state)
        if self._hooks is None:
            self._steps_before = state["steps"]
        else:
            # What is logged is numbered by the hooks.
            self._hooks.steps, self._steps_before = state["steps"], 0

    def detach(self) -> None:
        """Removes the normalizer from the optimizer; its report stays. Detaching twice is not an error."""
        if self._hooks is None:
            return
        self._hooks.remove()
        for optimizer in self._hooks.optimizers:
            _attached.discard(optimizer)
        self._report, self._steps_before, self._hooks = self._hooks.report, self.steps, None

    def __repr__(self) -> str:
        names = [] if self._hooks is None else [type(optimizer).__name__ for optimizer in self._hooks.optimizers]
        state = f"attached to {' and '.join(names)}" if names else "detached"
        return f"<AttachedNormalizer: {state}, {self.steps} steps, {self.policy}>"

    def __getstate__(self) -> dict[str, object]:
        report = self._report if self._hooks is None else self._hooks.report
        return {**vars(self), "_hooks": None, "_report": report, "_steps_before": self.steps}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        warn(
            "a copy of an attached normalizer is detached: gradients of the copied model are not normalized; call "
            "attach() with the copied model and optimizer"
        )


def _refuse_attached(optimizers: Sequence[Optimizer]) -> None:
    """Refuses optimizers that have a normalizer already."""
    for optimizer in optimizers:
        if any(one in _attached for one in (optimizer, *optimizers_inside(optimizer))):
            raise SettingError(
                "attach(optimizer)",
                got=f"a {type(optimizer).__name__} that has a normalizer already",
                allowed="one normalizer an optimizer",
                advice="detach() the first one, or put both strategies into one policy: overrides={...}",
            )
