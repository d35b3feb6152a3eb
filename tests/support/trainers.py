"""What trainers are compared with: a loop written by hand, with the reference applied before every step."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from support.ecosystem import POLICY, TOLERANCE, by_reference

STEPS = 10
RATE = 0.1


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator) for _ in range(count)]


def mean_loss(model: Callable[..., Any], batch: Tensor) -> Any:
    return (50 * model(batch)).square().mean()


def an_optimizer(model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, fused=fused or None)


def normalize_by_reference(model: nn.Module, policy: object = POLICY) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in parameters.items()}
    after = by_reference({name: gradient.numpy() for name, gradient in gradients.items()}, policy)
    for name, gradient in gradients.items():
        gradient.copy_(torch.from_numpy(after[name]))


def train_by_hand(
    model: nn.Module,
    data: Sequence[Any],
    *,
    accumulate: int = 1,
    policy: object = POLICY,
    loss: Callable[..., Any] = mean_loss,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Trains a model in place, and returns it."""
    optimizer = optimizer or an_optimizer(model)
    for start in range(0, len(data), accumulate):
        optimizer.zero_grad()
        for batch in data[start : start + accumulate]:
            (loss(model, batch) / accumulate).backward()
        normalize_by_reference(model, policy)
        optimizer.step()
    return model


def check_same(model: nn.Module, by_hand: nn.Module) -> None:
    """Asserts that two models have the same parameters, and that they are not those of a new model."""
    expected = dict(by_hand.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        np.testing.assert_allclose(
            parameter.detach().numpy(), expected[name].detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
        )
