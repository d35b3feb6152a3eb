"""Where PyTorch keeps what belongs to a tensor, found by looking at one, so that a walk can have it fetched in time.

A walk over thousands of tensors mostly waits for memory, from a tensor's object to what it stands for, on to what
autograd keeps with it, to the gradient, and to the storage and the object of that. What is found here is only ever used
to prefetch: no result depends on it, and where PyTorch is laid out in another way nothing is prefetched.
"""

import ctypes
import logging
from dataclasses import dataclass

import torch

__all__ = ["Layout", "find_layout"]

_log = logging.getLogger("tamegrad")

# How many bytes to look at; what is looked at is larger.
_TENSOR_BYTES, _AUTOGRAD_BYTES = 128, 64
# Where the object of a tensor points to the tensor, right behind what all Python objects have.
_TENSOR = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Distances in bytes from where something begins to where it points on.

    Args:
        tensor: From the object of a tensor to the tensor.
        autograd: From the tensor to what autograd keeps with it, which may be nothing (0).
        gradient: From there to the gradient, a tensor.
        storage: From a tensor to its storage, which knows where its values are.
        object: From a tensor to its object, which may be nothing (0).
    """

    tensor: int
    autograd: int
    gradient: int
    storage: int
    object: int


def find_layout() -> Layout | None:
    """Finds out where PyTorch keeps what belongs to a tensor.

    Returns:
        The layout, or None where it is another than can be found, which is said on the logger `tamegrad`.
    """
    tensor, gradient = (torch.zeros(1, device="cpu") for _ in range(2))
    looked_for = tensor, gradient, gradient.untyped_storage()
    start, wanted, storage = (thing._cdata for thing in looked_for)  # noqa: SLF001  where they are
    before = _words(start, _TENSOR_BYTES)
    tensor.requires_grad_()
    tensor.grad = gradient
    after = _words(start, _TENSOR_BYTES)
    # What autograd keeps is the only thing that was not there before.
    appeared = [index for index, (old, new) in enumerate(zip(before, after, strict=True)) if old == 0 != new]
    if len(appeared) == 1 and _words(id(tensor) + _TENSOR, 8) == [start]:
        kept, inside = _words(after[appeared[0]], _AUTOGRAD_BYTES), _words(wanted, _TENSOR_BYTES)
        searched = (kept, wanted), (inside, storage), (inside, id(gradient))
        if all(words.count(address) == 1 for words, address in searched):
            return Layout(_TENSOR, 8 * appeared[0], *(8 * words.index(address) for words, address in searched))
    _log.info("PyTorch %s keeps tensors in a way that is not known here: collecting takes longer", torch.__version__)
    return None


def _words(address: int, size: int) -> list[int]:
    return list((ctypes.c_int64 * (size // 8)).from_address(address))
