"""The gradients to time: the shapes of real models, filled with random numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Case", "Subject", "cases", "gpt2", "linears", "lstm", "resnet50"]

# The shapes of a model, by layer and parameter type.
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


def gpt2(*, width: int = 768, blocks: int = 12, words: int = 50_257, positions: int = 1024) -> nn.Module:
    """Makes GPT-2's parameters; by default those of the 124M model, whose output layer shares the embedding's weight.

    Args:
        width: The width of the residual stream.
        blocks: The number of blocks.
        words: The size of the vocabulary.
        positions: The context length.

    Returns:
        A model without a forward pass.
    """
    norm = {"weight": (width,), "bias": (width,)}
    shapes: dict[str, Mapping[str, tuple[int, ...]]] = {
        "wte": {"weight": (words, width)},
        "wpe": {"weight": (positions, width)},
    }
    for block in range(blocks):
        # In the original these are convolutions of width 1, whose weights have the inputs first.
        shapes |= {
            f"h{block}_ln_1": norm,
            f"h{block}_attn_c_attn": {"weight": (width, 3 * width), "bias": (3 * width,)},
            f"h{block}_attn_c_proj": {"weight": (width, width), "bias": (width,)},
            f"h{block}_ln_2": norm,
            f"h{block}_mlp_c_fc": {"weight": (width, 4 * width), "bias": (4 * width,)},
            f"h{block}_mlp_c_proj": {"weight": (4 * width, width), "bias": (width,)},
        }
    return _owning({**shapes, "ln_f": norm})


def resnet50(*, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> nn.Module:
    """Makes ResNet-50's parameters: 53 convolutions, each with a batch normalization, and one linear layer.

    Args:
        width: The channels of the first stage.
        blocks: The number of bottleneck blocks in each stage.
        classes: The number of classes.

    Returns:
        A model without a forward pass.
    """
    shapes: dict[str, Mapping[str, tuple[int, ...]]] = {}

    def convolution(name: str, outputs: int, inputs: int, size: int) -> None:
        shapes[f"{name}_conv"] = {"weight": (outputs, inputs, size, size)}
        shapes[f"{name}_bn"] = {"weight": (outputs,), "bias": (outputs,)}

    convolution("stem", width, 3, 7)
    inputs = width
    for stage, count in enumerate(blocks):
        middle = width * 2**stage
        for block in range(count):
            name = f"layer{stage + 1}_{block}"
            convolution(f"{name}_1", middle, inputs, 1)
            convolution(f"{name}_2", middle, middle, 3)
            convolution(f"{name}_3", 4 * middle, middle, 1)
            if block == 0:
                convolution(f"{name}_downsample", 4 * middle, inputs, 1)
            inputs = 4 * middle
    return _owning({**shapes, "fc": {"weight": (classes, inputs), "bias": (classes,)}})


def linears(count: int, width: int = 64) -> nn.Module:
    """Makes the parameters of many small linear layers.

    Args:
        count: The number of layers.
        width: The size of their inputs and outputs.

    Returns:
        A model without a forward pass.
    """
    return _owning({f"linear{index}": {"weight": (width, width), "bias": (width,)} for index in range(count)})


def lstm(width: int = 1024) -> nn.Module:
    """Makes a stack of two LSTMs.

    Args:
        width: The size of their inputs and outputs.

    Returns:
        The model.
    """
    return nn.LSTM(width, width, num_layers=2)


def _owning(shapes: Shapes) -> nn.Module:
    model = nn.Module()
    for layer, types in shapes.items():
        module = nn.Module()
        for name, shape in types.items():
            # No tool reads a parameter, and memory that is never touched is never allocated.
            module.register_parameter(name, nn.Parameter(torch.empty(shape)))
        model.add_module(layer, module)
    return model


@dataclass(frozen=True)
class Case:
    """A model to time.

    Args:
        name: Its name.
        make: Makes it.
    """

    name: str
    make: Callable[[], nn.Module]


def cases(*, quick: bool) -> list[Case]:
    """Lists the models of the table.

    Args:
        quick: Whether to make them tiny.

    Returns:
        The models.
    """
    if quick:
        return [
            Case("GPT-2 124M", lambda: gpt2(width=8, blocks=1, words=50, positions=4)),
            Case("ResNet-50", lambda: resnet50(width=2, blocks=(1, 1), classes=3)),
            Case("1000 x Linear(64, 64)", lambda: linears(5, 4)),
            Case("2-layer LSTM of 1024", lambda: lstm(4)),
        ]
    return [
        Case("GPT-2 124M", gpt2),
        Case("ResNet-50", resnet50),
        Case("1000 x Linear(64, 64)", lambda: linears(1000)),
        Case("2-layer LSTM of 1024", lstm),
    ]


class Subject:
    """A model with gradients, and the same values in one flat tensor.

    Args:
        model: The model, with float32 parameters.

    Attributes:
        model: The model; every parameter has a gradient, each in its own storage.
        layers: The parameters of each layer, for a loop over layers.
        flat: The values of all gradients in one tensor, for a plain read or write.
        views: A copy of these values that is never changed, in the shapes of the gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.layers = _layers(model)
        generator = torch.Generator().manual_seed(0)
        self._saved = torch.randn(sum(p.numel() for p in self.parameters), generator=generator).mul_(0.01)
        pieces = torch.split(self._saved, [p.numel() for p in self.parameters])
        self.views = [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]
        self.flat = self._saved.clone()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view.clone()

    def refill(self) -> None:
        """Rewrites all gradients, as the backward pass does right before a step."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(view)

    def refill_flat(self) -> None:
        """Rewrites the flat values."""
        self.flat.copy_(self._saved)

    @property
    def size(self) -> str:
        """The size of the model, in words."""
        megabytes = 4 * self.flat.numel() / 2**20
        counts = f"{len(self.parameters):,} tensors, {len(self.layers):,} layers, {self.flat.numel():,} parameters"
        return f"{counts}, {megabytes:,.1f} MiB"


def _layers(model: nn.Module) -> list[list[nn.Parameter]]:
    if isinstance(model, nn.LSTM):
        named = list(model.named_parameters())
        return [[p for name, p in named if name.endswith(f"_l{index}")] for index in range(model.num_layers)]
    owned = (list(module.parameters(recurse=False)) for module in model.modules())
    return [parameters for parameters in owned if parameters]
