"""The naming conventions: recurrent layers, wrappers, Keras's variables, the root layer."""

import re
from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

__all__ = [
    "CELL_TYPES",
    "KERAS_FUNCTIONAL",
    "KERAS_VARIABLES",
    "ROOT",
    "WRAPPED_NAMES",
    "Stacked",
    "comes_from",
    "joined",
    "keras_names",
    "paths_above",
    "stacked",
]

ROOT = "(root)"

# The attributes in which wrappers keep their module; nothing else uses these names.
WRAPPED_NAMES = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Keras 3 keeps the variables of a layer, and of every layer below it, in a ParameterDict of this name. Its keys are
# paths with slashes.
KERAS_VARIABLES = "_torch_params"
# The attribute in which `keras.Sequential` keeps the functional model that runs its layers.
KERAS_FUNCTIONAL = "_functional"

# The two biases of PyTorch's recurrent layers share one type, because Deeplearning4j has one bias.
CELL_TYPES = {
    "weight_ih": "weight",
    "weight_hh": "recurrent_weight",
    "weight_hr": "projection_weight",
    "bias_ih": "bias",
    "bias_hh": "bias",
}
_STACKED = re.compile(rf"(?P<role>{'|'.join(CELL_TYPES)})_l(?P<index>\d+)(?P<reverse>_reverse)?")


class Stacked(NamedTuple):
    """The layer and the parameter type in a parameter name of `nn.RNN`, `nn.LSTM` or `nn.GRU`."""

    layer: str
    type: str


def stacked(name: str) -> Stacked | None:
    """Parses the name of a parameter of stacked recurrent layers.

    Args:
        name: The parameter's name in its module.

    Returns:
        The layer's name in the module and the parameter type, or None for any other name.

    Example:
        >>> stacked("weight_hh_l1_reverse")
        Stacked(layer='l1', type='reverse_recurrent_weight')
    """
    parts = _STACKED.fullmatch(name)
    if parts is None:
        return None
    return Stacked(f"l{parts['index']}", ("reverse_" if parts["reverse"] else "") + CELL_TYPES[parts["role"]])


def joined(path: str, name: str) -> str:
    """Joins a path and a name below it; the path of the model itself is empty."""
    return f"{path}.{name}" if path else name


def paths_above(name: str) -> list[str]:
    """Returns the paths of the modules that contain a parameter, outermost first; that of the model itself is empty."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def keras_names(keys: Iterable[str]) -> dict[str, str]:
    """Names the variables of a Keras layer relative to that layer, with dots.

    The keys of Keras start with the path of the layer, which is what all of them have in common.

    Args:
        keys: The keys of the layer's `ParameterDict`; those without a slash are names already.

    Returns:
        The name for each key.

    Example:
        >>> keras_names(["model/encoder/dense/kernel", "model/encoder/dense/bias", "model/encoder/gain"])
        {'model/encoder/dense/kernel': 'dense.kernel', 'model/encoder/dense/bias': 'dense.bias',
        'model/encoder/gain': 'gain'}
    """
    parts = {key: key.split("/") for key in keys}
    levels = zip(*(path[:-1] for path in parts.values() if len(path) > 1), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return {key: ".".join(path[shared:] if len(path) > 1 else path) for key, path in parts.items()}


def comes_from(value: object, library: str) -> bool:
    """Returns whether the class of an object, or one that it inherits from, is a library's; does not import it."""
    return any(base.__module__.partition(".")[0] == library for base in type(value).__mro__)
