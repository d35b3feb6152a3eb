"""Derives layers from parameter names, for callers with `(name, parameter)` pairs instead of a module."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tamegrad.errors import SettingError
from tamegrad.groups import Layer, Parameter
from tamegrad.torch.model.layers import ModelLayers, matches_any
from tamegrad.torch.model.names import CELL_TYPES, ROOT, WRAPPED_NAMES, joined, stacked

__all__ = ["read_pairs"]

# Only attention modules own these; their `out_proj` belongs to the same layer.
_ATTENTION_NAMES = ("in_proj_weight", "q_proj_weight")
_PARAMETRIZATION = re.compile(r"(^|\.)parametrizations\.([^.]+)\..+$")


def read_pairs(pairs: Iterable[tuple[str, nn.Parameter]], merged: Sequence[str] = ()) -> ModelLayers:
    """Derives the layers from the names that `module.named_parameters()` yields.

    The result is that of `find_layers`, as far as names allow: everything before the last dot names the layer.

    Args:
        pairs: Names and parameters.
        merged: Globs on paths; everything below a matching path forms one layer.

    Returns:
        The layers in the order of the pairs; a repeated parameter belongs to its first layer.

    Raises:
        SettingError: If there are no pairs, or one is not a name and a parameter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.GRU(3, 5), nn.Linear(5, 2))
        >>> [(layer.name, layer.types) for layer in read_pairs(model.named_parameters()).layers]
        [('0.l0', ('weight', 'recurrent_weight', 'bias')), ('1', ('weight', 'bias'))]
    """
    named = _cleaned(_checked(pairs))
    paths = list(dict.fromkeys(path for name, _ in named for path in _paths_above(name)))
    whole = {path for path in paths if matches_any(path, merged)}
    whole |= {path for name, _ in named for path, _, own in [name.rpartition(".")] if own in _ATTENTION_NAMES}
    layers: dict[str, Layer] = {}
    owned: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, parameter in named:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        layer, param_type, owner = _place(name, next((path for path in _paths_above(name) if path in whole), None))
        known = layers.setdefault(layer, Layer(layer, (), owner))
        layers[layer] = replace(known, parameters=(*known.parameters, Parameter(name, param_type)))
        owned.setdefault(layer, []).append(parameter)
    return ModelLayers(tuple(layers.values()), tuple(map(tuple, owned.values())), tuple(paths))


def _place(name: str, whole: str | None) -> tuple[str, str, str | None]:
    """Returns a parameter's layer, its type and the layer's owner; `whole` is the merged layer around it, if any."""
    name = _PARAMETRIZATION.sub(r"\1\2", name)
    if whole is not None:
        return whole or ROOT, name[len(whole) :].lstrip("."), None
    path, _, own = name.rpartition(".")
    if own.isdigit():
        # An item of a ParameterList belongs to the layer that owns the list.
        path, _, parameter_list = path.rpartition(".")
        return path or ROOT, joined(parameter_list, own), None
    if parts := stacked(own):
        return joined(path, parts.layer), parts.type, path or ROOT
    return path or ROOT, CELL_TYPES.get(own, own), None


def _paths_above(name: str) -> list[str]:
    """Returns the paths of the modules that contain a parameter, outermost first; that of the model itself is empty."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _cleaned(pairs: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Removes the names of wrappers."""
    pairs = [(".".join(part for part in name.split(".") if part not in WRAPPED_NAMES), p) for name, p in pairs]
    if all(name.startswith("module.") for name, _ in pairs):
        return [(name.removeprefix("module."), parameter) for name, parameter in pairs]
    return pairs


def _checked(pairs: object) -> list[tuple[str, nn.Parameter]]:
    listed: list[Any] = list(pairs) if isinstance(pairs, Iterable) else []
    if not listed or not all(_is_pair(pair) for pair in listed):
        raise SettingError(
            "model",
            got=f"a {type(pairs).__name__} without (name, parameter) pairs",
            allowed="a torch.nn.Module, or (name, parameter) pairs",
            advice="pass the model itself, or model.named_parameters()",
        )
    return listed


def _is_pair(pair: object) -> bool:
    match pair:
        case (str(), Tensor()):
            return True
        case _:
            return False
