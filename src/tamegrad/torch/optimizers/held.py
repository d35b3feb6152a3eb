"""Selects the parameters that optimizers hold, and warns where that is probably not what the user meant."""

import math
import operator
import weakref
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from tamegrad.errors import SettingError, quoted, warn
from tamegrad.groups import Plan, make_plan
from tamegrad.policy import Policy
from tamegrad.strategies import Keep
from tamegrad.torch.model.layers import ModelLayers
from tamegrad.torch.model.selection import Selection
from tamegrad.torch.optimizers.wrappers import held_by

__all__ = ["HeldParameters"]

_MOST_NAMED = 5


class HeldParameters(Selection):
    """The parameters that some optimizers hold.

    Args:
        optimizers: The optimizers; they are not kept alive.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._held: list[nn.Parameter] = []
        self._unowned = 0

    def __getstate__(self) -> dict[str, object]:
        # A copy belongs to no optimizer.
        return {**vars(self), "_optimizers": []}

    def apply(self, layers: ModelLayers) -> ModelLayers:
        """Returns the layers with what the optimizers hold now."""
        self._held = self._held_now()
        selected = layers.restricted_to(self._held)
        if layers.parameters and not selected.parameters:
            raise SettingError(
                "attach(model, optimizer)",
                got="an optimizer that holds no parameter of this model",
                allowed="an optimizer of some of the model's parameters",
                advice="make the optimizer from model.parameters(), after the model was moved or wrapped",
            )
        self._warn_about_unowned(selected)
        return selected

    def check(self, plan: Plan, layers: ModelLayers, policy: Policy) -> None:
        """Warns if the norm of a layer or a parameter type covers only the part of it that the optimizers hold."""
        trained = layers.restricted_to(parameter for parameter in layers.parameters if parameter.requires_grad)
        held = {parameter.name for parameter in plan.parameters}
        if all(parameter.name in held for layer in trained.layers for parameter in layer.parameters):
            return
        whole = make_plan(trained.layers, policy)
        for group in whole.groups:
            names = [whole.parameters[member].name for member in group.members]
            missing = [name for name in names if name not in held]
            measures = not isinstance(group.strategy, Keep) and math.isinf(group.strategy.limit)
            if measures and group.strategy.per != "model" and 0 < len(missing) < len(names):
                warn(
                    f"the norm of {group.name!r} covers only a part of it: the optimizer does not hold "
                    f"{quoted(missing[:_MOST_NAMED])}. If another optimizer does, attach to both at once: "
                    "attach(model, [first, second], ...). If nothing trains it, call requires_grad_(False) on it"
                )
                return

    def changed(self) -> bool:
        """Returns whether the optimizers hold other parameters than last time."""
        held = self._held_now()
        return len(held) != len(self._held) or not all(map(operator.is_, held, self._held))

    def _held_now(self) -> list[nn.Parameter]:
        living = [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]
        if len(living) < len(self._optimizers) or not living:
            # An optimizer was deleted, or this is a copy.
            return self._held
        return [parameter for optimizer in living for parameter in held_by(optimizer)]

    def _warn_about_unowned(self, selected: ModelLayers) -> None:
        owned = set(map(id, selected.parameters))
        # Keras lists the states of its random generators, which nothing trains, with the parameters.
        trained = [parameter for parameter in self._held if parameter.requires_grad]
        unowned = {id(parameter): parameter for parameter in trained if id(parameter) not in owned}
        if len(unowned) > self._unowned:
            named = ", ".join(self._name_of(parameter) for parameter in list(unowned.values())[:_MOST_NAMED])
            more = f" and {len(unowned) - _MOST_NAMED} more" if len(unowned) > _MOST_NAMED else ""
            warn(
                f"{len(unowned)} of the optimizer's {len(self._held)} parameters belong to no layer of the model, so "
                f"their gradients are left as they are: {named}{more}. Pass the module that owns them as well: "
                "attach(nn.ModuleList([model, other]), ...) (tamegrad warns once)"
            )
        self._unowned = len(unowned)

    def _name_of(self, wanted: nn.Parameter) -> str:
        """Returns the name of a parameter that the model does not know: the optimizer's own, or its place."""
        for optimizer in filter(None, (ref() for ref in self._optimizers)):
            for number, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter is wanted:
                        # An optimizer that was made from named_parameters() has names.
                        names: list[str] | None = group.get("param_names")
                        place = f'param_groups[{number}]["params"][{index}]' if names is None else repr(names[index])
                        return f"{place} of shape {tuple(parameter.shape)}"
        raise AssertionError("an optimizer lost a parameter while it was attached to")
