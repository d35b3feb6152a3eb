"""Thousands of groups a call, of any magnitude, dtype, strategy and loss scale, against arithmetic of 80 bits."""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from support import bulk
from support.bulk import GROUPS, IS_EXACT, assert_all_groups_are_right
from support.contract import QUICK_BACKENDS
from tamegrad import decide, ranges
from tamegrad.torch.memory import DTYPES

pytestmark = pytest.mark.skipif(not IS_EXACT, reason="NumPy's longdouble has no 80 bits here")

# A thousand groups take 0.1 s on the cpu backend, and 0.5 s on the plain one, which works on tensors one by one.
# `make test-long` covers a million.
IS_LONG = settings.default is not None and settings.default.max_examples > 1_000
CALLS = {"cpu": 200 if IS_LONG else 3, "foreach": 50 if IS_LONG else 1}


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
def test_every_group_of_thousands_is_right(backend: Any) -> None:
    assert set(CALLS) == set(QUICK_BACKENDS)
    for seed in range(CALLS[backend]):
        assert assert_all_groups_are_right(seed, backend) > GROUPS


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "found"),
    [
        # An element that is limited ends a little too low.
        (decide, "FULL", 1 - 2.0**-47, "norms_after"),
        # A scale may be subnormal, with fewer bits.
        (ranges.Format, "smallest_normal", 0.0, "values"),
    ],
)
def test_the_check_finds_small_errors(
    owner: object, name: str, wrong: float, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=found):
        assert_all_groups_are_right(1, "cpu")


def test_the_draws_cover_what_matters() -> None:
    drawn = [bulk.Drawn.of(seed) for seed in range(len(bulk.LOSS_SCALES))]
    assert {one.loss_scale for one in drawn} == set(bulk.LOSS_SCALES)
    for one in drawn:
        assert set(one.kinds) == set(range(5))
        assert set(one.dtypes) == set(range(len(DTYPES)))
        assert not np.isfinite(one.wide.astype(np.float64)).all()
    assert sum(one.is_tie.sum() for one in drawn) > GROUPS // 10
