"""Converts a Deeplearning4j network to a policy, and a policy to the Python code that builds it."""

import math
from collections.abc import Mapping

from tamegrad.dl4j.document import Dl4jFileError
from tamegrad.dl4j.layers import Dl4jLayer, Dl4jModel
from tamegrad.errors import SettingError, UnmatchedError, closest, quoted
from tamegrad.policy import Policy
from tamegrad.strategies import Clip, ClipValue, Keep, Renormalize, Strategy

__all__ = ["policy_as_python", "policy_of"]

_MOST_SHOWN = 5


def policy_of(model: Dl4jModel, names: Mapping[str, str] | None = None) -> Policy:
    """Returns the policy of a network: one override per layer that has parameters, and `Keep()` as the default.

    Args:
        model: The network.
        names: Maps Deeplearning4j's layer names to the PyTorch model's; other names stay as they are.

    Returns:
        The policy.

    Raises:
        SettingError: If `names` is not a mapping of names, or gives two layers the same name.
        UnmatchedError: If a key of `names` is not a layer of the network.
        Dl4jFileError: If two layers of the same name have different strategies, or a layer's name is empty and `names`
            does not map it.

    Example:
        >>> from tamegrad import Clip
        >>> layer = Dl4jLayer("layer0", "LSTM", 4, 5, Clip(0.5), has_parameters=True, place="confs[0].layer")
        >>> policy_of(Dl4jModel("model.zip", "MultiLayerNetwork", (layer,)), names={"layer0": "rnn"})
        Policy(Keep(), overrides={'rnn': Clip(threshold=0.5, per='layer')})
    """
    renamed = _checked(names, model)
    taken: dict[str, Dl4jLayer] = {}
    for layer in model.layers:
        if layer.has_parameters:
            name = renamed.get(layer.name, layer.name)
            _check_free(name, layer, taken.get(name), model)
            taken[name] = layer
    return Policy(Keep(), overrides={Policy.escape(name): layer.strategy for name, layer in taken.items()})


def _checked(names: Mapping[str, str] | None, model: Dl4jModel) -> Mapping[str, str]:
    if names is None:
        return {}
    where = f"read_policy({model.file}, names)"
    advice = 'pass, for example, names={"layer0": "rnn"}'
    if not isinstance(names, Mapping):
        raise SettingError(where, got=repr(names), allowed="a mapping of layer names, or None", advice=advice)
    for key, value in names.items():
        if not all(isinstance(name, str) for name in (key, value)) or not value:
            raise SettingError(
                where, got=f"{key!r}: {value!r}", allowed="a PyTorch layer name for each layer name", advice=advice
            )
    known = dict.fromkeys(layer.name for layer in model.layers)
    unknown = [key for key in names if key not in known]
    if unknown:
        raise UnmatchedError(
            where,
            got=f"{quoted(unknown[:_MOST_SHOWN])}, which is not a layer of the file",
            allowed=f"its {len(known)} layers; closest: {quoted(closest(unknown[0][:100], known))}",
            advice="read_model(path).layers lists them",
        )
    return names


def _check_free(name: str, layer: Dl4jLayer, other: Dl4jLayer | None, model: Dl4jModel) -> None:
    where = f"{model.file}: {layer.place}"
    if not name:
        raise Dl4jFileError(
            where, got="a layer with an empty name", allowed="a name", advice='pass names={"": "its PyTorch name"}'
        )
    if other is None:
        return
    if other.name != layer.name:
        raise SettingError(
            f"read_policy({model.file}, names)",
            got=f"{name!r} for both {other.name!r} and {layer.name!r}",
            allowed="a different name for each layer",
            advice="give one of them another name in names",
        )
    if other.strategy != layer.strategy:
        raise Dl4jFileError(
            where,
            got=f"{name!r} with {layer.strategy}, but {other.place} has the same name with {other.strategy}",
            allowed="a different name for each layer, or one strategy for all layers of one name",
            advice="give one of them another layerName in the file",
        )


def policy_as_python(policy: Policy) -> str:
    """Returns Python code that builds a policy.

    Args:
        policy: The policy; its keys are names or globs.

    Returns:
        The code, which imports what it needs and assigns the policy to `policy`.

    Raises:
        SettingError: If a key is a module class, because the code cannot know how to import it.

    Example:
        >>> from tamegrad import Clip
        >>> print(policy_as_python(Policy(Clip(1.0), overrides={"rnn": Clip(0.5, per="param_type"), "out": None})))
        from tamegrad import Clip, Keep, Policy
        <BLANKLINE>
        policy = Policy(
            Clip(1.0, per="layer"),
            overrides={
                "rnn": Clip(0.5, per="param_type"),
                "out": Keep(),
            },
        )
    """
    strategies = [policy.default, *(override.strategy for override in policy.overrides)]
    imported = sorted({"Policy", *(type(strategy).__name__ for strategy in strategies)})
    infinite = any(isinstance(strategy, Clip | ClipValue) and math.isinf(strategy.threshold) for strategy in strategies)
    lines = ["import math", ""] * infinite
    lines += [f"from tamegrad import {', '.join(imported)}", "", "policy = Policy("]
    lines += [f"    {_as_python(policy.default)},", "    overrides={"]
    for override in policy.overrides:
        if not isinstance(override.key, str):
            raise SettingError(
                "policy_as_python(policy)",
                got=f"the module class {override.name}",
                allowed="keys that are layer names or globs",
                advice="write the policy by hand, and import that class",
            )
        lines.append(f"        {_quoted(override.key)}: {_as_python(override.strategy)},")
    return "\n".join([*lines, "    },", ")"])


def _as_python(strategy: Strategy) -> str:
    # A strategy's `str` rounds its threshold; this keeps every digit.
    match strategy:
        case Keep():
            return "Keep()"
        case Renormalize(per=per):
            return f'Renormalize(per="{per}")'
        case Clip(threshold=threshold, per=per):
            return f'Clip({_number(threshold)}, per="{per}")'
        case ClipValue(threshold=threshold):
            return f"ClipValue({_number(threshold)})"
        case _:
            raise SettingError(
                "policy_as_python(policy)",
                got=f"a {type(strategy).__name__}",
                allowed="the strategies of tamegrad",
                advice="write the policy by hand, and import that class",
            )


def _number(threshold: float) -> str:
    return "math.inf" if threshold == math.inf else repr(threshold)


def _quoted(key: str) -> str:
    text = repr(key)
    return text if '"' in text else f'"{text[1:-1]}"'
