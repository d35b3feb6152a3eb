"""Small models, gradients far above every threshold for them, and an optimizer."""

from typing import Any

import torch
from torch import nn

__all__ = ["a_model", "adamw", "backward", "three_layers"]


def a_model() -> Any:
    """Returns the same two layers in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def backward(model: nn.Module) -> Any:
    """Makes gradients whose norms are above 1 in both layers, and returns the loss."""
    loss = (100 * model(torch.ones(5, 3))).square().sum()
    loss.backward()
    return loss


def three_layers() -> Any:
    """Returns the same three layers in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def adamw(params: Any) -> torch.optim.Optimizer:
    """Makes an optimizer, as `StepInBackward` takes it."""
    return torch.optim.AdamW(params, lr=0.01)
