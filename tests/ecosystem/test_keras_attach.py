from typing import Any

import keras
import pytest
import torch

from support.ecosystem import POLICY, a_batch, loss_of
from tamegrad.torch import attach


def a_sequential() -> Any:
    dense = keras.layers.Dense
    return keras.Sequential([keras.Input((4,)), dense(8, activation="tanh"), keras.layers.Dropout(0.5), dense(3)])


def a_functional() -> Any:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(8, activation="tanh")(inputs))
    return keras.Model(inputs, keras.layers.Dense(3)(hidden))


class Subclass(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = (
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3),
        )

    def call(self, inputs: Any, *, training: bool = False) -> Any:
        return self.second(self.dropout(self.first(inputs), training=training))


def a_subclass() -> Any:
    model = Subclass()
    model(a_batch())
    return model


@pytest.mark.parametrize("make", [a_sequential, a_functional, a_subclass])
def test_attaches_to_an_optimizer_of_all_its_parameters(make: Any) -> None:
    keras.utils.set_random_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normalizer = attach(model, optimizer, POLICY)
    assert [sorted(parameter.type for parameter in layer.parameters) for layer in normalizer.plan.layers] == [
        ["bias", "kernel"],
        ["bias", "kernel"],
    ]
    loss_of(lambda batch: model(batch, training=True)).backward()
    optimizer.step()
    assert normalizer.steps == 1
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    assert len(dense) == 2
    for layer in dense:
        gradients = [variable.value.grad.ravel() for variable in layer.trainable_variables]
        assert torch.cat(gradients).norm().item() == pytest.approx(0.01)
