import re

import pytest

from tamegrad import Clip, ClipValue, Keep, Policy, Renormalize, SettingError, UnmatchedError
from tamegrad.groups import Layer, Parameter, Plan, check_overrides, make_plan
from tamegrad.strategies import Per


class Linear:
    pass


def layer(name: str, *types: str, owner: str | None = None) -> Layer:
    return Layer(name, tuple(Parameter(f"{name}.{kind}", kind) for kind in types), owner, Linear)


LAYERS = [
    layer("encoder.0", "weight", "bias"),
    layer("rnn.l0", "weight", "recurrent_weight", "bias", owner="rnn"),
    layer("rnn.l1", "weight", "recurrent_weight", "bias", owner="rnn"),
]


def groups_of(plan: Plan) -> dict[str, list[str]]:
    return {group.name: [plan.parameters[member].name for member in group.members] for group in plan.groups}


@pytest.mark.parametrize(
    ("per", "names"),
    [
        ("layer", ["encoder.0", "rnn.l0", "rnn.l1"]),
        ("param_type", ["encoder.0/weight", "encoder.0/bias", "rnn.l0/weight", "rnn.l0/recurrent_weight"]),
        ("tensor", ["encoder.0.weight", "encoder.0.bias", "rnn.l0.weight", "rnn.l0.recurrent_weight"]),
        ("model", ["model"]),
    ],
)
def test_names_the_groups_of_every_per(per: Per, names: list[str]) -> None:
    plan = make_plan(LAYERS, Policy(Clip(1.0, per=per)))
    assert [group.name for group in plan.groups][: len(names)] == names


def test_every_parameter_is_in_exactly_one_group() -> None:
    overrides = {"*/bias": None, "rnn.l1": Renormalize(per="param_type"), "encoder*": Clip(2.0, per="tensor")}
    plan = make_plan(LAYERS, Policy(Clip(1.0, per="model"), overrides))
    members = [member for group in plan.groups for member in group.members]
    assert sorted(members) == list(range(len(plan.parameters)))
    assert all(member in plan.groups[plan.group_of[member]].members for member in members)


def test_two_tensors_of_one_type_share_a_group() -> None:
    gates = Layer("rnn.l0", (Parameter("rnn.bias_ih_l0", "bias"), Parameter("rnn.bias_hh_l0", "bias")))
    assert groups_of(make_plan([gates], Policy(Clip(1.0, per="param_type")))) == {
        "rnn.l0/bias": ["rnn.bias_ih_l0", "rnn.bias_hh_l0"]
    }


def test_a_strategy_groups_only_what_it_governs() -> None:
    assert groups_of(make_plan(LAYERS[:1], Policy(Clip(1.0), {"*/bias": None}))) == {
        "encoder.0": ["encoder.0.weight"],
        "encoder.0/bias": ["encoder.0.bias"],
    }


def test_per_model_makes_one_group_for_each_entry_of_the_policy() -> None:
    overrides = {"rnn.*/bias": Clip(1.0, per="model"), Linear: Clip(2.0, per="model")}
    plan = make_plan([*LAYERS, Layer("free", (Parameter("free.w", "w"),))], Policy(Clip(3.0, per="model"), overrides))
    sizes = {name: len(members) for name, members in groups_of(plan).items()}
    assert sizes == {
        "Linear": 6,
        "rnn.*/bias": 2,
        "model": 1,
    }


def test_a_pattern_that_names_the_owner_means_all_its_layers() -> None:
    plan = make_plan(LAYERS, Policy(None, {"rnn": Clip(1.0)}))
    assert [str(group.strategy) for group in plan.groups] == ["Keep()", *['Clip(1, per="layer")'] * 2]


def test_a_layer_called_model_does_not_collide_with_the_whole_model() -> None:
    layers = [layer("model", "weight"), layer("out", "weight")]
    plan = make_plan(layers, Policy(Clip(1.0, per="model"), {"model": Clip(1.0)}))
    assert groups_of(plan) == {"model": ["model.weight"], "model (2)": ["out.weight"]}


def test_prints_every_layer_its_strategy_and_its_types() -> None:
    overrides = {"*/bias": None, "rnn": ClipValue(0.5)}
    assert str(make_plan(LAYERS, Policy(Clip(1.0), overrides))).splitlines() == [
        "3 layers, 8 parameters, 6 groups",
        "layer      strategy              parameter types",
        'encoder.0  Clip(1, per="layer")  weight',
        "encoder.0  Keep()                bias",
        "rnn.l0     ClipValue(0.5)        weight recurrent_weight",
        "rnn.l0     Keep()                bias",
        "rnn.l1     ClipValue(0.5)        weight recurrent_weight",
        "rnn.l1     Keep()                bias",
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rnn.0", r"override 'rnn.0': got a key that matches none of 3 layers; allowed: .*closest: 'rnn.l"),
        ("rnn/weights", r"override 'rnn/weights': got a key that matches 'rnn.l0', 'rnn.l1', but .*closest: 'weight'"),
        (dict, r"override 'dict': .*closest: 'Linear'; next: print\(normalizer.plan\)"),
        ("Linear", rf"override 'Linear': .*closest: .*; next: .* class itself as the key, .*: {__name__}.Linear$"),
        (f"{__name__}.Linear", rf"; next: .*without quotes: {__name__}.Linear$"),
        ("Linear/bias", r"; next: print\(normalizer.plan\)"),
        ("Lin*", r"; next: print\(normalizer.plan\)"),
    ],
)
def test_an_override_that_matches_nothing_names_the_closest(key: str | type, message: str) -> None:
    with pytest.raises(UnmatchedError, match=message):
        check_overrides(LAYERS, Policy(None, {key: Clip(1.0)}))


def test_a_plan_does_not_ask_that_every_override_applies() -> None:
    policy = Policy(None, {"encoder.0": Clip(1.0)})
    assert make_plan(LAYERS[1:], policy).groups[0].strategy == Keep()
    with pytest.raises(UnmatchedError, match=re.escape("override 'encoder.0'")):
        check_overrides(LAYERS[1:], policy)


@pytest.mark.parametrize("layers", [[], [Layer("empty", ())]])
def test_refuses_a_model_without_parameters(layers: list[Layer]) -> None:
    with pytest.raises(SettingError, match="^model: got no parameters; allowed: .*; next: "):
        make_plan(layers, Policy())


class TestByLayer:
    def test_the_parts_are_the_plans_of_the_layers(self) -> None:
        policy = Policy(Clip(1.0), {"*/bias": None, "rnn.l1": Renormalize(per="param_type")})
        plan = make_plan(LAYERS, policy)
        parts = plan.by_layer()
        assert parts == [make_plan([layer], policy) for layer in LAYERS]
        assert [group.name for part in parts for group in part.groups] == [group.name for group in plan.groups]

    def test_refuses_groups_of_several_layers(self) -> None:
        with pytest.raises(ValueError, match="'model' spans several layers"):
            make_plan(LAYERS, Policy(Clip(1.0, per="model"))).by_layer()
