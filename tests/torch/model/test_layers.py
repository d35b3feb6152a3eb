"""Layer names, parameter types, and which layer owns which parameter."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tamegrad import UnmatchedError
from tamegrad.torch.model.layers import check_patterns, find_layers


def types_of(model: nn.Module, *merged: str) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.types for layer in find_layers(model, merged).layers}


def parameter_names(model: nn.Module, *merged: str) -> list[str]:
    return [parameter.name for layer in find_layers(model, merged).layers for parameter in layer.parameters]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.linear = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


@pytest.mark.parametrize(
    ("module", "types"),
    [
        (nn.Linear(2, 3), ("weight", "bias")),
        (nn.Linear(2, 3, bias=False), ("weight",)),
        (nn.Conv1d(1, 2, 3), ("weight", "bias")),
        (nn.Conv2d(1, 2, 3), ("weight", "bias")),
        (nn.ConvTranspose3d(1, 2, 3), ("weight", "bias")),
        (nn.Embedding(3, 2), ("weight",)),
        (nn.LayerNorm(2), ("weight", "bias")),
        (nn.BatchNorm1d(2), ("weight", "bias")),
        (nn.PReLU(), ("weight",)),
        (nn.Bilinear(2, 2, 2), ("weight", "bias")),
        (nn.LSTMCell(2, 3), ("weight", "recurrent_weight", "bias")),
        (nn.GRUCell(2, 3, bias=False), ("weight", "recurrent_weight")),
        (nn.RNNCell(2, 3), ("weight", "recurrent_weight", "bias")),
        (nn.MultiheadAttention(2, 1), ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")),
        (
            nn.MultiheadAttention(2, 1, kdim=3, vdim=4, bias=False, add_bias_kv=True),
            ("q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v", "out_proj.weight"),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_that_owns_parameters_is_one_layer(module: nn.Module, types: tuple[str, ...]) -> None:
    assert types_of(nn.ModuleDict({"here": module})) == {"here": types}
    assert types_of(module) == {"(root)": types}


@pytest.mark.parametrize("recurrent", [nn.RNN, nn.LSTM, nn.GRU])
def test_each_stacked_recurrent_layer_is_a_layer_with_both_directions(recurrent: Any) -> None:
    one_way = ("weight", "recurrent_weight", "bias")
    both = (*one_way, "reverse_weight", "reverse_recurrent_weight", "reverse_bias")
    model = nn.ModuleDict({"rnn": recurrent(2, 3, num_layers=2, bidirectional=True)})
    assert types_of(model) == {"rnn.l0": both, "rnn.l1": both}
    assert parameter_names(model)[:4] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"]
    assert types_of(recurrent(2, 3)) == {"l0": one_way}
    assert [layer.owner for layer in find_layers(model).layers] == ["rnn", "rnn"]


def test_a_projection_has_its_own_type() -> None:
    types = types_of(nn.LSTM(2, 3, proj_size=1, bidirectional=True, bias=False))
    directed = ("weight", "recurrent_weight", "projection_weight")
    assert types == {"l0": (*directed, *(f"reverse_{name}" for name in directed))}


def test_parameters_of_the_model_itself_are_the_root_layer() -> None:
    assert types_of(Block()) == {"(root)": ("scale",), "linear": ("weight", "bias"), "norm": ("weight", "bias")}


def test_items_of_a_parameter_list_or_dict_belong_to_its_owner() -> None:
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.own = nn.Parameter(torch.ones(1))
    model.inner.many = nn.ParameterList([torch.ones(1), torch.ones(1)])
    model.inner.named = nn.ParameterDict({"a": torch.ones(1)})
    assert types_of(model) == {"inner": ("own", "many.0", "many.1", "named.a")}
    assert parameter_names(model) == ["inner.own", "inner.many.0", "inner.many.1", "inner.named.a"]


def test_a_tied_parameter_belongs_to_its_first_owner() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "out": nn.Linear(2, 3), "again": nn.Linear(2, 2)})
    model["out"].weight = model["embed"].weight
    model["alias"] = model["again"]
    assert types_of(model) == {"embed": ("weight",), "out": ("bias",), "again": ("weight", "bias")}
    assert len(find_layers(model).parameters) == 4


def test_frozen_parameters_are_part_of_their_layer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).requires_grad_(requires_grad=False)})
    assert types_of(model) == {"a": ("weight", "bias"), "b": ("weight", "bias")}


def test_a_merged_layer_takes_everything_below_the_outermost_match() -> None:
    blocks = nn.ModuleList([Block(), nn.ModuleDict({"rnn": nn.GRU(2, 2), "attention": nn.MultiheadAttention(2, 1)})])
    model = nn.ModuleDict({"h": blocks, "out": nn.Linear(2, 2)})
    types = types_of(model, "h.*", "h.0.linear")
    assert list(types) == ["h.0", "h.1", "out"]
    assert types["h.0"] == ("scale", "linear.weight", "linear.bias", "norm.weight", "norm.bias")
    assert types["h.1"][:2] == ("rnn.weight_ih_l0", "rnn.weight_hh_l0")
    assert types["h.1"][-1] == "attention.out_proj.bias"
    assert parameter_names(model, "h.*")[1] == "h.0.linear.weight"


def test_a_merged_recurrent_module_is_one_layer() -> None:
    types = types_of(nn.ModuleDict({"rnn": nn.RNN(2, 2, num_layers=2, bias=False)}), "rnn")
    assert types == {"rnn": ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1")}


def test_a_pattern_for_merged_layers_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(UnmatchedError, match=r"^layers='h.\*': got a pattern that matches none of 3 modules.*'linear'"):
        check_patterns(["h.*"], find_layers(Block()).paths)


def test_a_parametrization_has_the_type_of_the_tensor_it_computes() -> None:
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    rnn = nn.utils.parametrizations.weight_norm(nn.RNN(2, 2), "weight_hh_l0")
    model = nn.ModuleDict({"linear": linear, "rnn": rnn})
    assert types_of(model) == {"linear": ("bias", "weight"), "rnn.l0": ("weight", "bias", "recurrent_weight")}
    assert "linear.parametrizations.weight.original0" in parameter_names(model)
    assert len(find_layers(model).parameters) == len(list(model.parameters()))
    assert "linear.weight" in types_of(nn.ModuleDict({"block": model}), "block")["block"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_hook_based_reparametrization_has_the_type_of_the_tensor_it_computes() -> None:
    normed = nn.utils.weight_norm(nn.Linear(2, 2))
    prune: Any = nn.utils.prune
    pruned = prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5)
    spectral = nn.utils.spectral_norm(nn.Linear(2, 2))
    model = nn.ModuleDict({"normed": normed, "pruned": pruned, "spectral": spectral})
    assert set(types_of(model).values()) == {("bias", "weight")}
    assert len(find_layers(model).parameters) == 7


def test_wrappers_do_not_appear_in_names() -> None:
    plain = types_of(nn.ModuleDict({"block": Block()}))
    wrapped_inside = nn.ModuleDict({"block": checkpoint_wrapper(Block())})
    compiled = torch.compile(nn.ModuleDict({"block": Block()}))
    assert isinstance(compiled, nn.Module)
    for model in (wrapped_inside, compiled, nn.DataParallel(wrapped_inside)):
        assert types_of(model) == plain
        assert parameter_names(model)[0] == "block.scale"
    assert types_of(wrapped_inside, "block")["block"][1] == "linear.weight"


def test_a_submodule_named_module_is_not_a_wrapper() -> None:
    assert list(types_of(nn.ModuleDict({"module": nn.Linear(2, 2)}))) == ["module"]


def test_lazy_modules_have_names_before_they_have_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    before = find_layers(model)
    model(torch.ones(2, 5))
    after = find_layers(model)
    assert [layer.name for layer in before.layers] == ["0", "1"]
    assert [layer.types for layer in before.layers] == [layer.types for layer in after.layers]
    assert all(a is b for a, b in zip(before.parameters, after.parameters, strict=True))


def test_restricts_to_some_parameters() -> None:
    block = Block()
    some = find_layers(block).restricted_to([block.linear.bias, block.norm.weight, nn.Parameter(torch.ones(1))])
    assert {layer.name: layer.types for layer in some.layers} == {"linear": ("bias",), "norm": ("weight",)}
    assert some.parameters == [block.linear.bias, block.norm.weight]
