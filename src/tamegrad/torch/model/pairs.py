"""Derives layers from parameter names, for callers with `(name, parameter)` pairs instead of a module."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from tamegrad.errors import SettingError, quoted
from tamegrad.groups import Layer, Parameter
from tamegrad.torch.model.layers import ModelLayers, matches_any
from tamegrad.torch.model.mistakes import named_tensors
from tamegrad.torch.model.names import (
    CELL_TYPES,
    KERAS_FUNCTIONAL,
    KERAS_VARIABLES,
    ROOT,
    WRAPPED_NAMES,
    joined,
    keras_names,
    paths_above,
    stacked,
)
from tamegrad.torch.model.tensors import is_computed, is_differentiable, is_gradient

__all__ = ["Pairs", "read_pairs"]

Pairs: TypeAlias = Iterable[tuple[str, nn.Parameter]] | Mapping[str, nn.Parameter]

# Only attention modules own these; their `out_proj` belongs to the same layer.
_ATTENTION_NAMES = ("in_proj_weight", "q_proj_weight")
_MOST_NAMED = 3
_PARAMETRIZATION = re.compile(r"(^|\.)parametrizations\.([^.]+)\..+$")


def read_pairs(pairs: Pairs, merged: Sequence[str] = ()) -> ModelLayers:
    """Derives the layers from the names that `module.named_parameters()` yields.

    The result is that of `find_layers`, as far as names allow: everything before the last dot names the layer.

    Args:
        pairs: Names and parameters, or a dictionary of them.
        merged: Globs on paths; everything below a matching path forms one layer.

    Returns:
        The layers in the order of the pairs; a repeated parameter belongs to its first layer. Integer tensors, which
        cannot have gradients, are left out.

    Raises:
        SettingError: If there are no pairs, one is not a name and a parameter, or two parameters have one name.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.GRU(3, 5), nn.Linear(5, 2))
        >>> [(layer.name, layer.types) for layer in read_pairs(model.named_parameters()).layers]
        [('0.l0', ('weight', 'recurrent_weight', 'bias')), ('1', ('weight', 'bias'))]
    """
    named = _cleaned([pair for pair in _checked(pairs) if is_differentiable(pair[1])])
    _refuse_duplicates(named)
    paths = list(dict.fromkeys(path for name, _ in named for path in paths_above(name)))
    whole = {path for path in paths if matches_any(path, merged)}
    whole |= {path for name, _ in named for path, _, own in [name.rpartition(".")] if own in _ATTENTION_NAMES}
    layers: dict[str, Layer] = {}
    types: dict[str, list[Parameter]] = {}
    owned: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, parameter in named:
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        layer, param_type, owner = _place(name, next((path for path in paths_above(name) if path in whole), None))
        layers.setdefault(layer, Layer(layer, (), owner))
        types.setdefault(layer, []).append(Parameter(name, param_type))
        owned.setdefault(layer, []).append(parameter)
    return ModelLayers(
        tuple(replace(layer, parameters=tuple(types[name])) for name, layer in layers.items()),
        tuple(map(tuple, owned.values())),
        tuple(paths),
    )


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


def _cleaned(pairs: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Removes the names of wrappers, and writes those of Keras with dots."""
    names = [".".join(part for part in name.split(".") if part not in WRAPPED_NAMES) for name, _ in pairs]
    for wrapper in ("module.", "_module."):
        if all(name.startswith(wrapper) for name in names):
            names = [name.removeprefix(wrapper) for name in names]
    places = {name: place for name in names if (place := _keras_place(name)) is not None}
    keys: dict[str, list[str]] = {}
    for path, key in places.values():
        keys.setdefault(path, []).append(key)
    names_of = {path: keras_names(own) for path, own in keys.items()}
    taken = {path for name in names for path in (*paths_above(name), name)} if places else set()

    def dotted(name: str) -> str:
        if name not in places:
            return name
        path, key = places[name]
        own = names_of[path][key]
        is_taken = joined(path, own.partition(".")[0]) in taken
        return joined(path, f"{KERAS_VARIABLES}.{own}" if is_taken else own)

    return [(dotted(name), parameter) for name, (_, parameter) in zip(names, pairs, strict=True)]


def _keras_place(name: str) -> tuple[str, str] | None:
    """Returns the path of the Keras layer that collects a variable, and the variable's key; None for other names."""
    path, found, key = f".{name}".rpartition(f".{KERAS_VARIABLES}.")
    return (path.removesuffix(f".{KERAS_FUNCTIONAL}").lstrip("."), key) if found and "." not in key else None


def _refuse_duplicates(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuses two parameters under one name, which would be one parameter of one layer."""
    different = {(name, id(parameter)) for name, parameter in named}
    counts = Counter(name for name, _ in different)
    repeated = [name for name in dict(named) if counts[name] > 1]
    if repeated:
        more = f" and {len(repeated) - _MOST_NAMED} more" if len(repeated) > _MOST_NAMED else ""
        raise SettingError(
            "model",
            got=f"pairs in which different parameters have the same name: {quoted(repeated[:_MOST_NAMED])}{more}",
            allowed="pairs in which every parameter has a name of its own",
            advice='give each module a prefix: [*encoder.named_parameters(prefix="encoder"), '
            '*decoder.named_parameters(prefix="decoder")], or pass nn.ModuleDict({"encoder": encoder, '
            '"decoder": decoder})',
        )


def _checked(pairs: object) -> list[tuple[str, nn.Parameter]]:
    named = named_tensors(pairs)
    kind = type(pairs).__name__
    computed = next((name for name, tensor in named if is_computed(tensor)), None)
    if computed is not None:
        got = f"a {kind} with {computed}, which was computed from other tensors, so that PyTorch keeps no .grad for it"
    elif all(is_gradient(tensor) for _, tensor in named):
        got = f"a {kind} of tensors that are no parameters and have no .grad"
    else:
        return named
    raise SettingError(
        "model",
        got=got,
        allowed="a torch.nn.Module, or (name, parameter) pairs, with the gradients in .grad",
        advice="for gradients themselves call normalize_grad_({name: gradient}, policy) with a dictionary; "
        "else pass the model itself, or model.named_parameters()",
    )
