"""A strategy that makes a group larger stops where an element would be past the largest number of its dtype."""

from typing import Any

import numpy as np
import pytest
import torch

from support.contract import QUICK_BACKENDS
from support.overflow import CASES, Grow, assert_grows_as_far_as_it_fits
from tamegrad import Renormalize, normalize
from tamegrad.torch import attach


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_group_grows_as_far_as_its_dtype_allows(name: str, *, looks: bool, backend: Any) -> None:
    assert_grows_as_far_as_it_fits(name, backend, looks=looks)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_arrays_grow_as_far_as_their_dtype_allows(dtype: str) -> None:
    largest = float(np.finfo(dtype).max)
    arrays = {"out": {"weight": np.array([3.0, -4.0], dtype), "bias": np.zeros(1, dtype)}}
    after, report = normalize(arrays, Grow(largest / 3.5))
    np.testing.assert_allclose(after["out"]["weight"], np.array([0.75 * largest, -largest]), rtol=1e-3)
    assert np.isfinite(after["out"]["weight"]).all()
    assert report["out"].norm_after == pytest.approx(largest * 1.25, rel=1e-12)
    # One that fits is not limited.
    after, report = normalize(arrays, Grow(largest / 5.5))
    assert report["out"].norm_after == pytest.approx(largest / 1.1, rel=1e-3)


def test_a_step_under_a_gradient_scaler_ends_finite() -> None:
    model = torch.nn.Linear(4, 1, bias=False).half()
    torch.nn.init.constant_(model.weight, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    normalizer = attach(model, optimizer, Renormalize())
    scaler = torch.amp.GradScaler("cpu")
    inputs = torch.tensor([[0.01, 0.0, 0.0, 0.0]] * 8, dtype=torch.float16)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(inputs).float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert model.weight[0, 0].item() == pytest.approx(0.2, rel=2e-3)
    assert normalizer.report is not None
    # The largest float16 over the loss scale.
    assert normalizer.report["(root)"].norm_after == pytest.approx(65504 / 65536, rel=1e-12)
