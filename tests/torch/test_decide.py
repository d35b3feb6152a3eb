"""Deciding is written for NumPy and PyTorch at once, and compiled for the CPU: all three decide the same."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from support.contract import DECIDED
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE, Decision, Thresholds, _decide, decide
from tamegrad.torch.kernels.cpu_decide import Kept, decide_compiled

GROUPS = 300


def random_table(ranges: tuple[int, ...]) -> tuple[Tensor, Thresholds]:
    """Sums in some of the three ranges, zeros among them, with some groups not finite and some cut."""
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(GROUPS, COLUMNS, dtype=torch.float64)
    for columns in (BEFORE, AFTER):
        for column in ranges:
            values = 10 ** torch.empty(GROUPS, dtype=torch.float64).uniform_(-8, 8, generator=generator)
            some = torch.rand(GROUPS, generator=generator) < 0.5
            table[:, columns][:, column] = torch.where(some, values, 0)
    table[::7, NONFINITE.start] = 1
    table[::5, CUT] = 3
    thresholds = Thresholds(
        norms=10 ** torch.empty(GROUPS, dtype=torch.float64).uniform_(-4, 4, generator=generator),
        values=torch.full((GROUPS,), 0.5, dtype=torch.float64),
        renormalizes=torch.rand(GROUPS, generator=generator) < 0.5,
    )
    return table, thresholds


@pytest.mark.parametrize("on_nonfinite", get_args(OnNonfinite))
@pytest.mark.parametrize("ranges", [(1,), (0, 1, 2)])
def test_decides_the_same_on_the_host_and_on_a_device(on_nonfinite: OnNonfinite, ranges: tuple[int, ...]) -> None:
    table, thresholds = random_table(ranges)
    vectors = table, thresholds.norms, thresholds.values, thresholds.renormalizes
    steps = torch.full((GROUPS,), 5)
    on_host = decide(table, thresholds, on_nonfinite, steps)
    assert steps.equal(5 + (table[:, NONFINITE].sum(1) > 0))
    on_device = Decision(*_decide(torch, on_nonfinite, *vectors))
    for name in DECIDED:
        host, device = getattr(on_host, name), getattr(on_device, name)
        assert host.dtype == device.dtype, name
        # Their square roots and hypotenuses may be a rounding apart.
        np.testing.assert_allclose(host.numpy(), device.numpy(), rtol=1e-15, err_msg=name)


@pytest.mark.parametrize("on_nonfinite", get_args(OnNonfinite))
@pytest.mark.parametrize("ranges", [(1,), (0,), (2,), (0, 1), (0, 1, 2), ()])
def test_compiled_code_decides_the_same_to_the_bit(on_nonfinite: OnNonfinite, ranges: tuple[int, ...]) -> None:
    table, thresholds = random_table(ranges)
    # What sums of NaN and infinities give, and norms that one float64 scale cannot bring to the threshold.
    table[0, :3] = torch.tensor([0.0, math.nan, math.inf])
    table[7, :3] = torch.tensor([0.0, math.nan, 0.0])
    table[14, NONFINITE] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    table[1:4, BEFORE], table[4, BEFORE] = torch.tensor([1e-290, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1e290])
    thresholds.norms[1], thresholds.norms[4], thresholds.norms[8] = 1e300, 1e-300, math.inf
    thresholds.norms[9], thresholds.renormalizes[9] = table[9, 1].sqrt(), True
    ours, theirs = torch.full((GROUPS,), 5), torch.full((GROUPS,), 5)
    compiled = decide_compiled(table, thresholds, on_nonfinite, ours)
    expected = decide(table, thresholds, on_nonfinite, theirs)
    assert ours.equal(theirs)
    for name in DECIDED:
        ours, theirs = getattr(compiled, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=name)
    assert compiled.may_change == bool(expected.changed.any())
    assert compiled.may_be_nonfinite


def test_groups_that_are_all_kept_are_decided_the_same_to_the_bit() -> None:
    table = torch.zeros(GROUPS, COLUMNS, dtype=torch.float64)
    table[1:, 1] = torch.rand(GROUPS - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    infinite = torch.full((GROUPS,), math.inf, dtype=torch.float64)
    thresholds = Thresholds(infinite, infinite, torch.zeros(GROUPS, dtype=torch.bool))
    expected = decide(table, thresholds, "keep", torch.zeros(GROUPS, dtype=torch.int64))
    kept = Kept(np.append(expected.norms.numpy(), expected.total_norm.numpy()))
    assert not kept.may_change
    assert not kept.may_be_nonfinite
    for name in DECIDED:
        ours, theirs = getattr(kept, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=name)


@pytest.mark.parametrize("on_nonfinite", get_args(OnNonfinite))
def test_compiled_code_knows_when_there_is_nothing_to_do(on_nonfinite: OnNonfinite) -> None:
    table = torch.zeros(3, COLUMNS, dtype=torch.float64)
    table[:, 1] = torch.tensor([0.0, 1.0, 4.0])
    infinite = torch.full((3,), math.inf, dtype=torch.float64)

    def decided(largest: float) -> Decision:
        thresholds = Thresholds(torch.full_like(infinite, largest), infinite, torch.zeros(3, dtype=torch.bool))
        return decide_compiled(table, thresholds, on_nonfinite, torch.zeros(3, dtype=torch.int64))

    assert not decided(2.0).may_change
    assert decided(1.9).may_change
    assert not decided(2.0).may_be_nonfinite
    table[0, NONFINITE.start + 2] = 1
    assert decided(2.0).may_be_nonfinite
    assert decided(2.0).may_change == (on_nonfinite == "zero")
