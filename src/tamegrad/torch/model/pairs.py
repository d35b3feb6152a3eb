"""Reads layers off the names of parameters, for those who have `(name, parameter)` pairs and no module."""

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

# Only an attention module has one of these; its `out_proj` belongs to it.
_ATTENTION_NAMES = ("in_proj_weight", "q_proj_weight")
_PARAMETRIZATION = re.compile(r"(^|\.)parametrizations\.([^.]+)\..+$")


def read_pairs(pairs: Iterable[tuple[str, nn.Parameter]], merged: Sequence[str] = ()) -> ModelLayers:
    """Reads the layers off the names that `module.named_parameters()` gives.

    The names are as `find_layers` finds them, as far as a name can tell: what stands before the last dot is the layer.

    Args:
        pairs: Names and parameters.
        merged: Globs on paths; what is below a path that matches is one layer.

    Returns:
        The layers in the order of the pairs; a parameter that comes twice belongs to the first.

    Raises:
        SettingError: If these are no pairs of a name and a parameter.

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
        layer, kind, owner = _place(name, next((path for path in _paths_above(name) if path in whole), None))
        known = layers.setdefault(layer, Layer(layer, (), owner))
        layers[layer] = replace(known, parameters=(*known.parameters, Parameter(name, kind)))
        owned.setdefault(layer, []).append(parameter)
    return ModelLayers(tuple(layers.values()), tuple(map(tuple, owned.values())), tuple(paths))


def _place(name: str, whole: str | None) -> tuple[str, str, str | None]:
    """Returns the layer of a parameter, its type there and the layer's owner; `whole` is a layer with all below it."""
    name = _PARAMETRIZATION.sub(r"\1\2", name)
    if whole is not None:
        return whole or ROOT, name[len(whole) :].lstrip("."), None
    path, _, own = name.rpartition(".")
    if own.isdigit():
        # An item of a ParameterList counts under the owner of the list.
        path, _, parameter_list = path.rpartition(".")
        return path or ROOT, joined(parameter_list, own), None
    if parts := stacked(own):
        return joined(path, parts.layer), parts.type, path or ROOT
    return path or ROOT, CELL_TYPES.get(own, own), None


def _paths_above(name: str) -> list[str]:
    """Returns the paths that a parameter is below, the outermost first; that of the model itself is empty."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _cleaned(pairs: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Takes the names of wrappers off."""
    pairs = [(".".join(part for part in name.split(".") if part not in WRAPPED_NAMES), p) for name, p in pairs]
    if all(name.startswith("module.") for name, _ in pairs):
        return [(name.removeprefix("module."), parameter) for name, parameter in pairs]
    return pairs


def _checked(pairs: object) -> list[tuple[str, nn.Parameter]]:
    listed: list[Any] = list(pairs) if isinstance(pairs, Iterable) else []
    if not listed or not all(_is_pair(pair) for pair in listed):
        raise SettingError(
            "model",
            got=f"a {type(pairs).__name__} of no such pairs",
            allowed="a torch.nn.Module, or pairs of a name and a parameter",
            advice="pass the model itself, or model.named_parameters()",
        )
    return listed


def _is_pair(pair: object) -> bool:
    match pair:
        case (str(), Tensor()):
            return True
        case _:
            return False
