"""Normalizes right before an optimizer's step, whatever calls it."""

import operator
import sys
import warnings
from types import FrameType
from typing import Any, Unpack
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tamegrad.errors import NonFiniteGradientError, SettingError, TamegradWarning
from tamegrad.groups import Plan
from tamegrad.report import Report
from tamegrad.torch.backends import SelectedBackend
from tamegrad.torch.model.layers import ModelLayers
from tamegrad.torch.model.planning import Model
from tamegrad.torch.model.selection import Selection
from tamegrad.torch.model.unsupported import refuse_deepspeed
from tamegrad.torch.normalizer import GradientNormalizer
from tamegrad.torch.settings import Keywords

__all__ = ["AttachedNormalizer", "attach"]


def attach(
    model: Model,
    optimizer: torch.optim.Optimizer,
    policy: object,
    **settings: Unpack[Keywords],
) -> "AttachedNormalizer":
    """Normalizes gradients before every step of an optimizer from now on.

    With `optimizer.step(closure)`, the gradients of each evaluation of the closure are normalized. Only the parameters
    that the optimizer holds are normalized, so two optimizers of one model can have two policies. Under
    `torch.amp.GradScaler`, strategies apply to the gradients without the loss scale, whether or not `unscale_` was
    called. A copy of the optimizer (`copy.deepcopy`, pickle) is not attached.

    Args:
        model: The model, or pairs of a name and a parameter.
        optimizer: Any optimizer of `torch.optim`, or a subclass of `torch.optim.Optimizer`.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        **settings: As in `GradientNormalizer`. `on_nonfinite="skip"` here skips the optimizer's step: neither
            parameters nor the optimizer's state change. `LBFGS` cannot skip a step.

    Returns:
        The attached normalizer: `report` is of the last step; call `detach()` to remove it.

    Raises:
        SettingError: If a setting is unknown, the optimizer holds no parameter of the model or has a normalizer
            already, `"skip"` meets `LBFGS`, or as `GradientNormalizer` does.
        UnmatchedError: If an override or a pattern of `layers` matches nothing; the message names the closest.

    Warns:
        TamegradWarning: Once each, if the optimizer holds parameters that no layer of the model owns, and at a step
            without any gradient.

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
    _check(optimizer)
    normalizer = GradientNormalizer(model, policy, parameters=_HeldParameters(optimizer), **settings)
    if normalizer.settings.on_nonfinite == "skip" and isinstance(optimizer, torch.optim.LBFGS):
        raise SettingError(
            "attach(on_nonfinite)",
            got='"skip" with LBFGS, whose step changes its state whatever the gradients are',
            allowed='"keep", "zero" or "raise" with LBFGS',
            advice='pass on_nonfinite="zero" or "raise"',
        )
    return AttachedNormalizer(normalizer, optimizer)


class AttachedNormalizer:
    """A `GradientNormalizer` that an optimizer calls; `attach` makes it.

    Args:
        normalizer: The normalizer.
        optimizer: The optimizer.
    """

    def __init__(self, normalizer: GradientNormalizer, optimizer: torch.optim.Optimizer) -> None:
        self._normalizer = normalizer
        self._optimizer = optimizer
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._outermost: FrameType | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.add(optimizer)

    @property
    def report(self) -> Report[Tensor] | None:
        """What the last step did; None before the first."""
        return self._normalizer.report

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

    def detach(self) -> None:
        """Removes the normalizer from the optimizer; its report stays. Detaching twice is not an error."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _attached.discard(self._optimizer)

    def _before_step(
        self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A flag would stay set when a step raises; the stack shows whether this step is inside another one.
        caller = sys._getframe(1)  # noqa: SLF001
        if self._outermost is not None and _is_inside(caller, self._outermost):
            # A subclass called super().step(): its gradients are normalized already.
            return None
        self._outermost = caller
        # Gradients hidden by a step that raised are not restored: by now they may be of another batch.
        self._hidden.clear()
        # args[0] is the optimizer. With a closure the gradients do not exist yet.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._normalize_for_step()
            return None

        def normalized() -> object:
            loss = closure()
            self._normalize_for_step()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": normalized}
        return (args[0], normalized, *args[2:]), kwargs

    def _after_step(self, *_: object) -> None:
        if self._outermost is sys._getframe(1):  # noqa: SLF001  an inner step is not the end
            self._outermost = None
            self._show()

    def _normalize_for_step(self) -> None:
        # torch.amp.GradScaler leaves it to a fused optimizer to divide by the loss scale and to skip on infinity.
        loss_scale = getattr(self._optimizer, "grad_scale", None)
        found_inf = getattr(self._optimizer, "found_inf", None)
        scaler_skips = (
            found_inf is not None and self._normalizer.settings.on_nonfinite in {"skip", "raise"} and bool(found_inf)
        )
        try:
            report = self._normalizer._normalize(loss_scale, scaler_skips=scaler_skips)  # noqa: SLF001
        except NonFiniteGradientError:
            # The scaler removes its attributes after the step, which it no longer reaches.
            for name in ("grad_scale", "found_inf"):
                if hasattr(self._optimizer, name):
                    delattr(self._optimizer, name)
            raise
        if report.skipped:
            self._hide()

    def _hide(self) -> None:
        """Hides the gradients: a hook cannot cancel a step, but no optimizer touches a parameter without a gradient."""
        for parameter in _held_by(self._optimizer):
            if parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None

    def _show(self) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()


# Optimizers that have a normalizer; a second one would normalize the same gradients twice.
_attached: WeakSet[torch.optim.Optimizer] = WeakSet()


def _check(optimizer: torch.optim.Optimizer) -> None:
    """Refuses optimizers that cannot be attached to."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingError(
            "attach(optimizer)",
            got=f"a {type(optimizer).__name__}",
            allowed="a torch.optim.Optimizer",
            advice="pass the optimizer itself, or call GradientNormalizer.normalize_ before its step",
        )
    refuse_deepspeed("attach(optimizer)", optimizer)
    if optimizer in _attached:
        raise SettingError(
            "attach(optimizer)",
            got=f"a {type(optimizer).__name__} that has a normalizer already",
            allowed="one normalizer an optimizer",
            advice="detach() the first one, or put both strategies into one policy: overrides={...}",
        )


class _HeldParameters(Selection):
    """The parameters that an optimizer holds.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._held: list[nn.Parameter] = []
        self._unowned = 0

    def apply(self, layers: ModelLayers) -> ModelLayers:
        """Returns the layers with what the optimizer holds now."""
        self._held = _held_by(self._optimizer)
        selected = layers.restricted_to(self._held)
        if layers.parameters and not selected.parameters:
            raise SettingError(
                "attach(model, optimizer)",
                got="an optimizer that holds no parameter of this model",
                allowed="an optimizer of some of the model's parameters",
                advice="make the optimizer from model.parameters(), after the model was moved or wrapped",
            )
        unowned = len({id(parameter) for parameter in self._held}) - len(selected.parameters)
        if unowned > self._unowned:
            warnings.warn(
                f"{unowned} of the optimizer's {len(self._held)} parameters belong to no layer of the model; their "
                "gradients are left as they are (tamegrad warns once)",
                TamegradWarning,
                stacklevel=2,
            )
        self._unowned = unowned
        return selected

    def changed(self) -> bool:
        """Returns whether the optimizer holds other parameters than last time."""
        held = _held_by(self._optimizer)
        return len(held) != len(self._held) or not all(map(operator.is_, held, self._held))


def _held_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_inside(frame: FrameType, outer: FrameType) -> bool:
    """Returns whether a call was made, directly or not, by another one that is still running."""
    above: FrameType | None = frame
    while above is not None and above is not outer:
        above = above.f_back
    return above is outer
