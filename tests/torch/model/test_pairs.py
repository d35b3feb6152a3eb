"""`(name, parameter)` pairs in place of a module: the names give the same layers."""

from typing import Any

import numpy as np
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


def test_a_dictionary_of_parameters_is_read_like_its_items() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    named = dict(model.named_parameters())
    assert normalize_grad_(named, Clip(1e-3)).groups == ("0", "1")
    assert GradientNormalizer(named, Clip(1.0)).normalize_().norms.tolist() == pytest.approx([1e-3, 1e-3])


def test_integer_tensors_are_left_out() -> None:
    names = [("a.weight", nn.Parameter(torch.ones(1))), ("a.seed", nn.Parameter(torch.ones(1).int(), False))]  # noqa: FBT003
    assert [layer.types for layer in read_pairs(names).layers] == [("weight",)]


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_refuses_two_parameters_under_one_name(wrap: Any) -> None:
    encoder, decoder = (wrap(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) for _ in range(2))
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()])
    pairs = [*encoder.named_parameters(), *decoder.named_parameters()]
    message = (
        "^model: got pairs in which different parameters have the same name: '0.weight', '0.bias', '1.weight' and 1 "
        r'more; .*prefix: \[\*encoder.named_parameters\(prefix="encoder"\), .* or pass nn.ModuleDict'
    )
    with pytest.raises(SettingError, match=message):
        attach(pairs, optimizer, Clip(1.0))
    prefixed = [*encoder.named_parameters(prefix="encoder"), *decoder.named_parameters(prefix="decoder")]
    assert len(attach(prefixed, optimizer, Clip(1.0)).plan.layers) == 4


def test_one_parameter_may_come_twice() -> None:
    model = nn.Linear(2, 2)
    pairs = [*model.named_parameters(), *model.named_parameters(), *model.named_parameters(prefix="again")]
    assert [layer.types for layer in read_pairs(pairs).layers] == [("weight", "bias")]


LINEAR = nn.Linear(2, 2)
NAMED = dict(LINEAR.named_parameters())


@pytest.mark.parametrize(
    ("model", "got", "advice"),
    [
        ([], "a list of nothing", "pass the model itself, or model.named_parameters()"),
        (nn.ReLU().named_parameters(), "a generator of nothing", "only once"),
        ([LINEAR, LINEAR], "a list of modules", "nn.ModuleList([...])"),
        ((LINEAR, LINEAR), "a tuple of modules", "nn.ModuleDict({...}) to choose the names"),
        (LINEAR.children(), "a generator of nothing", "named_parameters()"),
        (nn.Sequential(LINEAR).children(), "a generator of modules", "nn.ModuleList([...])"),
        ({"a": LINEAR}, "a dict of names and modules", "nn.ModuleDict({...})"),
        (nn.Sequential(LINEAR).named_children(), "a generator of names and modules", "or the module that holds them"),
        (list(LINEAR.parameters()), "a list of tensors without names", "named_parameters() in place of parameters()"),
        (LINEAR.weight, "a Parameter without a name", 'pass pairs: [("name", parameter)]'),
        (torch.optim.SGD(LINEAR.parameters()), "SGD, an optimizer", "attach(model, optimizer, policy)"),
        (torch.optim.SGD(LINEAR.parameters()).param_groups, "an optimizer's parameter groups", "pass the model"),
        (nn.Linear, "the class Linear", "Linear(...)"),
        (LINEAR.forward, "the function forward", "pass the model itself"),
        ({"a": np.ones(2)}, "a dict of NumPy arrays", "tamegrad.normalize("),
        ({"weight": 1}, "a dict with 'weight': 1", "normalize_grad_({name: gradient}, policy)"),
        ({3: LINEAR.weight}, "a dict with 3: a Parameter", "normalize_grad_({name: gradient}, policy)"),
        ({"out": NAMED}, "a nested dict", "named_parameters()"),
        ([("weight",)], "a list without (name, parameter) pairs; the first that is none: ('weight',)", "named_param"),
        ([("weight", 1.0)], "the first that is none: ('weight', 1.0)", "named_parameters()"),
        (3, "a int without (name, parameter) pairs", "pass the model itself"),
        (None, "a NoneType without (name, parameter) pairs", "pass the model itself"),
        (LINEAR.state_dict(), "tensors that are no parameters and have no .grad", "normalize_grad_({name: gradient}"),
        (LINEAR.state_dict().items(), "a odict_items of tensors that are no parameters", "pass the model itself"),
        ([("a", 2 * LINEAR.weight)], "a list with a, which was computed from other tensors", "named_parameters()"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_model_is_refused_with_what_to_pass(model: Any, got: str, advice: str) -> None:
    with pytest.raises(SettingError, match="^model: got ") as raised:
        GradientNormalizer(model, Clip(1.0))
    assert got in raised.value.got
    assert advice in raised.value.advice
    assert raised.value.allowed.startswith("a torch.nn.Module, or (name, parameter) pairs")


def test_a_pattern_for_merged_layers_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(UnmatchedError, match="^layers='block': got a pattern that matches none of .*'blocks'"):
        GradientNormalizer(Everything().named_parameters(), Clip(1.0), layers=["block"])
