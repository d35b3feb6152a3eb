"""What a tensor that was passed by name can be: a parameter, a gradient, or neither."""

from torch import Tensor, nn

__all__ = ["is_computed", "is_differentiable", "is_gradient"]


def is_differentiable(tensor: Tensor) -> bool:
    """Returns whether a tensor can have a gradient at all: quantized weights and random states are integers."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def is_gradient(tensor: Tensor) -> bool:
    """Returns whether a tensor can only be a gradient itself: it is no parameter and has no gradient."""
    return not isinstance(tensor, nn.Parameter) and not tensor.requires_grad and tensor.grad is None


def is_computed(tensor: Tensor) -> bool:
    """Returns whether autograd computed a tensor from others and keeps no gradient for it."""
    return not isinstance(tensor, nn.Parameter) and not tensor.is_leaf and not tensor.retains_grad
