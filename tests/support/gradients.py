"""Models that consist only of parameters with gradients."""

from typing import Any

import torch
from torch import Tensor, nn


def model_with(gradients: list[Tensor]) -> Any:
    model = nn.Module()
    for index, gradient in enumerate(gradients):
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        model.register_parameter(f"p{index}", parameter)
    return model


def random_gradients(lengths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.randn(length, generator=generator, dtype=wide).to(dtype) for length in lengths]
