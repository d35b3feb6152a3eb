"""Finds the layers of a PyTorch model: which module owns which parameters, and the type of each parameter.

A layer is a module that directly owns parameters. All exceptions are handled here: stacked recurrent layers, attention,
parameter lists, parametrizations, wrappers, and modules that the user merges into one layer.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tamegrad.errors import SettingError, UnmatchedError, closest, quoted
from tamegrad.groups import Layer, Parameter
from tamegrad.torch.model.names import CELL_TYPES, ROOT, WRAPPED_NAMES, joined, stacked

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
        The layers in the order of the model. A tied parameter belongs to its first owner.

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


class _Reader:
    """One walk over a model."""

    def __init__(self, merged: Sequence[str]) -> None:
        self._merged = tuple(merged)
        self._paths: list[str] = []
        self._seen: set[int] = set()
        self._layers: dict[str, Layer] = {}
        self._owned: dict[str, list[nn.Parameter]] = {}

    def read(self, module: nn.Module, path: str, outer: _Scope | None) -> None:
        """Reads a module and everything below it; `outer` is the enclosing layer that it belongs to, if any."""
        module = _unwrapped(module)
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._paths.append(path)
        scope = outer or _Scope(path, type(module))
        takes_all = outer is not None or isinstance(module, nn.MultiheadAttention) or matches_any(path, self._merged)
        for name, full_name, parameter in _direct_parameters(module):
            if id(parameter) not in self._seen:
                self._seen.add(id(parameter))
                self._add(scope, name, joined(path, full_name), parameter, recurrent=not takes_all)
        for name, child in module.named_children():
            if name == "parametrizations" and parametrize.is_parametrized(module):
                continue
            belongs = takes_all or isinstance(child, nn.ParameterList | nn.ParameterDict)
            self.read(child, joined(path, name), scope.below(name) if belongs else None)

    def _add(self, scope: _Scope, name: str, full_name: str, parameter: nn.Parameter, *, recurrent: bool) -> None:
        layer, param_type, owner = scope.path, scope.prefix + name, None
        if recurrent and issubclass(scope.module_class, nn.RNNBase) and (parts := stacked(name)):
            layer, param_type, owner = joined(layer, parts.layer), parts.type, layer or ROOT
        elif recurrent and issubclass(scope.module_class, nn.RNNCellBase):
            param_type = CELL_TYPES.get(name, name)
        layer = layer or ROOT
        known = self._layers.setdefault(layer, Layer(layer, (), owner, scope.module_class))
        self._layers[layer] = replace(known, parameters=(*known.parameters, Parameter(full_name, param_type)))
        self._owned.setdefault(layer, []).append(parameter)

    def result(self) -> ModelLayers:
        """Returns the layers found."""
        return ModelLayers(tuple(self._layers.values()), tuple(map(tuple, self._owned.values())), tuple(self._paths))


def _unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside any wrappers, so that wrappers do not appear in names."""
    while True:
        names = [name for name in WRAPPED_NAMES if isinstance(getattr(module, name, None), nn.Module)]
        if names:
            module = getattr(module, names[0])
        elif isinstance(module, _PARALLEL):
            module = module.module
        else:
            return module


def _direct_parameters(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields name, full name and tensor of each parameter of a module; parts of a parametrized tensor have its name."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
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
