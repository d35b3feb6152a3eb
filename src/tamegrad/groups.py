"""The policy compiled against one model: layers, the groups that their parameters form, and the plan that holds both.

Plain data without arrays. `P` is the number of parameters, `G` the number of groups.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tamegrad.errors import SettingError, UnmatchedError, closest, quoted
from tamegrad.policy import Override, Policy
from tamegrad.strategies import Strategy

__all__ = ["Group", "Layer", "Parameter", "Plan", "check_overrides", "make_plan", "unmatched_overrides"]

_ADVICE = (
    "print(normalizer.plan), in JAX print(plan_of(params, None)), made without overrides, shows every layer and its "
    "parameter types"
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a layer.

    Args:
        name: The full name, unique in the model: `encoder.0.bias`.
        type: Its role in the layer: `bias`.
    """

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Layer:
    """The parameters that one module owns.

    Args:
        name: The layer's name, unique in the model: `rnn.l0`.
        parameters: Its parameters, in the order of the model.
        owner: The module's own name where it differs (`rnn` of `rnn.l0`): a pattern that names the owner means all its
            layers.
        module_class: The module's class, for policies with classes as keys.
    """

    name: str
    parameters: tuple[Parameter, ...]
    owner: str | None = None
    module_class: type | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All names the layer answers to."""
        return (self.name,) if self.owner is None else (self.name, self.owner)

    @property
    def types(self) -> tuple[str, ...]:
        """Its parameter types, each once, in the order of its parameters."""
        return tuple(dict.fromkeys(parameter.type for parameter in self.parameters))


@dataclass(frozen=True, slots=True)
class Group:
    """The parameters whose gradients share one norm.

    Args:
        name: Unique in the plan: `encoder.0`, `encoder.0/bias`, `encoder.0.bias` or `model`.
        strategy: What is done to the group.
        members: Positions of its parameters among the plan's.
    """

    name: str
    strategy: Strategy
    members: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Every parameter of a model in exactly one group. Print it to see every layer, its strategy, its parameter types.

    Args:
        layers: The layers, in the order of the model.
        groups: The groups, in the order of their first parameters.

    Example:
        >>> from tamegrad import Clip, Policy
        >>> weight, bias = Parameter("out.weight", "weight"), Parameter("out.bias", "bias")
        >>> print(make_plan([Layer("out", (weight, bias))], Policy(Clip(1.0), overrides={"*/bias": None})))
        1 layer, 2 parameters, 2 groups
        layer  strategy              parameter types
        out    Clip(1, per="layer")  weight
        out    Keep()                bias
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters, layer by layer; `Group.members` are positions in it."""
        return tuple(parameter for layer in self.layers for parameter in layer.parameters)

    @cached_property
    def group_of(self) -> tuple[int, ...]:
        """For each parameter the position of its group."""
        positions = {member: index for index, group in enumerate(self.groups) for member in group.members}
        return tuple(positions[member] for member in range(len(self.parameters)))

    def by_layer(self) -> "list[Plan]":
        """Splits the plan into one a layer, in the order of the layers.

        Raises:
            ValueError: If a group spans several layers.
        """
        owners = [owner for owner, layer in enumerate(self.layers) for _ in layer.parameters]
        plans = []
        groups, start = list(self.groups), 0
        for owner, layer in enumerate(self.layers):
            own: list[Group] = []
            # Groups are in the order of their first parameters.
            while groups and owners[groups[0].members[0]] == owner:
                group = groups.pop(0)
                if {owners[member] for member in group.members} != {owner}:
                    raise ValueError(f"the group {group.name!r} spans several layers")
                own.append(replace(group, members=tuple(member - start for member in group.members)))
            plans.append(Plan((layer,), tuple(own)))
            start += len(layer.parameters)
        return plans

    def layers_of(self, names: Iterable[str]) -> list[str]:
        """Returns the layers that own the given parameters, each once, in the order of the model.

        Args:
            names: Full names of parameters.

        Returns:
            The layers' names.
        """
        wanted = set(names)
        return [layer.name for layer in self.layers if any(parameter.name in wanted for parameter in layer.parameters)]

    def __str__(self) -> str:
        counts = (len(self.layers), "layer"), (len(self.parameters), "parameter"), (len(self.groups), "group")
        rows = [("layer", "strategy", "parameter types"), *self._rows()]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)]
        lines += [f"{layer:{first}}  {strategy:{second}}  {types}" for layer, strategy, types in rows]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str]]:
        rows: list[tuple[str, str, str]] = []
        position = 0
        for layer in self.layers:
            types_of: dict[str, dict[str, None]] = {}
            for parameter in layer.parameters:
                strategy = str(self.groups[self.group_of[position]].strategy)
                types_of.setdefault(strategy, {})[parameter.type] = None
                position += 1
            rows += [(layer.name, strategy, " ".join(types)) for strategy, types in types_of.items()]
        return rows


def make_plan(layers: Sequence[Layer], policy: Policy) -> Plan:
    """Compiles a policy against the layers of a model.

    Args:
        layers: The layers to plan for, in the order of the model.
        policy: Which layer gets which strategy; `check_overrides` checks that all of it applies.

    Returns:
        The plan.

    Raises:
        SettingError: If there is no parameter to plan for.
    """
    if not any(layer.parameters for layer in layers):
        raise SettingError(
            "model", got="no parameters", allowed="a model with at least one parameter", advice="check what was passed"
        )
    groups: dict[tuple[object, ...], tuple[str, Strategy, list[int]]] = {}
    position = 0
    for layer in layers:
        for parameter in layer.parameters:
            override = policy.override_for(layer.names, parameter.type, layer.module_class)
            strategy = policy.default if override is None else override.strategy
            key, name = _group_of(layer, parameter, override, strategy)
            groups.setdefault(key, (name, strategy, []))[2].append(position)
            position += 1
    taken: dict[str, int] = {}
    return Plan(
        tuple(layers),
        tuple(Group(_unique(name, taken), strategy, tuple(members)) for name, strategy, members in groups.values()),
    )


def check_overrides(layers: Sequence[Layer], policy: Policy) -> None:
    """Rejects a policy with an override that matches nothing, which is usually a misspelled name.

    Args:
        layers: All layers of the model.
        policy: The policy.

    Raises:
        UnmatchedError: If an override matches no layer, or no parameter type of the layers that it matches.
    """
    for error in unmatched_overrides(layers, policy).values():
        raise error


def unmatched_overrides(layers: Sequence[Layer], policy: Policy) -> dict[str, UnmatchedError]:
    """Finds the overrides of a policy that match nothing.

    Args:
        layers: All layers of the model.
        policy: The policy.

    Returns:
        An error for each of them, by the override's name.
    """
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        for name in layer.names:
            by_name.setdefault(name, []).append(layer)
    unmatched: dict[str, UnmatchedError] = {}
    for override in policy.overrides:
        candidates = layers if override.exact_layer is None else by_name.get(override.exact_layer, [])
        matched = [layer for layer in candidates if override.matches_layer(layer.names, layer.module_class)]
        error = _mismatch(override, matched, layers)
        if error is not None:
            unmatched[override.name] = error
    return unmatched


def _group_of(
    layer: Layer, parameter: Parameter, override: Override | None, strategy: Strategy
) -> tuple[tuple[object, ...], str]:
    """Returns what identifies the group of a parameter, and the group's name."""
    match strategy.per:
        case "layer" if override is not None and override.type_pattern is not None:
            # The strategy governs a part of the layer; the rest forms other groups.
            return (override, layer), f"{layer.name}/{override.type_pattern}"
        case "layer":
            return (layer,), layer.name
        case "param_type":
            return (layer, parameter.type), f"{layer.name}/{parameter.type}"
        case "tensor":
            return (layer, parameter.name, "tensor"), parameter.name
        case "model":
            return (override, "model"), "model" if override is None else override.name


def _unique(name: str, taken: dict[str, int]) -> str:
    # A layer may be called "model", like the group of the whole model: the second one gets a number.
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else f"{name} ({taken[name]})"


def _mismatch(override: Override, matched: Sequence[Layer], layers: Sequence[Layer]) -> UnmatchedError | None:
    if override.type_pattern is None and matched:
        return None
    if not matched:
        if isinstance(override.key, type):
            classes = dict.fromkeys(layer.module_class.__name__ for layer in layers if layer.module_class is not None)
            wanted, known = "the class of a module that owns parameters", list(classes)
        else:
            wanted, known = "a layer's name, or a glob", [name for layer in layers for name in reversed(layer.names)]
        return UnmatchedError(
            f"override {override.name!r}",
            got=f"a key that matches none of {len(layers)} layers",
            allowed=f"{wanted}; closest: {quoted(closest(override.name, dict.fromkeys(known)))}",
            advice=_advice(override.key, layers),
        )
    types = list(dict.fromkeys(parameter_type for layer in matched for parameter_type in layer.types))
    if any(override.matches(layer.names, own, layer.module_class) for layer in matched for own in layer.types):
        return None
    return UnmatchedError(
        f"override {override.name!r}",
        got=f"a key that matches {quoted(layer.name for layer in matched[:3])}, but none of their parameter types",
        allowed=f"a parameter type, or a glob; closest: {quoted(closest(override.type_pattern or '', types))}",
        advice=_ADVICE,
    )


def _advice(key: str | type, layers: Sequence[Layer]) -> str:
    """Returns what to do about a key that matches no layer; it may be the name of a class instead of the class."""
    owners = (layer.module_class for layer in layers if layer.module_class is not None)
    classes = dict.fromkeys(base for owner in owners for base in owner.__mro__)
    meant = [_in_code(each) for each in classes if key in {each.__name__, _in_code(each), f"torch.{_in_code(each)}"}]
    if not meant:
        return _ADVICE
    return f"to mean every module of that class, use the class itself as the key, without quotes: {' or '.join(meant)}"


def _in_code(kind: type) -> str:
    """Returns a class as users write it: `nn.LayerNorm`, `models.Norm`."""
    if getattr(sys.modules.get("torch.nn"), kind.__name__, None) is kind:
        return f"nn.{kind.__name__}"
    # A class of the program itself, or of one of its functions, needs no module.
    _, local, name = kind.__qualname__.rpartition("<locals>.")
    return name if local or kind.__module__ == "__main__" else f"{kind.__module__}.{name}"
