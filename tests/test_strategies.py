import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tamegrad import Clip, ClipValue, GradientNormalization, Keep, Renormalize, SettingError
from tamegrad.strategies import Strategy

SIX = {
    "None": Keep(),
    "RenormalizeL2PerLayer": Renormalize(per="layer"),
    "RenormalizeL2PerParamType": Renormalize(per="param_type"),
    "ClipElementWiseAbsoluteValue": ClipValue(0.25),
    "ClipL2PerLayer": Clip(0.25, per="layer"),
    "ClipL2PerParamType": Clip(0.25, per="param_type"),
}


def test_has_deeplearning4js_six_spellings_and_no_other() -> None:
    assert {member.value for member in GradientNormalization} == set(SIX)


@pytest.mark.parametrize(("spelling", "strategy"), SIX.items())
def test_a_member_called_with_a_threshold_is_the_strategy(spelling: str, strategy: Strategy) -> None:
    assert GradientNormalization(spelling)(0.25) == strategy


@pytest.mark.parametrize("spelling", ["None", "RenormalizeL2PerLayer", "RenormalizeL2PerParamType"])
def test_strategies_without_a_threshold_ignore_it(spelling: str) -> None:
    assert GradientNormalization(spelling)(math.nan) == SIX[spelling]


def test_the_default_threshold_is_one() -> None:
    assert GradientNormalization.CLIP_L2_PER_LAYER() == Clip(1.0)
    assert GradientNormalization.CLIP_ELEMENT_WISE_ABSOLUTE_VALUE() == ClipValue(1.0)


@pytest.mark.parametrize("make", [Clip, ClipValue, GradientNormalization.CLIP_L2_PER_PARAM_TYPE])
@pytest.mark.parametrize("threshold", [0, -1, -0.0, math.nan, -math.inf, "1", None, True, [1.0], 1j])
def test_refuses_a_threshold_that_is_none(make: Callable[[object], Strategy], threshold: object) -> None:
    with pytest.raises(SettingError) as caught:
        make(threshold)
    message = str(caught.value)
    assert re.search(r"^Clip(Value)?\(threshold\): got ", message)
    assert f"got {threshold!r}; allowed: a number above 0, or infinity to measure only; next: pass" in message


@pytest.mark.parametrize("threshold", [5e-324, 1, np.float32(0.5), 1e308, math.inf])
def test_takes_any_number_above_zero_as_a_float(threshold: float) -> None:
    assert type(Clip(threshold).threshold) is float
    assert Clip(threshold).threshold == threshold


@pytest.mark.parametrize("make", [lambda per: Clip(1.0, per=per), lambda per: Renormalize(per=per)])
@pytest.mark.parametrize("per", ["layers", "Layer", None, 1])
def test_refuses_an_unknown_per(make: Callable[[object], Strategy], per: object) -> None:
    with pytest.raises(SettingError, match=r"\(per\): got .*allowed: 'layer', 'param_type', 'tensor', 'model'; next: "):
        make(per)


@pytest.mark.parametrize("strategy", SIX.values())
def test_strategies_are_frozen_values(strategy: Strategy) -> None:
    same: Any = dataclasses.replace(strategy)
    assert hash(strategy) == hash(same)
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        strategy.per = "model"  # type: ignore[misc]
