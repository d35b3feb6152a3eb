"""`clip_grad_norm_` and `clip_grad_value_` with the signatures of `torch.nn.utils`, to change one import."""

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from operator import is_
from typing import Any, NoReturn
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tamegrad.decide import Decision
from tamegrad.errors import NonFiniteGradientError, SettingError, warn
from tamegrad.groups import Layer, Parameter, make_plan
from tamegrad.policy import Policy
from tamegrad.strategies import Clip, ClipValue, OnNonfinite, Strategy
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.memory import DTYPES
from tamegrad.torch.model.layers import ModelLayers
from tamegrad.torch.model.planning import PlannedModel, Planner
from tamegrad.torch.model.selection import Selection
from tamegrad.torch.settings import Settings
from tamegrad.torch.sharded.sharding import mesh_of, replicated
from tamegrad.torch.step import Step

__all__ = ["clip_grad_norm_", "clip_grad_value_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,  # noqa: FBT001, FBT002  torch's signature
    foreach: bool | None = None,  # noqa: FBT001  torch's signature
) -> Tensor:
    """Clips the norm of all gradients together, in place, as `torch.nn.utils.clip_grad_norm_` does.

    Without its faults: no epsilon, no overflow or underflow, and any mix of dtypes, devices, layouts and meshes.
    `docs/clip-grad.md` lists the differences. Nothing is planned anew when the parameters are those of an earlier call.

    Args:
        parameters: A tensor, or any iterable of tensors; tensors without a gradient are left out, and one that is
            listed twice counts once. Of sharded parameters (DTensors) every rank has to list the same.
        max_norm: The largest norm that is left alone, above 0; infinity only measures.
        norm_type: 2; other norms are refused.
        error_if_nonfinite: Whether to raise if a gradient holds NaN or infinity; this reads the device.
        foreach: Has no effect: the fastest way for the device is taken.

    Returns:
        The norm before, 0-dim, with the device and the dtype that torch's function returns; a DTensor if all gradients
        are DTensors of one mesh. NaN or infinity if and only if a gradient holds one: then no gradient was changed. A
        norm that is too large for the dtype is the largest number of that dtype. 0 if there is no gradient.

    Raises:
        SettingError: If a setting is not allowed, or a gradient is of a kind that cannot be clipped. No gradient was
            changed.
        NonFiniteGradientError: Under `error_if_nonfinite`, which is a `RuntimeError` too, as torch's; it names the
            positions and shapes. No gradient was changed.

    Warns:
        TamegradWarning: If `parameters` is an iterator without anything left in it.

    Example:
        >>> parameter = torch.zeros(2)
        >>> parameter.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_(parameter, max_norm=1.0), parameter.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    del foreach
    strategy = Clip(_checked(max_norm, "clip_grad_norm_(max_norm)"), per="model")
    _check_norm_type(norm_type)
    given = _listed(parameters, "clip_grad_norm_(parameters)")
    if not given:
        return torch.tensor(0.0)
    norm: Tensor = _untraced(_clip_norm)(given, strategy, "raise" if error_if_nonfinite else "keep")
    return norm


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,  # noqa: FBT001  torch's signature
) -> None:
    """Limits the magnitude of every value of the gradients, in place, as `torch.nn.utils.clip_grad_value_` does.

    Infinity becomes the limit, and NaN stays NaN, as there. `docs/clip-grad.md` lists the differences.

    Args:
        parameters: As in `clip_grad_norm_`.
        clip_value: The largest magnitude, above 0. Of a complex value it is that of the pair.
        foreach: Has no effect: the fastest way for the device is taken.

    Raises:
        SettingError: If a setting is not allowed, or a gradient is of a kind that cannot be clipped. No gradient was
            changed.

    Warns:
        TamegradWarning: If `parameters` is an iterator without anything left in it.

    Example:
        >>> parameter = torch.zeros(3)
        >>> parameter.grad = torch.tensor([0.25, -4.0, float("inf")])
        >>> clip_grad_value_(parameter, clip_value=0.5)
        >>> parameter.grad
        tensor([ 0.2500, -0.5000,  0.5000])
    """
    del foreach
    strategy = ClipValue(_checked(clip_value, "clip_grad_value_(clip_value)"))
    given = _listed(parameters, "clip_grad_value_(parameters)")
    if not given:
        return
    _untraced(_clip_value)(given, strategy)


# Makes a function opaque to torch.compile, which would trace all of the step. Only with the first call, since it
# imports the compiler, as every optimizer does.
_untraced: Callable[[Callable[..., Any]], Callable[..., Any]] = functools.cache(torch.compiler.disable)


def _clip_norm(given: list[Tensor], strategy: Clip, on_nonfinite: OnNonfinite) -> Tensor:
    step = _cache.prepared(given).step(given, strategy, on_nonfinite)
    gradients = step.collect()
    decision, stopped = step.decide(gradients, None)
    if stopped:
        _raise_nonfinite(step, gradients, given)
    step.apply_(gradients, decision)
    return _as_torch_returns(decision, gradients, step)


def _clip_value(given: list[Tensor], strategy: ClipValue) -> None:
    step = _cache.prepared(given).step(given, strategy, "keep")
    gradients = step.collect()
    decision, _ = step.decide(gradients, None)
    if decision.limits is not None:
        # Policies leave groups that are not finite as they are; torch's function limits their other values as well.
        xp: Any = np if isinstance(decision.limits, np.ndarray) else torch
        decision.limits = xp.where(decision.nonfinite > 0, strategy.threshold, decision.limits)
    step.apply_(gradients, decision)


@dataclass(eq=False)
class _Prepared:
    """What was planned for some parameters, without keeping them alive.

    Args:
        given: The parameters as they were listed.
        kept: The positions of the first mention of each.
        planned: Their plan, without them.
        steps: The last steps made for them, by what was set.
    """

    most_steps = 4

    given: list[ref[Tensor]]
    kept: list[int]
    planned: PlannedModel
    steps: dict[tuple[Strategy, OnNonfinite], Step] = field(default_factory=dict)

    @classmethod
    def of(cls, given: list[Tensor]) -> "_Prepared":
        """Plans for parameters; of sharded ones, every rank must call it.

        Raises:
            SettingError: If the ranks have different parameters, or FSDP1 or DeepSpeed has the gradients.
        """
        first = {id(parameter): position for position, parameter in reversed(list(enumerate(given)))}
        kept = sorted(first.values())
        names = [_name(position) for position in kept]
        parameters: Any = tuple(given[position] for position in kept)
        # Each is a layer of its own, so that a limit on elements is decided on for each of them.
        layers = ModelLayers(
            tuple(Layer(name, (Parameter(name, "values"),)) for name in names),
            tuple((parameter,) for parameter in parameters),
        )
        settings = Settings.of(Clip(math.inf, per="model"))
        planned = Planner(layers, settings, Selection()).first_plan(settings.policy)
        made = cls([ref(parameter) for parameter in given], kept, planned)
        made.planned = replace(planned, parameters=())
        return made

    def fits(self, given: list[Tensor]) -> bool:
        """Returns whether this was planned for just these parameters, on their device."""
        same = len(given) == len(self.given) and all(map(is_, (one() for one in self.given), given))
        return same and given[0].device == self.planned.device

    def step(self, given: list[Tensor], strategy: Strategy, on_nonfinite: OnNonfinite) -> Step:
        """Returns the step that does this to the parameters; made anew only if the strategy is new."""
        parameters: Any = tuple(given if len(self.kept) == len(given) else (given[position] for position in self.kept))
        key = strategy, on_nonfinite
        step = self.steps.get(key)
        if step is None:
            # A schedule of thresholds never comes back to an earlier one.
            while len(self.steps) >= self.most_steps:
                self.steps.pop(next(iter(self.steps)), None)
            plan = make_plan(self.planned.plan.layers, Policy(strategy))
            settings = Settings.of(strategy, on_nonfinite=on_nonfinite)
            step = Step(replace(self.planned, plan=plan, parameters=parameters), settings)
            self.steps[key] = step.on(())
        return step.on(parameters)


class _Cache:
    """What was prepared for the last lists of parameters, as long as the first parameter of each is alive.

    Which lists are still known depends on the calls alone, and not on when memory is freed: ranks that make the same
    calls plan together.
    """

    most_lists = 4  # that begin with the same parameter

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def prepared(self, given: list[Tensor]) -> _Prepared:
        """Returns what was prepared for these parameters, or prepares it."""
        with self._lock:
            known: list[_Prepared] = self._known.get(given[0], [])
        for one in known:
            if one.fits(given):
                return one
        made = _Prepared.of(given)
        with self._lock:
            self._known[given[0]] = [made, *known][: self.most_lists]
        return made


_cache = _Cache()


def _listed(parameters: object, where: str) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    given: list[Any] = list(parameters) if isinstance(parameters, Iterable) else [parameters]
    wrong = [one for one in given if not isinstance(one, Tensor)]
    if wrong:
        kind = type(wrong[0]).__name__
        raise SettingError(
            where,
            got=f"a {kind} among the parameters" if isinstance(parameters, Iterable) else f"a {kind}",
            allowed="a tensor, or an iterable of tensors",
            advice="pass model.parameters()",
        )
    if not given and isinstance(parameters, Iterator):
        warn(
            f"{where.partition('(')[0]} got an iterator without anything left in it, so nothing is clipped; it can be "
            "read once: call model.parameters() again, or make a list of it"
        )
    return given


def _checked(limit: object, where: str) -> float:
    refused = limit is None or isinstance(limit, bool | str | bytes)
    try:
        number = math.nan if refused else float(limit)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not number > 0:
        raise SettingError(
            where,
            got=repr(limit),
            allowed="a number above 0, or infinity to change nothing",
            advice="to turn clipping off, pass float('inf') or leave the call out; "
            "to make all gradients zero, call optimizer.zero_grad(set_to_none=False)",
        )
    return number


def _check_norm_type(norm_type: Any) -> None:  # noqa: ANN401  torch's function takes whatever float() does
    try:
        is_two = float(norm_type) == 2.0  # noqa: PLR2004  the Euclidean norm
    except (TypeError, ValueError):
        is_two = False
    if not is_two:
        raise SettingError(
            "clip_grad_norm_(norm_type)",
            got=repr(norm_type),
            allowed="2",
            advice="for other norms use torch.nn.utils.clip_grad_norm_",
        )


def _raise_nonfinite(step: Step, gradients: Gradients, given: list[Tensor]) -> NoReturn:
    """Raises the error that names positions and shapes."""
    counts = step.nonfinite_error(gradients).counts
    shapes = {
        name: given[position].shape for position, name in enumerate(map(_name, range(len(given)))) if name in counts
    }
    raise NonFiniteGradientError(
        {f"{name} of shape {tuple(shapes[name])}": found for name, found in counts.items()},
        (),
        where="clip_grad_norm_(error_if_nonfinite=True)",
        advice="look at the loss and the inputs of this step, or pass error_if_nonfinite=False and leave out the "
        "optimizer step when the returned norm is not finite; no gradient was changed",
    )


def _as_torch_returns(decision: Decision[Any], gradients: Gradients, step: Step) -> Tensor:
    """Returns the total norm with the device and the dtype of torch's function; does not wait for a device."""
    first = next((values for values in gradients.values if values is not None), None)
    if first is None:
        return torch.tensor(float(decision.total_norm))
    dtypes = (DTYPES[index].to_real() for index in np.unique(gradients.memory.dtypes) if index >= 0)
    dtype = functools.reduce(torch.promote_types, dtypes)
    total, nonfinite, largest = decision.total_norm, decision.nonfinite, torch.finfo(dtype).max
    # Too large a norm of finite gradients must not look as if they were not.
    if isinstance(total, Tensor):
        norm = torch.where((nonfinite == 0).all(), total.clamp(max=largest), total).to(first.device, dtype)
    else:
        value = total if nonfinite.any() else min(total, largest)
        norm = torch.tensor(value, dtype=dtype, device=first.device)
    if not step.is_sharded:
        return norm
    meshes = {mesh_of(parameter) for parameter in step.parameters if parameter.grad is not None}
    mesh = meshes.pop()
    return norm if meshes or mesh is None else replicated(norm, mesh)


def _name(position: int) -> str:
    return f"parameters[{position}]"
