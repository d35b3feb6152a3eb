"""The backends: what measures and changes gradients. One class each, with the same methods.

`G` is the number of groups, `P` of parameters.
"""

from tamegrad.torch.backends.base import Backend
from tamegrad.torch.backends.kept import is_capturing
from tamegrad.torch.backends.selection import BACKENDS, SelectedBackend, select

__all__ = ["BACKENDS", "Backend", "SelectedBackend", "is_capturing", "select"]
