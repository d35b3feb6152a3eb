import pytest

from tamegrad import Clip, ClipValue, GradientNormalization, Keep, Policy, Renormalize, SettingError
from tamegrad.policy import as_policy
from tamegrad.strategies import Strategy


class Normalization:
    pass


class Special(Normalization):
    pass


POLICY = Policy(
    Clip(1.0),
    overrides={
        "embed*": None,
        "*/bias": Clip(2.0),
        Normalization: ClipValue(3.0),
        "block.*/weight_?": Clip(4.0),
        "block.*": Renormalize(),
    },
)


@pytest.mark.parametrize(
    ("layer", "param_type", "module_class", "expected"),
    [
        ("embed", "bias", None, Keep()),
        ("embedding.tokens", None, None, Keep()),
        ("block.0", "bias", None, Clip(2.0)),
        ("block.0", "weight_v", None, Clip(4.0)),
        ("block.0", "weight", None, Renormalize()),
        ("block.0.attention.query", "weight", None, Renormalize()),
        ("block.0", None, None, Renormalize()),
        ("block.0", "weight", Special, ClipValue(3.0)),
        ("norm", "bias", Special, Clip(2.0)),
        ("out", "weight", None, Clip(1.0)),
        ("Embed", "weight", None, Clip(1.0)),
    ],
)
def test_the_first_match_wins_and_the_default_takes_the_rest(
    layer: str, param_type: str | None, module_class: type | None, expected: Strategy
) -> None:
    assert POLICY.strategy_for(layer, param_type, module_class) == expected


@pytest.mark.parametrize("name", ["a*b", "conv[1]", "block/conv", "[/]", "what?", "a.b", "]", "[!x]", "(root)", "a\nb"])
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    policy = Policy(None, overrides={Policy.escape(name): Clip(1.0)})
    assert policy.strategy_for(name) == Clip(1.0)
    assert policy.strategy_for(name, "weight") == Clip(1.0)
    for other in (f"{name}x", f"x{name}", name[1:], name.replace("*", "x").replace("?", "x").replace("/", "x") + "."):
        assert policy.strategy_for(other, "weight") == Keep()


def test_takes_members_and_none_for_strategies() -> None:
    member = GradientNormalization.CLIP_L2_PER_LAYER
    assert Policy(member, overrides={"out": None}) == Policy(Clip(1.0), overrides={"out": Keep()})
    assert Policy() == Policy(Keep())


def test_is_a_value_with_a_telling_repr() -> None:
    policy = Policy(Clip(1.0), overrides={"out": None})
    assert hash(policy) == hash(Policy(Clip(1.0), overrides={"out": Keep()}))
    assert repr(policy) == "Policy(Clip(threshold=1.0, per='layer'), overrides={'out': Keep()})"
    assert policy != Policy(Clip(1.0))


@pytest.mark.parametrize("strategy", ["ClipL2PerLayer", 1.0, Clip, Policy()])
def test_refuses_what_is_no_strategy(strategy: object) -> None:
    with pytest.raises(SettingError, match=r"^Policy\(overrides\['out'\]\): got .*allowed: Keep\(\), .*; next: pass"):
        Policy(None, overrides={"out": strategy})


@pytest.mark.parametrize("key", [None, 3, "", "/bias", "out/"])
def test_refuses_what_is_no_key(key: str) -> None:
    with pytest.raises(SettingError, match=r"^Policy\(overrides\): got the key .*allowed: a layer name or glob"):
        Policy(None, overrides={key: None})


def test_refuses_a_policy_beside_overrides() -> None:
    with pytest.raises(
        SettingError, match=r"^attach: got a Policy together with overrides=; .*next: put the overrides"
    ):
        as_policy(Policy(), {"out": None}, "attach")
