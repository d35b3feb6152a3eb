"""What the names of modules and parameters mean: roles of recurrent parameters, wrappers, the root."""

import re
from typing import NamedTuple

__all__ = ["CELL_TYPES", "ROOT", "WRAPPED_NAMES", "Stacked", "joined", "stacked"]

ROOT = "(root)"

# Wrappers hold the module that they wrap under a name that nobody else uses.
WRAPPED_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# Both biases of PyTorch's recurrent layers have one type, because Deeplearning4j has one bias.
CELL_TYPES = {
    "weight_ih": "weight",
    "weight_hh": "recurrent_weight",
    "weight_hr": "projection_weight",
    "bias_ih": "bias",
    "bias_hh": "bias",
}
_STACKED = re.compile(rf"(?P<role>{'|'.join(CELL_TYPES)})_l(?P<index>\d+)(?P<reverse>_reverse)?")


class Stacked(NamedTuple):
    """What the name of a parameter says inside `nn.RNN`, `nn.LSTM` or `nn.GRU`."""

    layer: str
    type: str


def stacked(name: str) -> Stacked | None:
    """Reads the name of a parameter of stacked recurrent layers.

    Args:
        name: The parameter's name in its module.

    Returns:
        The layer's name in the module and the parameter type, or None if the name is not of that kind.

    Example:
        >>> stacked("weight_hh_l1_reverse")
        Stacked(layer='l1', type='reverse_recurrent_weight')
    """
    parts = _STACKED.fullmatch(name)
    if parts is None:
        return None
    return Stacked(f"l{parts['index']}", ("reverse_" if parts["reverse"] else "") + CELL_TYPES[parts["role"]])


def joined(path: str, name: str) -> str:
    """Returns the name of something below a path, which is empty for the model itself."""
    return f"{path}.{name}" if path else name
