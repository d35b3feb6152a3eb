"""Deciding is written once for NumPy, which the host uses, and for PyTorch, which devices use."""

from typing import get_args

import numpy as np
import pytest
import torch

from tamegrad.strategies import OnNonfinite
from tamegrad.torch.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE, Decision, Thresholds, _decide, decide


@pytest.mark.parametrize("on_nonfinite", get_args(OnNonfinite))
@pytest.mark.parametrize("ranges", [(1,), (0, 1, 2)])
def test_decides_the_same_on_the_host_and_on_a_device(on_nonfinite: OnNonfinite, ranges: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = 200
    table = torch.zeros(groups, COLUMNS, dtype=torch.float64)
    for columns in (BEFORE, AFTER):
        for column in ranges:
            values = 10 ** torch.empty(groups, dtype=torch.float64).uniform_(-8, 8, generator=generator)
            some = torch.rand(groups, generator=generator) < 0.5
            table[:, columns][:, column] = torch.where(some, values, 0)
    table[::7, NONFINITE.start] = 1
    table[::5, CUT] = 3
    thresholds = Thresholds(
        norms=10 ** torch.empty(groups, dtype=torch.float64).uniform_(-4, 4, generator=generator),
        values=torch.full((groups,), 0.5, dtype=torch.float64),
        renormalizes=torch.rand(groups, generator=generator) < 0.5,
    )
    vectors = table, thresholds.norms, thresholds.values, thresholds.renormalizes
    on_host = decide(table, thresholds, on_nonfinite)
    on_device = Decision(*_decide(torch, on_nonfinite, *vectors))
    for name in Decision.__slots__:
        host, device = getattr(on_host, name), getattr(on_device, name)
        assert host.dtype == device.dtype, name
        np.testing.assert_allclose(host.numpy(), device.numpy(), rtol=1e-15, err_msg=name)
