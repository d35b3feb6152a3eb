"""Layers of Keras 3 on PyTorch. Imports Keras on PyTorch, so it runs in a process where nothing else uses Keras."""

import os
from typing import Any

import pytest
import torch
from torch import nn

from tamegrad import Clip
from tamegrad.torch import GradientNormalizer, normalize_grad_

os.environ.setdefault("KERAS_BACKEND", "torch")
keras: Any = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("Keras runs on another backend", allow_module_level=True)


class Block(keras.layers.Layer):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(3)
        self.drop = keras.layers.Dropout(0.1)

    def build(self, shape: tuple[int, ...]) -> None:
        self.gain = self.add_weight(name="gain", shape=(3,))
        self.inner.build(shape)

    def call(self, x: Any) -> Any:
        return self.drop(self.inner(x)) * self.gain


class Subclass(keras.Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embed = keras.layers.Embedding(10, 3)
        self.rnn = keras.layers.Bidirectional(keras.layers.LSTM(2, return_sequences=True))
        self.block = Block()
        self.of_torch = nn.Linear(3, 3)
        self.head = keras.Sequential([keras.layers.Dense(3, name="out"), keras.layers.BatchNormalization(name="norm")])
        self.many = [keras.layers.Dense(2, name="first"), keras.layers.Dense(2, name="second")]

    def call(self, x: Any) -> Any:
        x = self.head(self.of_torch(self.block(self.rnn(self.embed(x))[..., :3])))
        for layer in self.many:
            x = layer(x)
        return x


TOKENS = torch.arange(10).reshape(2, 5)
DENSE = {"kernel", "bias"}
LSTM = {"kernel", "recurrent_kernel", "bias"}
NORM = {"gamma", "beta", "moving_mean", "moving_variance"}


def a_subclass() -> Any:
    model = Subclass()
    model(TOKENS)
    return model


def a_functional() -> Any:
    tokens = keras.Input((5,), dtype="int32")
    hidden = keras.layers.Embedding(10, 3, name="embed")(tokens)
    hidden = keras.layers.Bidirectional(keras.layers.LSTM(2, name="lstm"), name="both")(hidden)
    hidden = keras.layers.Dropout(0.1)(keras.layers.BatchNormalization(name="norm")(hidden))
    return keras.Model(tokens, keras.layers.Dense(3, name="out")(hidden))


def a_sequential() -> Any:
    model = keras.Sequential(
        [keras.layers.Embedding(10, 3, name="embed"), keras.layers.Dropout(0.1), keras.layers.Dense(3, name="out")]
    )
    model(TOKENS)
    return model


EXPECTED = {
    a_subclass: {
        "embed": {"embeddings"},
        "rnn.forward_layer.cell": LSTM,
        "rnn.backward_layer.cell": LSTM,
        "block": {"gain"},
        "block.inner": DENSE,
        "of_torch.module": {"weight", "bias"},
        "head.out": DENSE,
        "head.norm": NORM,
        "first": DENSE,
        "second": DENSE,
    },
    a_functional: {
        "embed": {"embeddings"},
        "both.forward_lstm.lstm_cell": LSTM,
        "both.backward_lstm.lstm_cell": LSTM,
        "norm": NORM,
        "out": DENSE,
    },
    a_sequential: {"embed": {"embeddings"}, "out": DENSE},
}


@pytest.mark.parametrize("make", EXPECTED)
def test_the_layers_of_keras_are_the_layers(make: Any) -> None:
    model = make()
    plan = GradientNormalizer(model, Clip(1.0)).plan
    assert {layer.name: set(layer.types) for layer in plan.layers} == EXPECTED[make]
    inside = GradientNormalizer(nn.ModuleDict({"here": model}), Clip(1.0)).plan
    assert {layer.name: set(layer.types) for layer in inside.layers} == {
        f"here.{name}": types for name, types in EXPECTED[make].items()
    }


@pytest.mark.parametrize("make", [a_functional, a_sequential])
def test_pairs_give_the_same_layers_where_the_layers_are_no_modules(make: Any) -> None:
    model = make()
    plan = GradientNormalizer(model.named_parameters(), Clip(1.0)).plan
    assert {layer.name: set(layer.types) for layer in plan.layers} == EXPECTED[make]


@pytest.mark.parametrize("make", EXPECTED)
def test_each_layer_is_normalized_by_itself_and_the_plan_stays(make: Any) -> None:
    model = make()
    normalizer = GradientNormalizer(model, Clip(1e-3))
    plan = normalizer.plan
    for _ in range(2):
        model.zero_grad()
        (1e3 * model(TOKENS, training=True)).square().sum().backward()
        report = normalizer.normalize_()
    assert normalizer.plan is plan
    assert report.clipped.all()
    trained = [variable.value.grad for variable in model.trainable_variables]
    total = torch.cat([gradient.flatten() for gradient in trained]).norm()
    assert float(total) == pytest.approx(1e-3 * len(plan.layers) ** 0.5, rel=1e-4)


def test_gradients_by_the_paths_of_keras() -> None:
    model = a_functional()
    model(TOKENS).square().sum().backward()
    gradients = {variable.path: variable.value.grad for variable in model.trainable_variables}
    report = normalize_grad_(gradients, Clip(1e-6))
    assert report.groups == tuple(EXPECTED[a_functional])
    assert report.clipped.all()
