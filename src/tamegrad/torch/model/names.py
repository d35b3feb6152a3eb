"""The naming conventions: parameter types of recurrent layers, attributes of wrappers, the root layer."""

import re
from typing import NamedTuple

__all__ = ["CELL_TYPES", "ROOT", "WRAPPED_NAMES", "Stacked", "joined", "stacked"]

ROOT = "(root)"

# The attributes in which wrappers keep their module; nothing else uses these names.
WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

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
