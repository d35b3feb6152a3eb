"""Layer names, parameter types, and which layer owns which parameter."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tamegrad import UnmatchedError
from tamegrad.torch.model.layers import check_patterns, find_layers
from tamegrad.torch.model.pairs import read_pairs


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


def test_integer_tensors_are_no_parameters_to_normalize() -> None:
    model = Block()
    model.seed = nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)
    model.table = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert types_of(model)["(root)"] == ("scale", "phase")


class Collecting(nn.Module):
    """Holds what the modules below own, directly, in a list and in a dictionary, before or after they are made."""

    def __init__(self, when: str, how: str) -> None:
        super().__init__()
        encoder, decoder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
        if when == "after":
            self.encoder, self.decoder = encoder, decoder
        self.own = nn.Parameter(torch.ones(1))
        parameters = {name: parameter for part in (encoder, decoder) for name, parameter in named(part)}
        if how == "directly":
            for name, parameter in parameters.items():
                self.register_parameter(name, parameter)
        else:
            self.every = nn.ParameterList(parameters.values()) if how == "list" else nn.ParameterDict(parameters)
        if when == "before":
            self.encoder, self.decoder = encoder, decoder


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{id(parameter)}", parameter) for parameter in module.parameters()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["directly", "list", "dictionary"])
def test_a_parameter_belongs_to_the_innermost_owner(when: str, how: str) -> None:
    model = Collecting(when, how)
    owned = dict.fromkeys(["encoder.0", "encoder.1", "decoder"], ("weight", "bias"))
    assert types_of(model) == {"(root)": ("own",), **owned}
    found = find_layers(nn.ModuleList([model, Block()]), ["0.encoder"])
    assert {layer.name: layer.types for layer in found.layers} == {
        "0": ("own",),
        "0.encoder": ("0.weight", "0.bias", "1.weight", "1.bias"),
        "0.decoder": ("weight", "bias"),
        "1": ("scale",),
        "1.linear": ("weight", "bias"),
        "1.norm": ("weight", "bias"),
    }
    assert {id(parameter) for parameter in found.parameters[:7]} == {id(parameter) for parameter in model.parameters()}


def test_the_order_of_the_layers_is_that_of_their_owners() -> None:
    model = Collecting("before", "directly")
    assert list(types_of(model)) == ["(root)", "encoder.0", "encoder.1", "decoder"]


def test_a_parameter_of_two_modules_side_by_side_belongs_to_the_first_even_below_one_that_collects() -> None:
    model = nn.ModuleDict({"out": nn.Linear(2, 2), "embed": nn.Embedding(2, 2)})
    model["out"].weight = model["embed"].weight
    model.every = nn.ParameterList(model.parameters())
    assert types_of(model) == {"out": ("weight", "bias")}


def test_what_a_module_leaves_out_of_its_parameters_is_left_out_below_it_too() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 2)
            self.out = nn.Linear(2, 2)

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            pairs = super().named_parameters(*args, **kwargs)
            yield from ((name, parameter) for name, parameter in pairs if "table" not in name)

    fused = Fused()
    assert types_of(nn.Sequential(fused, nn.Linear(2, 2))) == {"0.out": ("weight", "bias"), "1": ("weight", "bias")}
    # It can still be found where another module has it.
    outside = nn.Sequential(fused, nn.Linear(2, 3))
    outside[1].weight = fused.table.weight
    assert types_of(outside)["1"] == ("weight", "bias")


class Named(nn.Module):
    """Wraps a module in an attribute of this name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def test_the_modules_of_fabric_and_opacus_do_not_appear_in_names() -> None:
    class GradSampleModule(Named):
        __module__ = "opacus.grad_sample.grad_sample_module"

    plain = types_of(Block())
    for wrapped in (Named("_forward_module", Block()), GradSampleModule("_module", Block())):
        assert types_of(wrapped) == plain
        from_names = read_pairs(wrapped.named_parameters())
        assert {layer.name: layer.types for layer in from_names.layers} == plain
    assert list(types_of(Named("_module", nn.Linear(2, 2)))) == ["_module"]


def test_a_parametrized_weight_that_is_tied_belongs_to_its_first_owner() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "out": nn.Linear(2, 3)})
    model["out"].weight = model["embed"].weight
    nn.utils.parametrize.register_parametrization(model["embed"], "weight", Double())
    assert types_of(model) == {"embed": ("weight",), "out": ("bias",)}


def test_reading_takes_time_in_proportion_to_the_number_of_parameters() -> None:
    def seconds(count: int) -> float:
        model = nn.ModuleList([nn.Linear(1, 1) for _ in range(count)])
        model.every = nn.ParameterList(model.parameters())
        start = time.perf_counter()
        for merged in ((), ("",)):
            find_layers(model, merged)
        read_pairs(model.named_parameters(), [""])
        return time.perf_counter() - start

    # Ten times as many parameters took a hundred times as long where each one copied the layer so far.
    assert min(seconds(3000) for _ in range(3)) < 40 * min(seconds(300) for _ in range(3))
