"""A normalizer that is called by hand follows its model, however the model is changed."""

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tamegrad import Clip
from tamegrad.torch import GradientNormalizer


def replace_parameters(model: Any) -> None:
    vars(model[1])["_parameters"] = nn.Linear(6, 4)._parameters


def update_everything(model: Any) -> None:
    vars(model[1]).update(vars(nn.Linear(6, 4)))


def set_state(model: Any) -> None:
    model[1].__setstate__(copy.deepcopy(vars(model[1])))


def replace_modules(model: Any) -> None:
    vars(model)["_modules"] = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))._modules


def use_ordered_dictionaries(model: Any) -> None:
    for layer in model:
        layer._parameters = collections.OrderedDict(nn.Linear(6, 4)._parameters)


def use_other_mappings(model: Any) -> None:
    for layer in model:
        vars(layer)["_parameters"] = collections.UserDict(nn.Linear(6, 4)._parameters)


def reorder(model: Any) -> None:
    model[1]._parameters = dict(reversed(model[1]._parameters.items()))
    model[1].weight = nn.Parameter(torch.zeros(4, 6))


CHANGES = [
    replace_parameters,
    update_everything,
    set_state,
    replace_modules,
    use_ordered_dictionaries,
    use_other_mappings,
    reorder,
]


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_was_replaced_is_noticed(change: Callable[[Any], None], backend: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    normalizer = GradientNormalizer(model, Clip(1.0, per="tensor"), backend=backend)
    for changes in ([], [change], []):
        for make in changes:
            make(model)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        normalizer.normalize_()
        norms = [float(parameter.grad.norm()) for parameter in model.parameters() if parameter.grad is not None]
        assert norms == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("mapping", [collections.OrderedDict, collections.UserDict])
def test_tables_that_are_no_dictionaries_are_read(mapping: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    for layer in model:
        vars(layer)["_parameters"] = mapping(layer._parameters)
    normalizer = GradientNormalizer(model, Clip(1.0))
    plan = normalizer.plan
    assert [layer.types for layer in plan.layers] == [("weight", "bias")] * 2
    normalizer_again = GradientNormalizer(model, Clip(1.0))
    assert normalizer_again.plan == plan
