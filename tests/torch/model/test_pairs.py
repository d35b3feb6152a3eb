"""`(name, parameter)` pairs in place of a module: the names give the same layers."""

import pytest
import torch
from torch import nn

from tamegrad import Clip, SettingError, UnmatchedError
from tamegrad.torch import GradientNormalizer, attach, normalize_grad_
from tamegrad.torch.model.layers import find_layers
from tamegrad.torch.model.pairs import read_pairs


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.many = nn.ParameterList([torch.ones(1), torch.ones(1)])
        self.embed = nn.Embedding(3, 2)
        self.rnn = nn.LSTM(2, 3, num_layers=2, bidirectional=True, proj_size=2)
        self.cell = nn.GRUCell(2, 3)
        self.attention = nn.MultiheadAttention(2, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.blocks = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.out = nn.Linear(2, 3, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize("merged", [(), ("blocks",), ("blocks.*", "rnn"), ("*",)])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_the_names_give_the_layers_of_the_module(
    merged: tuple[str, ...], wrap: type[nn.DataParallel[Everything]]
) -> None:
    model = wrap(Everything())
    from_module, from_names = find_layers(model, merged), read_pairs(model.named_parameters(), merged)
    key = [(layer.name, set(layer.parameters), layer.owner) for layer in from_module.layers]
    assert [(layer.name, set(layer.parameters), layer.owner) for layer in from_names.layers] == key
    assert {id(parameter) for parameter in from_names.parameters} == {id(p) for p in from_module.parameters}


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.MultiheadAttention(2, 1), nn.RNN(2, 2), nn.RNNCell(2, 2)])
def test_a_single_module_is_the_root_layer(module: nn.Module) -> None:
    from_module, from_names = find_layers(module), read_pairs(module.named_parameters())
    assert [(layer.name, layer.types) for layer in from_names.layers] == [
        (la.name, la.types) for la in from_module.layers
    ]


def test_pairs_are_normalized() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    report = normalize_grad_(model.named_parameters(), Clip(1e-3), overrides={"1": None})
    assert report.groups == ("0", "1")
    assert report.clipped.tolist() == [True, False]


def test_pairs_can_be_attached() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normalizer = attach(model.named_parameters(), optimizer, Clip(1e-3))
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert normalizer.report is not None
    assert normalizer.report.clipped.all()


@pytest.mark.parametrize("pairs", [[], [nn.Linear(2, 2)], [("weight",)], [("weight", 1.0)], 3, None, {"weight": 1}])
def test_refuses_anything_but_pairs(pairs: object) -> None:
    with pytest.raises(SettingError, match=r"^model: got .*; allowed: a torch.nn.Module, or .name, parameter. pairs"):
        GradientNormalizer(pairs, Clip(1.0))  # type: ignore[arg-type]


def test_a_pattern_for_merged_layers_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(UnmatchedError, match="^layers='block': got a pattern that matches none of .*'blocks'"):
        GradientNormalizer(Everything().named_parameters(), Clip(1.0), layers=["block"])
