"""Finds the optimizer to attach to, or refuses with the name of what to attach to instead.

Wrappers are recognized by class, without importing their libraries, and never by the name of an attribute alone:
`ZeroRedundancyOptimizer.optim`, for example, holds only a part of the parameters.
"""

import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from tamegrad.errors import SettingError
from tamegrad.torch.living import living
from tamegrad.torch.model.unsupported import refuse_deepspeed

__all__ = ["held_by", "hook_inherited_steps", "optimizers_inside", "optimizers_to_attach_to"]

# Wrappers that only pass the step on, each with the attribute that holds the optimizer inside.
_TRANSPARENT = {
    "accelerate.optimizer.AcceleratedOptimizer": "optimizer",
    "lightning.fabric.wrappers._FabricOptimizer": "optimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer": "optimizer",
    "lightning_fabric.wrappers._FabricOptimizer": "optimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer": "optimizer",
    "torch.distributed.optim.post_localSGD_optimizer.PostLocalSGDOptimizer": "optim",
}
_IN_BACKWARD = "which steps each parameter during backward(), before the norm of its layer is known"
_BY_DEEPSPEED = (
    "whose steps DeepSpeed takes",
    'set "gradient_clipping" in the DeepSpeed configuration, which clips by one norm over the model',
)
_AFTER_BACKWARD = (_IN_BACKWARD, "choose an optimizer that steps after backward()")
# Classes that no normalizer can work with, each with the reason and what to do.
_REFUSED = {
    "accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper": _BY_DEEPSPEED,
    "accelerate.utils.deepspeed.DummyOptim": _BY_DEEPSPEED,
    "accelerate.utils.megatron_lm.MegatronLMOptimizerWrapper": (
        "whose steps Megatron-LM takes",
        'set "gradient_clipping" of the MegatronLMPlugin, which clips by one norm over the model',
    ),
    "lomo_optim.adalomo.AdaLomo": _AFTER_BACKWARD,
    "lomo_optim.lomo.Lomo": _AFTER_BACKWARD,
    "pytorch_optimizer.optimizer.lomo.AdaLOMO": _AFTER_BACKWARD,
    "pytorch_optimizer.optimizer.lomo.LOMO": _AFTER_BACKWARD,
    "tamegrad.torch.backward.stepper.StepInBackward": (
        "which normalizes and steps each layer during backward()",
        "choose the policy where it is made: StepInBackward(model, make_optimizer, policy)",
    ),
    "torchtune.training.memory.OptimizerInBackwardWrapper": (
        _IN_BACKWARD,
        "set optimizer_in_bwd to False, and attach to the optimizer that then steps after backward()",
    ),
    "transformers.trainer_pt_utils.LayerWiseDummyOptimizer": (
        _IN_BACKWARD,
        'choose an optimizer without "layerwise" in its name: optim="galore_adamw", for example',
    ),
}
EntryT = TypeVar("EntryT")
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def optimizers_to_attach_to(given: object) -> list[Optimizer]:
    """Returns the optimizers that a user meant: those that were passed, or the ones inside known wrappers.

    Args:
        given: What the user passed, an optimizer or a list of optimizers.

    Returns:
        Optimizers whose `step` runs PyTorch's step hooks.

    Raises:
        SettingError: If one is none; the message says what to attach to instead.
    """
    if not isinstance(given, list | tuple):
        return [_unwrapped(given)]
    optimizers = [_unwrapped(optimizer) for optimizer in given]
    if not optimizers or len(set(map(id, optimizers))) < len(optimizers):
        raise _error("a list with an optimizer twice" if optimizers else "an empty list", "list every optimizer once")
    return optimizers


def _unwrapped(optimizer: object) -> Optimizer:
    """Returns an optimizer, or the one inside if it is a known wrapper."""
    inside: Any = optimizer
    path = "optimizer"
    while True:
        if refused := _entry_of(inside, _REFUSED):
            reason, advice = refused
            raise _error(f"a {type(inside).__name__}, {reason}", advice)
        attribute = _entry_of(inside, _TRANSPARENT)
        if attribute is None:
            break
        inside, path = getattr(inside, attribute), f"{path}.{attribute}"
    if not isinstance(inside, Optimizer):
        refuse_deepspeed("attach(optimizer)", inside)
        raise _error(f"a {type(inside).__name__}", _advice_for(inside, path))
    if not _runs_hooks(inside):
        got = f"a {type(inside).__name__}, whose step() does not run PyTorch's step hooks"
        raise _error(got, _advice_for(inside, path))
    _refuse_part_of_zero(inside)
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in held_by(inside)):
        raise _error(
            "parameters with an optimizer of their own, which steps during backward()",
            "leave out torch.distributed.optim._apply_optimizer_in_backward",
        )
    return inside


def optimizers_inside(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizers that another one holds in its attributes and that step the same parameters.

    `SAM.second_step()`, for example, steps the optimizer inside without a step of `SAM`.
    """
    own = set(map(id, held_by(optimizer)))
    found, waiting = [optimizer], [optimizer]
    while waiting:
        for _, inner in _optimizers_in_attributes(waiting.pop(), "optimizer"):
            same = _runs_hooks(inner) and set(map(id, held_by(inner))) == own
            if same and not any(inner is known for known in found):
                found.append(inner)
                waiting.append(inner)
    return found[1:]


def hook_inherited_steps(optimizer: Optimizer) -> bool:
    """Lets the steps that a class inherits run hooks too, and returns whether one of its steps may call another.

    PyTorch makes a class run hooks when its first instance is made, so that without this it would depend on the past
    whether `super().step()` is noticed. Only classes of `torch.optim` are changed: they all have the tables of hooks.
    """
    classes = [base for base in type(optimizer).__mro__ if "step" in vars(base) and issubclass(base, Optimizer)]
    classes.remove(Optimizer)
    for base in classes:
        if base.__module__.startswith("torch.optim.") and not getattr(base.step, "hooked", False):
            hooked: Any = Optimizer.profile_hook_step(base.step)
            hooked.hooked = True
            base.step = hooked  # type: ignore[method-assign]
    return len(classes) > 1


def held_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """Returns the parameters that an optimizer holds, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _entry_of(value: object, table: dict[str, EntryT]) -> EntryT | None:
    """Returns the entry of a value's class, or of the first of its bases that has one."""
    return next((table[path] for path in map(_path_of, type(value).__mro__) if path in table), None)


def _path_of(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _runs_hooks(optimizer: Optimizer) -> bool:
    # A class that never calls Optimizer.__init__ lacks one of the two, or both.
    return getattr(type(optimizer).step, "hooked", False) and "_optimizer_step_pre_hooks" in vars(optimizer)


def _optimizers_in_attributes(owner: object, path: str) -> Iterator[tuple[str, Optimizer]]:
    """Yields the optimizers in an object's attributes, and in lists and dictionaries there, each with its path."""
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, Optimizer):
            yield f"{path}.{name}", value
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{path}.{name}[{key!r}]", item) for key, item in items if isinstance(item, Optimizer))


def _advice_for(optimizer: Any, path: str) -> str:  # noqa: ANN401  whatever the user passed
    """Says what to attach to instead of something that runs no hooks and that the user has at `path`."""
    inner = [(place, wrapped) for place, wrapped in _optimizers_in_attributes(optimizer, path) if _runs_hooks(wrapped)]
    if len(inner) == 1:
        place, wrapped = inner[0]
        return f"attach to {place}, the {type(wrapped).__name__} that it wraps"
    if inner:
        places = ", ".join(place for place, _ in inner)
        return f"attach to the optimizers that it wraps: attach(model, [{places}], ...)"
    if not isinstance(optimizer, Optimizer):
        return "pass the optimizer itself, or call GradientNormalizer.normalize_() before its step"
    return (
        f"call super().__init__(params, defaults) in {type(optimizer).__name__}.__init__, or call "
        "GradientNormalizer.normalize_() before its step"
    )


def _refuse_part_of_zero(optimizer: Optimizer) -> None:
    """Refuses the optimizer inside a `ZeroRedundancyOptimizer`, which holds this rank's part of the parameters."""
    if _ZERO not in sys.modules or not torch.distributed.is_initialized():
        return
    # The optimizer inside does not know its owner.
    if any(owner.optim is optimizer for owner in living(sys.modules[_ZERO].ZeroRedundancyOptimizer)):
        raise _error(
            f"the {type(optimizer).__name__} inside a ZeroRedundancyOptimizer, which holds a part of the parameters",
            "attach to the ZeroRedundancyOptimizer itself",
        )


def _error(got: str, advice: str) -> SettingError:
    return SettingError(
        "attach(optimizer)",
        got=got,
        allowed="an optimizer of torch.optim, a subclass that runs its step hooks, or a list of them",
        advice=advice,
    )
