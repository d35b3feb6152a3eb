"""The classes of TorchScript modules, which hide that they were an `nn.LSTM` or an `nn.LayerNorm`."""

import re

import torch
from torch import nn

__all__ = ["class_of"]

# TorchScript puts a number into the names of all classes of one name but the first.
_MANGLED = re.compile(r"\.___torch_mangle_\d+")
_PREFIX = "__torch__.torch.nn."


def class_of(module: nn.Module) -> type:
    """Returns the class of a module; for a TorchScript module of PyTorch's own, the class before it was compiled.

    Args:
        module: The module: an ordinary one, or a scripted, traced or loaded one.

    Returns:
        The class.

    Example:
        >>> class_of(nn.LayerNorm(2)).__name__
        'LayerNorm'
    """
    if not isinstance(module, torch.jit.ScriptModule):
        return type(module)
    name = _MANGLED.sub("", module._c._type().qualified_name())  # noqa: SLF001  `original_name` leaves the package out
    found = getattr(nn, name.rpartition(".")[2], None) if name.startswith(_PREFIX) else None
    return found if isinstance(found, type) else type(module)
