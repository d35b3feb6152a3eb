"""PyTorch's own clipping, and tamegrad's, on the same gradients."""

from collections.abc import Callable

import torch
from hostile_inputs import Gradients
from hostile_judge import Per, Tool
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import tamegrad
from tamegrad import Clip, ClipValue
from tamegrad.torch import normalize_grad_

__all__ = ["TAMEGRAD", "TORCH", "versions"]


def versions() -> str:
    """Returns the versions of torch and tamegrad."""
    return f"torch {torch.__version__}, tamegrad {tamegrad.__version__}"


def _model(gradients: Gradients) -> nn.Module:
    model = nn.Module()
    for layer, named in gradients.items():
        module = nn.Module()
        for name, gradient in named.items():
            dense = torch.zeros(2, 2) if gradient is None else torch.zeros(gradient.shape, dtype=gradient.dtype)
            parameter = nn.Parameter(dense)
            parameter.grad = gradient
            module.register_parameter(name, parameter)
        model.add_module(layer, module)
    return model


def _tool(name: str, per: Per, clip_: Callable[[nn.Module, float], object]) -> Tool:
    """A tool that changes the gradients of a model in place."""

    def clip(gradients: Gradients, threshold: float) -> Gradients:
        model = _model(gradients)
        clip_(model, threshold)
        return {
            layer: {name: parameter.grad for name, parameter in module.named_parameters()}
            for layer, module in model.named_children()
        }

    return Tool(name, per, clip)


def _clip_each_layer(model: nn.Module, threshold: float) -> None:
    for layer in model.children():
        clip_grad_norm_(layer.parameters(), threshold)


TORCH = (
    _tool("torch `clip_grad_norm_`", "model", lambda model, t: clip_grad_norm_(model.parameters(), t)),
    _tool("torch, a loop of it per layer", "layer", _clip_each_layer),
    _tool("torch `clip_grad_value_`", "value", lambda model, t: clip_grad_value_(model.parameters(), t)),
)
TAMEGRAD = (
    _tool('tamegrad `Clip(per="model")`', "model", lambda model, t: normalize_grad_(model, Clip(t, per="model"))),
    _tool('tamegrad `Clip(per="layer")`', "layer", lambda model, t: normalize_grad_(model, Clip(t, per="layer"))),
    _tool("tamegrad `ClipValue`", "value", lambda model, t: normalize_grad_(model, ClipValue(t))),
)
