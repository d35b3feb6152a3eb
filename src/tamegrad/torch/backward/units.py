"""One layer that is stepped on its own: its part of the plan, its optimizer, and how much of its gradient is there."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tamegrad.errors import SettingError
from tamegrad.report import Report
from tamegrad.torch.model.planning import PlannedModel
from tamegrad.torch.settings import Settings
from tamegrad.torch.step import Step

__all__ = ["MakeOptimizer", "Unit", "flat_groups"]

MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]
_PARAMETERS = frozenset({"params", "param_names"})


class Unit:
    """A layer that is normalized and stepped as a whole.

    Args:
        planned: The plan of this layer alone.
        settings: What the user set.
        make_optimizer: Makes an optimizer for the layer's parameters.

    Attributes:
        name: The layer's name.
        parameters: Its parameters, in the order of the plan.
        optimizer: Its optimizer.
        step: The four steps for its gradients.
        report: What the last of its steps did; None before the first.

    Raises:
        SettingError: If `make_optimizer` returns no optimizer, one with other parameters, or `LBFGS`.
    """

    def __init__(self, planned: PlannedModel, settings: Settings, make_optimizer: MakeOptimizer) -> None:
        self.name = planned.plan.layers[0].name
        self.parameters = planned.parameters
        self.step = Step(planned, settings)
        self.report: Report[Tensor] | None = None
        self.optimizer = make_optimizer(list(planned.parameters))
        _check_optimizer(self.optimizer, planned)
        self._planned, self._settings = planned, settings
        self._device = planned.parameters[0].device
        self._nonfinite_before = Counter[str]()
        # Which of the flat groups each group of this optimizer is a part of; `flat_groups` fills it.
        self.places: list[int] = []
        self._arrived = 0

    @property
    def nonfinite_steps(self) -> Counter[str]:
        """In how many steps each group was not finite; this reads the device."""
        counts = zip(self.step.plan.groups, self.step.nonfinite_steps.tolist(), strict=True)
        return self._nonfinite_before + Counter({group.name: count for group, count in counts})

    def use(self, planned: PlannedModel, settings: Settings) -> None:
        """Uses another plan of the same parameters from now on; counters stay.

        Args:
            planned: The plan.
            settings: What the user set.
        """
        step = Step(planned, settings)
        self._nonfinite_before = self.nonfinite_steps
        self._planned, self._settings, self.step = planned, settings, step

    def expect(self) -> None:
        """Waits for new gradients."""
        self._arrived = 0

    def is_complete_with_one_more(self) -> bool:
        """Counts a gradient that has arrived; returns whether all that a backward pass makes are there."""
        self._arrived += 1
        return self._arrived >= sum(parameter.requires_grad for parameter in self.parameters)

    def has_gradient(self) -> bool:
        """Returns whether any parameter has a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def finish(self, groups: Sequence[Mapping[str, Any]], state: Any) -> None:  # noqa: ANN401  as torch types it
        """Normalizes the gradients that there are, steps the optimizer, and frees the gradients.

        Args:
            groups: The flat groups, which hold the hyper-parameters.
            state: The state of all optimizers, by parameter.

        Raises:
            SettingError: If a gradient is of a kind that cannot be normalized, or the optimizer's step changed its own
                hyper-parameters.
            NonFiniteGradientError: If a gradient is not finite under `on_nonfinite="raise"`. Nothing was changed.
        """
        self._normalize()
        self.optimizer.state = state
        self._update_groups(groups)
        self.optimizer.step()
        self._refuse_changed_groups(groups)
        for parameter in self.parameters:
            parameter.grad = None

    def load(self, groups: Sequence[dict[str, Any]], state: Any) -> None:  # noqa: ANN401  as torch types it
        """Lets the optimizer take over a loaded state as if it had loaded its part of it itself."""
        own = [
            {**_options(groups[place]), "params": group["params"]}
            for place, group in zip(self.places, self.optimizer.param_groups, strict=True)
        ]
        # Some classes complete the groups and the state of older versions here.
        self.optimizer.__setstate__({"state": state, "param_groups": own})
        for place, group in zip(self.places, self.optimizer.param_groups, strict=True):
            for key, value in _options(group).items():
                groups[place].setdefault(key, value)

    def _normalize(self) -> None:
        if self.parameters[0].device != self._device:
            # Another backend may be better there.
            self.use(self._planned, self._settings)
            self._device = self.parameters[0].device
        step = self.step
        gradients = step.collect()
        decision, stopped = step.decide(gradients, None)
        if stopped:
            raise step.nonfinite_error(gradients)
        step.apply_(gradients, decision)
        self.report = step.report(decision, skipped=False)
        for parameter in step.left_out(self.report):
            parameter.grad = None

    def _update_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for place, group in zip(self.places, self.optimizer.param_groups, strict=True):
            group.update(_options(groups[place]))

    def _refuse_changed_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for place, group in zip(self.places, self.optimizer.param_groups, strict=True):
            before = groups[place]
            changed = [key for key, value in _options(group).items() if before.get(key, value) is not value]
            if changed:
                raise _optimizer_error(
                    f"a {type(self.optimizer).__name__}, whose step() changes {changed[0]!r} of its group, which "
                    f"layers cannot share (layer {self.name!r} has been stepped)",
                    "choose an optimizer whose state is per parameter",
                )


def flat_groups(units: Sequence[Unit], order: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Joins the groups of the units' optimizers to those of one optimizer for the whole model.

    Groups with equal hyper-parameters become one, unless one optimizer keeps them apart.

    Args:
        units: The units; each learns which flat groups its own are parts of.
        order: All parameters, in the order that the flat groups have them in.

    Returns:
        The groups, as an optimizer of the whole model would have them.
    """
    kinds: list[type] = []
    groups: list[dict[str, Any]] = []
    for unit in units:
        taken: list[int] = []
        kind = type(unit.optimizer)
        for group in unit.optimizer.param_groups:
            options = _options(group)
            same = (
                place
                for place, known in enumerate(groups)
                if kinds[place] is kind and place not in taken and _are_equal(_options(known), options)
            )
            place = next(same, len(groups))
            if place == len(groups):
                kinds.append(kind)
                groups.append({**options, "params": []})
            groups[place]["params"] += group["params"]
            taken.append(place)
        unit.places = taken
    positions = {id(parameter): position for position, parameter in enumerate(order)}
    for flat in groups:
        flat["params"].sort(key=lambda parameter: positions[id(parameter)])
    return groups


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hyper-parameters of a group."""
    return {key: value for key, value in group.items() if key not in _PARAMETERS}


def _are_equal(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return some.keys() == others.keys() and all(_is_equal(value, others[key]) for key, value in some.items())


def _is_equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _held(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _check_optimizer(optimizer: object, planned: PlannedModel) -> None:
    layer = planned.plan.layers[0]
    if not isinstance(optimizer, Optimizer):
        raise _optimizer_error(
            f"a {type(optimizer).__name__} for layer {layer.name!r}",
            "return the optimizer: lambda params: torch.optim.AdamW(params)",
        )
    if isinstance(optimizer, LBFGS):
        raise _optimizer_error(
            "a LBFGS, whose step evaluates the model again", "choose an optimizer that steps with one gradient"
        )
    held = sorted(map(id, _held(optimizer)))
    if held != sorted(map(id, planned.parameters)):
        names = [parameter.name for parameter in layer.parameters]
        raise _optimizer_error(
            f"an optimizer with {len(held)} parameters for layer {layer.name!r}, which was called with {len(names)}: "
            f"{', '.join(names)}",
            "pass all of params on; to leave parameters out, pass the others as StepInBackward(parameters=...)",
        )


def _optimizer_error(got: str, advice: str) -> SettingError:
    return SettingError(
        "StepInBackward(make_optimizer)",
        got=got,
        allowed="a function that returns an optimizer of torch.optim for exactly the parameters that it is given",
        advice=advice,
    )
