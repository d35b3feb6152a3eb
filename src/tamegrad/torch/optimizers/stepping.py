"""What happens around a step: its closure, the steps inside it, and whether gradients changed in between."""

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import currentframe
from traceback import walk_stack
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor, nn
from torch.amp import GradScaler, grad_scaler
from torch.optim import Optimizer

from tamegrad.errors import SettingError, quoted

__all__ = ["NormalizedStep", "Snapshot", "StepCall", "check_loss_scales", "check_normalized_step", "steps_around"]

NormalizedStep: TypeAlias = Literal["outermost", "innermost"]
Closure: TypeAlias = Callable[[], object]

_CHECKPOINT = "torch.distributed.checkpoint.state_dict"
_OPTIMIZER_FILE = sys.modules[Optimizer.__module__].__file__


@dataclass(frozen=True, slots=True)
class StepCall:
    """The arguments of one call of `step`.

    Args:
        args: The positional ones, the optimizer first.
        kwargs: The others.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def closure(self) -> Closure | None:
        """The closure that makes the gradients, if there is one; a loss, which some optimizers take, is none.

        Raises:
            SettingError: If there are several callables, so that it is unknown which one makes the gradients.
        """
        given = [value for value in self.args[1:] if callable(value)]
        others = [name for name, value in self.kwargs.items() if name != "closure" and callable(value)]
        if len(given) > 1 or others:
            raise SettingError(
                f"{type(self.args[0]).__name__}.step",
                got=f"the callables {quoted(others)}" if others else f"{len(given)} callables",
                allowed="a closure, or none: tamegrad cannot see which callable makes the gradients",
                advice="detach() the normalizer, and call GradientNormalizer.normalize_() in the callable that does",
            )
        closure: Closure | None = given[0] if given else self.kwargs.get("closure")
        return closure

    def with_closure(self, closure: Closure) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with another closure in its place."""
        if "closure" in self.kwargs:
            return self.args, {**self.kwargs, "closure": closure}
        optimizer, *others = self.args
        return (optimizer, *(closure if callable(value) else value for value in others)), self.kwargs

    def only_initializes(self) -> bool:
        """Returns whether this is the step by which `torch.distributed.checkpoint` creates an optimizer's state.

        Its gradients and learning rates are 0. Others may be as well, so the function that calls it decides.
        """
        optimizer: Optimizer = self.args[0]
        rates = [group.get("lr", 0.0) for group in optimizer.param_groups]
        if optimizer.state or any(rate != 0 for rate in rates if not isinstance(rate, Tensor)):
            return False
        return any(
            frame.f_code.co_name == "_init_optim_state" and frame.f_globals.get("__name__") == _CHECKPOINT
            for frame, _ in walk_stack(currentframe())
        )


def check_normalized_step(value: object) -> None:
    """Refuses an unknown `normalize`.

    Raises:
        SettingError: If it is neither None nor one of `NormalizedStep`.
    """
    if value is not None and value not in get_args(NormalizedStep):
        raise SettingError(
            "attach(normalize)",
            got=repr(value),
            allowed=f"{quoted(get_args(NormalizedStep))}, or None",
            advice="leave it out unless the optimizer's step changes gradients and calls another step",
        )


class Snapshot:
    """Which gradients some parameters have, to notice later whether they changed.

    It keeps no gradient alive.

    Args:
        parameters: The parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._seen = {parameter: _state_of(parameter.grad) for parameter in parameters}

    def changed(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Returns whether some of the parameters have other gradients now, or other values in them."""
        return any(
            parameter in self._seen and not _is_same(self._seen[parameter], parameter.grad) for parameter in parameters
        )


def _state_of(gradient: Tensor | None) -> tuple[weakref.ref[Tensor], int] | None:
    return None if gradient is None else (weakref.ref(gradient), _version(gradient))


def _is_same(seen: tuple[weakref.ref[Tensor], int] | None, gradient: Tensor | None) -> bool:
    if seen is None or gradient is None:
        return seen is None and gradient is None
    tensor, version = seen
    return tensor() is gradient and version == _version(gradient)


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version.
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001  torch has no other name


def check_loss_scales(optimizers: Sequence[Optimizer]) -> None:
    """Refuses a step of `torch.amp.GradScaler` at which some of several optimizers have scaled gradients, others not.

    A scaler divides the gradients of each optimizer at its own step, unless it was told to before, and a tensor's
    version does not show it.

    Args:
        optimizers: The optimizers whose gradients are about to be normalized together.

    Raises:
        SettingError: If they differ; nothing was changed.
    """
    for frame, _ in walk_stack(currentframe()):
        if frame.f_code.co_filename == grad_scaler.__file__ and isinstance(frame.f_locals.get("self"), GradScaler):
            states = frame.f_locals["self"]._per_optimizer_states  # noqa: SLF001  torch shows it nowhere else
            divided = {states[id(one)]["stage"] is not grad_scaler.OptState.READY for one in optimizers}
            fused = all(getattr(one, "_step_supports_amp_scaling", False) for one in optimizers)
            if divided == {True} or (divided == {False} and fused):
                return
            raise SettingError(
                "GradScaler.step",
                got="several optimizers that share a normalizer, some with gradients that still have the loss scale",
                allowed="gradients without it, or fused optimizers alone",
                advice="call scaler.unscale_(optimizer) for each of them before the first step",
            )


def steps_around(optimizers: Sequence[Optimizer]) -> int:
    """Returns how many steps of some optimizers are running around the one that called this hook.

    The stack is the only witness that cannot be wrong: a counter stays up when a step raises.
    """
    running = 0
    for frame, _ in walk_stack(currentframe()):
        # The function that PyTorch wraps around `step`; torch.compile gives the rest of it another name.
        if frame.f_code.co_filename == _OPTIMIZER_FILE and "wrapper" in frame.f_code.co_name:
            running += any(frame.f_locals.get("self") is optimizer for optimizer in optimizers)
    return max(running - 1, 0)
