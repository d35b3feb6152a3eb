"""Finds the layers of a PyTorch model: which module owns which parameters, and the type of each parameter.

A layer is a module that directly owns parameters. All exceptions are handled here: stacked recurrent layers, attention,
parameter lists, parametrizations, wrappers, Keras's layers, and modules that the user merges into one layer.
"""

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tamegrad.errors import SettingError, UnmatchedError, closest, quoted
from tamegrad.groups import Layer, Parameter
from tamegrad.torch.model.names import (
    CELL_TYPES,
    KERAS_FUNCTIONAL,
    KERAS_VARIABLES,
    ROOT,
    WRAPPED_NAMES,
    comes_from,
    joined,
    keras_names,
    paths_above,
    stacked,
)
from tamegrad.torch.model.tensors import is_differentiable
from tamegrad.torch.model.torchscript import class_of

__all__ = ["ModelLayers", "find_layers"]

# These wrappers name their module "module", as any user might, so they are recognized by class.
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.parallel.DataParallel)


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """The layers of a model and the tensors they own.

    Args:
        layers: The layers, in the order of the model.
        owned: Each layer's parameters, in the order of `Layer.parameters`; each parameter appears once.
        paths: The paths of all modules; patterns for merged layers match against these.
    """

    layers: tuple[Layer, ...]
    owned: tuple[tuple[nn.Parameter, ...], ...]
    paths: tuple[str, ...] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, layer by layer, in the order of a plan."""
        return [parameter for parameters in self.owned for parameter in parameters]

    def restricted_to(self, parameters: Iterable[nn.Parameter]) -> "ModelLayers":
        """Returns the layers with only some of their parameters; layers left empty are dropped.

        Args:
            parameters: The parameters to keep; any that are not in the model are ignored.

        Returns:
            The remaining layers.
        """
        retained = {id(parameter) for parameter in parameters}
        layers, owned = [], []
        for layer, tensors in zip(self.layers, self.owned, strict=True):
            pairs = [pair for pair in zip(layer.parameters, tensors, strict=True) if id(pair[1]) in retained]
            if pairs:
                layers.append(replace(layer, parameters=tuple(parameter for parameter, _ in pairs)))
                owned.append(tuple(tensor for _, tensor in pairs))
        return ModelLayers(tuple(layers), tuple(owned), self.paths)


def find_layers(model: nn.Module, merged: Sequence[str] = ()) -> ModelLayers:
    """Finds the layers of a model.

    Args:
        model: The model, wrapped or not.
        merged: Globs on module paths (`*` crosses dots); a matching module and everything below it form one layer.

    Returns:
        The layers in the order of the model. A tied parameter belongs to its first owner; where one owner is inside the
        other, to the inner one. Integer tensors, which cannot have gradients, are left out.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.LSTM(3, 5), nn.Linear(5, 2))
        >>> [(layer.name, layer.types) for layer in find_layers(model).layers]
        [('0.l0', ('weight', 'recurrent_weight', 'bias')), ('1', ('weight', 'bias'))]
    """
    reader = _Reader(merged)
    reader.read(model, "", None)
    return reader.result()


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Returns whether a path matches any of the globs; `*` crosses dots."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def check_patterns(patterns: Sequence[str], paths: Sequence[str]) -> None:
    """Refuses patterns for merged layers that match no path.

    Args:
        patterns: The globs.
        paths: The paths of all modules.

    Raises:
        SettingError: If `patterns` is a single string, whose characters would each be read as a pattern.
        UnmatchedError: If a pattern matches none of the paths.
    """
    if isinstance(patterns, str):
        raise SettingError(
            "layers", got=repr(patterns), allowed="a list of paths or globs", advice=f"pass layers=[{patterns!r}]"
        )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise UnmatchedError(
                f"layers={pattern!r}",
                got=f"a pattern that matches none of {len(paths)} modules",
                allowed=f"the path of a module or a glob; closest: {quoted(closest(pattern, paths))}",
                advice="model.named_modules() lists the paths",
            )


@dataclass(frozen=True, slots=True)
class _Scope:
    """The layer that a module's parameters belong to, and the prefix of their names in it."""

    path: str
    module_class: type
    prefix: str = ""

    def below(self, name: str) -> "_Scope":
        return replace(self, prefix=f"{self.prefix}{name}.")


@dataclass(frozen=True, slots=True)
class _Claim:
    """A parameter in the layer that it belongs to, as far as the walk has come.

    Args:
        tensor: The parameter.
        holder: The `id` of the module that owns it.
        layer: The layer, without parameters.
        parameter: Its names.
    """

    tensor: nn.Parameter
    holder: int
    layer: Layer
    parameter: Parameter


class _Reader:
    """One walk over a model."""

    def __init__(self, merged: Sequence[str]) -> None:
        self._merged = tuple(merged)
        self._paths: dict[str, None] = {}
        self._seen: dict[int, nn.Module] = {}
        # The modules around the one that is read, itself included; parameter lists count as a part of their owner.
        self._holders: dict[int, None] = {}
        # What these modules leave out of their `named_parameters`.
        self._hidden: frozenset[int] = frozenset()
        self._claims: dict[int, _Claim] = {}

    def read(self, module: nn.Module, path: str, outer: _Scope | None) -> None:
        """Reads a module and everything below it; `outer` is the enclosing layer that it belongs to, if any."""
        module = _unwrapped(module)
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        self._paths[path] = None
        hidden_outside = self._hidden
        self._hidden |= _hidden_by(module)
        is_holder = outer is None or not _is_collection(module)
        if is_holder:
            self._holders[id(module)] = None
        scope = outer or _Scope(path, class_of(module))
        is_attention = issubclass(class_of(module), nn.MultiheadAttention)
        takes_all = outer is not None or is_attention or matches_any(path, self._merged)
        for name, full_name, parameter in _direct_parameters(module):
            self._claim(self._placed(scope, name, joined(path, full_name), parameter, recurrent=not takes_all))
        self._read_children(module, path, scope, takes_all=takes_all)
        if is_holder:
            del self._holders[id(module)]
        self._hidden = hidden_outside

    def _read_children(self, module: nn.Module, path: str, scope: _Scope, *, takes_all: bool) -> None:
        children = dict(module.named_children())
        for name, child in children.items():
            if name == "parametrizations" and parametrize.is_parametrized(module):
                continue
            if name == KERAS_VARIABLES and isinstance(child, nn.ParameterDict):
                self._seen[id(child)] = child
                taken = {*children, *module._parameters}  # noqa: SLF001  all names, hidden or not
                self._read_variables(_keras_variables(child, taken), path, scope, takes_all=takes_all)
            elif children.keys() == {KERAS_FUNCTIONAL, KERAS_VARIABLES}:
                self.read(child, path, scope if takes_all else None)
            else:
                belongs = takes_all or _is_collection(child)
                self.read(child, joined(path, name), scope.below(name) if belongs else None)

    def _read_variables(self, variables: dict[str, nn.Parameter], path: str, scope: _Scope, *, takes_all: bool) -> None:
        """Reads the variables of a Keras layer and of the layers below it, which may be no modules of PyTorch's."""
        for name, parameter in variables.items():
            full_name = joined(path, name)
            inner = [] if takes_all else [joined(path, above) for above in paths_above(name)[1:]]
            if not inner:
                self._claim(self._placed(scope, name, full_name, parameter, recurrent=False))
                continue
            self._paths.update(dict.fromkeys(inner))
            layer = next((above for above in inner if matches_any(above, self._merged)), inner[-1])
            names = Parameter(full_name, full_name.removeprefix(f"{layer}."))
            self._claim(_Claim(parameter, self._holder, Layer(layer, ()), names))

    @property
    def _holder(self) -> int:
        return next(reversed(self._holders))

    def _placed(self, scope: _Scope, name: str, full_name: str, parameter: nn.Parameter, *, recurrent: bool) -> _Claim:
        layer, param_type, owner = scope.path, scope.prefix + name, None
        if recurrent and issubclass(scope.module_class, nn.RNNBase) and (parts := stacked(name)):
            layer, param_type, owner = joined(layer, parts.layer), parts.type, layer or ROOT
        elif recurrent and issubclass(scope.module_class, nn.RNNCellBase):
            param_type = CELL_TYPES.get(name, name)
        made = Layer(layer or ROOT, (), owner, scope.module_class)
        return _Claim(parameter, self._holder, made, Parameter(full_name, param_type))

    def _claim(self, claim: _Claim) -> None:
        """Gives a parameter to its first owner, or to the innermost where one owner is inside the other."""
        if id(claim.tensor) in self._hidden or not is_differentiable(claim.tensor):
            return
        known = self._claims.get(id(claim.tensor))
        if known is not None:
            if known.holder == claim.holder or known.holder not in self._holders:
                return
            # The new claim has another place in the order of the model.
            del self._claims[id(claim.tensor)]
        self._claims[id(claim.tensor)] = claim

    def result(self) -> ModelLayers:
        """Returns the layers found."""
        layers: dict[str, Layer] = {}
        claims: dict[str, list[_Claim]] = {}
        for claim in self._claims.values():
            layers.setdefault(claim.layer.name, claim.layer)
            claims.setdefault(claim.layer.name, []).append(claim)
        return ModelLayers(
            tuple(
                replace(layer, parameters=tuple(claim.parameter for claim in claims[name]))
                for name, layer in layers.items()
            ),
            tuple(tuple(claim.tensor for claim in of_layer) for of_layer in claims.values()),
            tuple(self._paths),
        )


def _is_collection(module: nn.Module) -> bool:
    return issubclass(class_of(module), nn.ParameterList | nn.ParameterDict)


def _keras_variables(variables: nn.ParameterDict, taken: Collection[str]) -> dict[str, nn.Parameter]:
    """Returns the variables of a Keras layer by their names in it, which differ from those that are taken."""
    differentiable = {key: variable for key, variable in variables.items() if is_differentiable(variable)}
    return {
        f"{KERAS_VARIABLES}.{name}" if name.partition(".")[0] in taken else name: differentiable[key]
        for key, name in keras_names(differentiable).items()
    }


def _hidden_by(module: nn.Module) -> frozenset[int]:
    """Returns the `id` of every parameter that a module's own `named_parameters` leaves out."""
    if getattr(module.named_parameters, "__func__", None) is nn.Module.named_parameters:
        return frozenset()
    shown = {id(parameter) for _, parameter in module.named_parameters()}
    every = {id(parameter) for _, parameter in nn.Module.named_parameters(module)}
    return frozenset(every - shown)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside any wrappers, so that wrappers do not appear in names."""
    while True:
        names = [name for name in WRAPPED_NAMES if isinstance(getattr(module, name, None), nn.Module)]
        if names:
            module = getattr(module, names[0])
        elif isinstance(module, _PARALLEL):
            module = module.module
        elif "_module" in module._modules and comes_from(module, "opacus"):  # noqa: SLF001  no attribute of its own
            module = module.get_submodule("_module")
        else:
            return module


def _direct_parameters(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields name, full name and tensor of each parameter of a module; parts of a parametrized tensor have its name."""
    # `remove_duplicate` came with PyTorch 2; a module of a user's own may not take it.
    for name, parameter in module.named_parameters(recurse=False):
        yield _served(module, name), name, parameter
    if parametrize.is_parametrized(module):
        for tensor_name, parts in module.parametrizations.items():  # type: ignore[operator, union-attr]
            for name, parameter in parts.named_parameters():
                yield tensor_name, f"parametrizations.{tensor_name}.{name}", parameter


def _served(module: nn.Module, name: str) -> str:
    """Returns the name of the tensor that a hook-based reparametrization computes from a parameter, else its own."""
    for hook in module._forward_pre_hooks.values():  # noqa: SLF001  torch records them nowhere else
        match hook:
            case WeightNorm(name=served) | SpectralNorm(name=served) | prune.BasePruningMethod(_tensor_name=served):
                if name in {f"{served}_g", f"{served}_v", f"{served}_orig"}:
                    return str(served)
    return name
