"""Deeplearning4j's networks as PyTorch modules, and its arrays in PyTorch's order.

Each layer is the `torch.nn` module of the same kind, under Deeplearning4j's name; without such a module, it is one that
owns parameters of the same names.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from support.dl4j import Array, Arrays, Layer


class Order(Enum):
    """How the values of a Deeplearning4j array are laid out in its PyTorch twin."""

    SAME = "same"
    TRANSPOSED = "transposed"
    GATES = "gates"


class Twin(NamedTuple):
    """The parameter of a PyTorch module that corresponds to a Deeplearning4j array."""

    name: str
    order: Order


# Deeplearning4j's blocks are candidate, forget, output, input; PyTorch's input, forget, candidate, output.
_GATES_TO_TORCH, _GATES_FROM_TORCH = (3, 1, 0, 2), (2, 1, 3, 0)

_DENSE = {"W": Twin("weight", Order.TRANSPOSED), "b": Twin("bias", Order.SAME)}
# Deeplearning4j has one bias: `bias_hh` stays zero and frozen, or it would count twice in the norm.
_LSTM = {"W": "weight_ih_l0", "RW": "weight_hh_l0", "b": "bias_ih_l0"}
_TWINS: dict[str, dict[str, Twin]] = {
    "DenseLayer": _DENSE,
    "OutputLayer": _DENSE,
    "RnnOutputLayer": _DENSE,
    "LSTM": {kind: Twin(name, Order.GATES) for kind, name in _LSTM.items()},
    "Bidirectional": {
        f"{direction}{kind}": Twin(name + suffix, Order.GATES)
        for direction, suffix in (("f", ""), ("b", "_reverse"))
        for kind, name in _LSTM.items()
    },
    "ConvolutionLayer": {"W": Twin("weight", Order.SAME), "b": Twin("bias", Order.SAME)},
}


class Owner(nn.Module):
    """A layer with parameters under Deeplearning4j's names, and no forward pass."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def build(layers: Sequence[Layer], dtype: str) -> nn.ModuleDict:
    """Makes the network: a `ModuleDict` of layers under Deeplearning4j's names, without a forward pass."""
    model = nn.ModuleDict({layer.name: _module(layer) for layer in layers})
    for name, parameter in model.named_parameters():
        if "bias_hh" in name:
            nn.init.zeros_(parameter)
            parameter.requires_grad = False
    return model.to(getattr(torch, dtype))


def _module(layer: Layer) -> nn.Module:
    match layer.kind:
        case "DenseLayer" | "OutputLayer" | "RnnOutputLayer":
            return nn.Linear(layer.shapes["W"][0], layer.shapes["W"][1])
        case "LSTM":
            return nn.LSTM(layer.shapes["W"][0], layer.shapes["RW"][0], batch_first=True)
        case "Bidirectional":
            return nn.LSTM(layer.shapes["fW"][0], layer.shapes["fRW"][0], batch_first=True, bidirectional=True)
        case "ConvolutionLayer":
            outputs, inputs, *size = layer.shapes["W"]
            return nn.Conv2d(inputs, outputs, (size[0], size[1]))
        # To Deeplearning4j the four attention matrices are one layer of four types, and so are a batch normalization's
        # gamma, beta and running statistics, whose changes it normalizes as if they were gradients.
        case "SelfAttentionLayer" | "BatchNormalization":
            return Owner(layer.shapes)
    raise AssertionError(f"no twin for {layer.kind}")


def twins(layer: Layer) -> dict[str, Twin]:
    """Maps each array of a layer to the parameter of its module."""
    return _TWINS.get(layer.kind) or {kind: Twin(kind, Order.SAME) for kind in layer.shapes}


def set_parameters(model: nn.ModuleDict, layers: Sequence[Layer], arrays: Arrays) -> None:
    for layer, kind, twin, parameter in _walk(model, layers):
        with torch.no_grad():
            parameter.copy_(to_torch(arrays[layer.name][kind], twin.order))


def parameters_of(model: nn.ModuleDict, layers: Sequence[Layer]) -> Arrays:
    return _read(layers, {(layer.name, kind): parameter for layer, kind, _, parameter in _walk(model, layers)})


def set_gradients(model: nn.ModuleDict, layers: Sequence[Layer], arrays: Arrays) -> None:
    for layer, kind, twin, parameter in _walk(model, layers):
        parameter.grad = to_torch(arrays[layer.name][kind], twin.order)


def gradients_of(model: nn.ModuleDict, layers: Sequence[Layer]) -> Arrays:
    tensors = {}
    for layer, kind, _, parameter in _walk(model, layers):
        assert parameter.grad is not None
        tensors[layer.name, kind] = parameter.grad
    return _read(layers, tensors)


def to_torch(array: Array, order: Order) -> Tensor:
    """Returns a tensor in its own storage, because all tests share the arrays."""
    if order is Order.GATES:
        array = _reordered(array, _GATES_TO_TORCH)
    return torch.from_numpy((array if order is Order.SAME else array.T).copy(order="C"))


def from_torch(tensor: Tensor, order: Order) -> Array:
    array: Array = tensor.detach().clone().numpy()
    if order is not Order.SAME:
        array = array.T
    return _reordered(array, _GATES_FROM_TORCH) if order is Order.GATES else np.ascontiguousarray(array)


def _reordered(array: Array, blocks: Sequence[int]) -> Array:
    parts = np.split(array, len(blocks), axis=-1)
    return np.concatenate([parts[block] for block in blocks], axis=-1)


def _walk(model: nn.ModuleDict, layers: Sequence[Layer]) -> Iterator[tuple[Layer, str, Twin, nn.Parameter]]:
    for layer in layers:
        parameters = dict(model[layer.name].named_parameters())
        for kind, twin in twins(layer).items():
            yield layer, kind, twin, parameters[twin.name]


def _read(layers: Sequence[Layer], tensors: Mapping[tuple[str, str], Tensor]) -> Arrays:
    return {
        layer.name: {kind: from_torch(tensors[layer.name, kind], twins(layer)[kind].order) for kind in layer.shapes}
        for layer in layers
    }
