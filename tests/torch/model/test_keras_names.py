"""Modules built as Keras 3 builds its layers on PyTorch; `make test` does not install Keras."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tamegrad import Clip
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.model.layers import ModelLayers, find_layers
from tamegrad.torch.model.pairs import read_pairs


class KerasLayer(nn.Module):
    """Collects its variables and those of the layers below it when its parameters are first asked for."""

    def __init__(self, path: str, *unregistered: "KerasLayer") -> None:
        super().__init__()
        self.path, self.unregistered = path, unregistered
        self.own: dict[str, nn.Parameter] = {}

    def add(self, name: str, tensor: torch.Tensor, *, trainable: bool = True) -> "KerasLayer":
        self.own[f"{self.path}/{name}"] = nn.Parameter(tensor, requires_grad=trainable)
        return self

    def variables(self) -> dict[str, nn.Parameter]:
        below = [child for child in self.children() if isinstance(child, KerasLayer)]
        return self.own | {
            key: value for layer in (*below, *self.unregistered) for key, value in layer.variables().items()
        }

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        if not hasattr(self, "_torch_params"):
            self._torch_params = nn.ParameterDict(self.variables())
        return super().named_parameters(*args, **kwargs)


def dense(path: str) -> KerasLayer:
    return KerasLayer(path).add("kernel", torch.ones(2, 2)).add("bias", torch.ones(2))


def dropout(path: str) -> KerasLayer:
    return KerasLayer(path).add("seed_generator_state", torch.zeros(2, dtype=torch.int32), trainable=False)


def types_of(found: ModelLayers) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.types for layer in found.layers}


def a_subclass() -> Any:
    model = KerasLayer("model", dense("model/dense_1"))
    model.first = dense("model/dense")
    model.block = KerasLayer("model/block").add("gain", torch.ones(2))
    model.block.inner = dense("model/block/dense")
    model.block.drop = dropout("seed_generator")
    return model


def test_layers_that_are_no_modules_are_named_by_the_paths_of_keras() -> None:
    model = KerasLayer("model", dense("dense"), dense("lstm/lstm_cell"), dropout("seed_generator"))
    expected = {"dense": ("bias", "kernel"), "lstm.lstm_cell": ("bias", "kernel")}
    assert types_of(find_layers(model)) == types_of(read_pairs(model.named_parameters())) == expected
    names = [parameter.name for layer in find_layers(model).layers for parameter in layer.parameters]
    assert names == ["dense.bias", "dense.kernel", "lstm.lstm_cell.bias", "lstm.lstm_cell.kernel"]
    normalizer = GradientNormalizer(model, Clip(1.0), overrides={"dense/kernel": None, "lstm*": None})
    assert [group.name for group in normalizer.plan.groups] == ["dense", "dense/kernel", "lstm.lstm_cell"]


def test_layers_that_are_modules_own_their_variables() -> None:
    expected = {
        "first": ("bias", "kernel"),
        "block.inner": ("bias", "kernel"),
        "block": ("gain",),
        "dense_1": ("bias", "kernel"),
    }
    model = a_subclass()
    assert types_of(find_layers(model)) == expected
    assert types_of(find_layers(nn.ModuleDict({"keras": model}))) == {
        f"keras.{name}": expected[name] for name in expected
    }
    assert len(find_layers(model).parameters) == len({id(p) for p in model.parameters() if p.is_floating_point()})


def test_a_sequential_model_does_not_show_the_model_that_runs_its_layers() -> None:
    layers = dense("sequential/dense"), dense("sequential/dense_1")
    model = KerasLayer("sequential")
    model._functional = KerasLayer("functional", *layers)
    expected = {"dense": ("bias", "kernel"), "dense_1": ("bias", "kernel")}
    assert types_of(find_layers(model)) == types_of(read_pairs(model.named_parameters())) == expected
    inside = nn.ModuleDict({"head": model})
    expected = {f"head.{name}": types for name, types in expected.items()}
    assert types_of(find_layers(inside)) == types_of(read_pairs(inside.named_parameters())) == expected


def test_a_layer_of_keras_with_the_name_of_a_module_stays_another_layer() -> None:
    model = KerasLayer("model", dense("model/dense"), dense("model/other"))
    model.dense = dense("model/dense_1")
    expected = dict.fromkeys(["dense", "_torch_params.dense", "other"], ("bias", "kernel"))
    assert types_of(find_layers(model)) == types_of(read_pairs(model.named_parameters())) == expected
    assert types_of(find_layers(model, [""])) == {
        "(root)": tuple(f"{layer}.{own}" for layer in expected for own in ("bias", "kernel"))
    }


@pytest.mark.parametrize("pattern", ["lstm", "l*m"])
def test_merges_by_the_paths_of_keras(pattern: str) -> None:
    model = KerasLayer("model", dense("dense"), dense("lstm/forward"), dense("lstm/backward"))
    expected = {
        "dense": ("bias", "kernel"),
        "lstm": ("backward.bias", "backward.kernel", "forward.bias", "forward.kernel"),
    }
    normalizer = GradientNormalizer(model, Clip(1.0), layers=[pattern])
    assert {layer.name: layer.types for layer in normalizer.plan.layers} == expected
    assert types_of(read_pairs(model.named_parameters(), [pattern])) == expected


def test_a_plan_that_made_keras_collect_its_variables_is_not_stale() -> None:
    model = a_subclass()
    normalizer = GradientNormalizer(model, Clip(1.0))
    plan = normalizer.plan
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    report = normalizer.normalize_()
    assert normalizer.plan is plan
    assert report.norms_after.tolist() == pytest.approx([1.0] * 4)
