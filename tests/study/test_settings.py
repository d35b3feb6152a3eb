import math
import re
from typing import Any

import pytest

from tamegrad import SettingError
from tamegrad.study import settings
from tamegrad.study.settings import STRATEGIES, Settings, strategy_of, threshold_of


def test_the_defaults() -> None:
    assert Settings() == Settings(
        network="rnn", strategies=STRATEGIES, threshold=None, steps=300, seed=0, seeds=1, lr=0.25
    )
    assert settings.LEARNING_RATES == {"rnn": 0.25, "lstm": 2.0}
    assert settings.THRESHOLDS == {
        "ClipElementWiseAbsoluteValue": 0.003,
        "ClipL2PerLayer": 0.5,
        "ClipL2PerParamType": 0.33,
        "torch-global": 1.0,
    }
    assert math.isclose(settings.DIVERGED_LOSS, 2 * math.log(256))


def test_the_strategies_are_deeplearning4js_six_and_torch_global() -> None:
    assert STRATEGIES == (
        "None",
        "RenormalizeL2PerLayer",
        "RenormalizeL2PerParamType",
        "ClipElementWiseAbsoluteValue",
        "ClipL2PerLayer",
        "ClipL2PerParamType",
        "torch-global",
    )


def test_a_strategy_named_twice_is_trained_once() -> None:
    assert Settings(strategies=("torch-global", "None", "torch-global")).strategies == ("torch-global", "None")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_threshold_applies_to_every_strategy_that_has_one(name: str) -> None:
    has_one = name not in {"None", "RenormalizeL2PerLayer", "RenormalizeL2PerParamType"}
    assert threshold_of(name, 0.25) == (0.25 if has_one else None)
    assert ("0.25" in str(strategy_of(name, threshold_of(name, 0.25)))) == has_one


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "gru"}, "--network: got 'gru'; allowed: 'rnn', 'lstm'; closest: 'rnn'; next: leave it out"),
        ({"strategies": ("clipl2perlayer",)}, "--strategy: got 'clipl2perlayer'; allowed: 'None', "),
        ({"strategies": ("torch_global",)}, "'torch-global'; closest: 'torch-global'; next: leave it out"),
        ({"threshold": 0.0}, "--threshold: got 0.0; allowed: a number above 0, or inf to measure only; next: leave"),
        ({"threshold": -1.0}, "--threshold: got -1.0; allowed: a number above 0"),
        ({"threshold": math.nan}, "--threshold: got nan; allowed: a number above 0"),
        ({"steps": 0}, "--steps: got 0; allowed: a whole number from 1 to 1,000,000,000; next: leave it out for 300"),
        ({"steps": -5}, "--steps: got -5; allowed: a whole number from 1"),
        ({"steps": 10**400}, "00; allowed: a whole number from 1 to 1,000,000,000"),
        ({"seeds": 0}, "--seeds: got 0; allowed: a whole number from 1 to 1,000; next: leave it out for 1"),
        ({"seeds": 1001}, "--seeds: got 1001; allowed"),
        ({"seed": -1}, "--seed: got -1; allowed: a whole number from 0 to 2**63 - 1; next: leave it out for 0"),
        ({"seed": 2**63}, "--seed: got 9223372036854775808; allowed"),
        ({"seed": 2**63 - 2, "seeds": 3}, "allowed: a whole number from 0 to 2**63 - 3; next: leave it out for 0"),
        ({"lr": 0.0}, "--lr: got 0.0; allowed: a number from 1.2e-38 to 3.4e+38; next: leave it out for 0.25"),
        ({"lr": -0.1, "network": "lstm"}, "--lr: got -0.1; allowed: a number from 1.2e-38 to 3.4e+38; next: leave it"),
        ({"lr": math.inf}, "--lr: got inf; allowed"),
        ({"lr": 1e39}, "--lr: got 1e+39; allowed"),
        ({"lr": 1e-39}, "--lr: got 1e-39; allowed"),
        ({"lr": math.nan}, "--lr: got nan; allowed"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=re.escape(message)):
        Settings(**given)


def test_the_seeds_follow_the_one_given() -> None:
    assert list(Settings(seed=5, seeds=3).every_seed) == [5, 6, 7]
    assert list(Settings(seed=2**63 - 1).every_seed) == [2**63 - 1]
