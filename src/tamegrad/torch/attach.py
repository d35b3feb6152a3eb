"""Normalizes right before an optimizer's step, whoever calls it."""

from collections.abc import Sequence
from typing import Any

import torch
from tamegrad.errors import SettingError
from tamegrad.policy import Overrides
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.kernels import BackendName
from tamegrad.torch.layers import find_layers
from tamegrad.torch.normalizer import GradientNormalizer
from torch import Tensor, nn

__all__ = ["AttachedNormalizer", "attach"]


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    policy: object,
    *,
    overrides: Overrides | None = None,
    layers: Sequence[str] | None = None,
    on_nonfinite: OnNonfinite = "keep",
    backend: BackendName = "auto",
) -> "AttachedNormalizer":
    """Normalizes gradients from now on before every step of an optimizer.

    With `optimizer.step(closure)` the gradients of each evaluation of the closure are normalized. Only parameters that
    the optimizer holds are, so that two optimizers of one model can have two policies.

    Args:
        model: The model.
        optimizer: Any optimizer of `torch.optim`, or a subclass of `torch.optim.Optimizer`.
        policy: A `Policy`, a strategy, or a member of `GradientNormalization` (threshold 1.0).
        overrides: As in `GradientNormalizer`.
        layers: As in `GradientNormalizer`.
        on_nonfinite: As in `GradientNormalizer`; `"skip"` here leaves out the optimizer's step: neither parameters nor
            the optimizer's state change. `LBFGS` cannot leave out a step.
        backend: As in `GradientNormalizer`.

    Returns:
        The normalizer; its `report` is of the last step, its `detach()` ends the matter.

    Raises:
        SettingError: If a setting is unknown, the optimizer holds no parameter of the model, or `"skip"` meets `LBFGS`.
        UnmatchedError: If an override or a pattern of `layers` matches nothing; the message names the closest.

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
    _check(model, optimizer, on_nonfinite)
    return AttachedNormalizer(
        model,
        optimizer,
        policy,
        overrides=overrides,
        layers=layers,
        on_nonfinite=on_nonfinite,
        backend=backend,
    )


class AttachedNormalizer(GradientNormalizer):
    """A `GradientNormalizer` that an optimizer calls; `attach` makes it."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        policy: object,
        *,
        overrides: Overrides | None,
        layers: Sequence[str] | None,
        on_nonfinite: OnNonfinite,
        backend: BackendName,
    ) -> None:
        super().__init__(
            model,
            policy,
            overrides=overrides,
            layers=layers,
            parameters=_held_by(optimizer),
            on_nonfinite=on_nonfinite,
            backend=backend,
        )
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Takes the normalizer off the optimizer; its report stays. Detaching twice is no error."""
        for hook in self._hooks:
            hook.remove()

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # args[0] is the optimizer. With a closure the gradients do not exist yet.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._normalize_for(optimizer)
            return None

        def normalized() -> object:
            loss = closure()
            self._normalize_for(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": normalized}
        return (args[0], normalized, *args[2:]), kwargs

    def _normalize_for(self, optimizer: torch.optim.Optimizer) -> None:
        if self.normalize_().skipped:
            # A hook cannot cancel a step, but no optimizer touches a parameter without a gradient.
            for parameter in _held_by(optimizer):
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after_step(self, *_: object) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()


def _check(model: nn.Module, optimizer: torch.optim.Optimizer, on_nonfinite: OnNonfinite) -> None:
    """Refuses what cannot be attached."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SettingError(
            "attach(optimizer)",
            got=f"a {type(optimizer).__name__}",
            allowed="a torch.optim.Optimizer",
            advice="pass the optimizer itself, or call GradientNormalizer.normalize_ before its step",
        )
    if on_nonfinite == "skip" and isinstance(optimizer, torch.optim.LBFGS):
        raise SettingError(
            "attach(on_nonfinite)",
            got='"skip" with LBFGS, whose step changes its state whatever the gradients are',
            allowed='"keep", "zero" or "raise" with LBFGS',
            advice='pass on_nonfinite="zero" or "raise"',
        )
    found = find_layers(model)
    if found.parameters and not found.restricted_to(_held_by(optimizer)).parameters:
        raise SettingError(
            "attach(model, optimizer)",
            got="an optimizer that holds no parameter of this model",
            allowed="an optimizer of some of the model's parameters",
            advice="make the optimizer from model.parameters(), after the model was moved or wrapped",
        )


def _held_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
