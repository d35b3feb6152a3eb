"""The hooks on parameters that tell a stepper when a gradient has arrived."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tamegrad.errors import Line, SettingError, warn

__all__ = ["hook_parameters", "refuse_hooked"]


class _Arrival:
    """Calls a method of its owner when the gradient of a parameter has arrived, and does not keep the owner alive.

    Args:
        arrived: The owner's method.
        unit: The position of the parameter's unit, which the method takes.
        made_at: The user's line that made the owner.
        tell: Calls `tell`, opaque to torch.compile.
    """

    def __init__(
        self, arrived: Callable[[int], None], unit: int, made_at: Line, tell: "Callable[[_Arrival], None]"
    ) -> None:
        self._arrived = weakref.WeakMethod(arrived)
        self._unit = unit
        self._made_at = made_at
        self._tell = tell

    @property
    def is_alive(self) -> bool:
        """Whether its owner is alive."""
        return self._arrived() is not None

    def __call__(self, parameter: Tensor) -> None:
        del parameter
        self._tell(self)

    def tell(self) -> None:
        """Calls the method; warns if the owner is gone."""
        arrived = self._arrived()
        if arrived is not None:
            arrived(self._unit)
            return
        warn(
            "nothing steps this model: its StepInBackward is gone. Keep a reference to it as long as you train, or "
            "call its detach() before you drop it",
            at=self._made_at,
        )


def hook_parameters(
    units: Sequence[Sequence[nn.Parameter]], arrived: Callable[[int], None], made_at: Line
) -> list[Any]:
    """Hooks parameters, frozen ones too: their hooks wait until they are unfrozen.

    Args:
        units: The parameters of each unit.
        arrived: The method to call with the position of a unit.
        made_at: The user's line.

    Returns:
        The handles that remove the hooks.
    """
    # torch.compile would trace the optimizers.
    disable: Any = torch.compiler.disable
    tell = disable(_Arrival.tell)
    handles = []
    for position, parameters in enumerate(units):
        for parameter in parameters:
            frozen = not parameter.requires_grad
            if frozen:
                # PyTorch takes no hook for a parameter that is frozen now.
                parameter.requires_grad = True
            register: Any = parameter.register_post_accumulate_grad_hook
            handles.append(register(_Arrival(arrived, position, made_at, tell)))
            if frozen:
                parameter.requires_grad = False
    return handles


def refuse_hooked(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> None:
    """Refuses parameters that are stepped inside backward already; removes hooks whose owner is gone.

    Raises:
        SettingError: If there is one.
    """
    for name, parameter in zip(names, parameters, strict=True):
        hooks: dict[Any, Any] = parameter._post_accumulate_grad_hooks or {}  # noqa: SLF001
        for key, hook in list(hooks.items()):
            if isinstance(hook, _Arrival) and not hook.is_alive:
                del hooks[key]
            elif isinstance(hook, _Arrival):
                raise _error(name, "that a StepInBackward steps already", "call detach() of the first one")
        if hasattr(parameter, "_in_backward_optimizers"):
            raise _error(
                name,
                "with an optimizer of its own, which steps during backward()",
                "leave out torch.distributed.optim._apply_optimizer_in_backward",
            )


def _error(name: str, got: str, advice: str) -> SettingError:
    return SettingError(
        "StepInBackward(model)",
        got=f"the parameter {name}, {got}",
        allowed="parameters that one optimizer steps",
        advice=advice,
    )
