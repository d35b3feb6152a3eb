"""The plain backend on devices without float64, as if the CPU were one."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.contract import Case, every_strategy
from support.gradients import model_with, random_gradients
from tamegrad import Clip, ClipValue, Renormalize, normalize
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.backends import select, tensorwise
from tamegrad.torch.backends.foreach import ForeachBackend, float32
from tamegrad.torch.memory import DTYPES

FOREACH: Any = "foreach"
FLOAT32 = [torch.float16, torch.bfloat16, torch.float32, torch.complex64]
# A norm is off by 1e-6 at most, and so is a scale; then a value is rounded to its dtype.
ALLOWED = 1e-6


@pytest.fixture(autouse=True)
def _without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForeachBackend, "_kind_of", lambda self, _: self._in_float32)
    monkeypatch.setattr(tensorwise, "HOST_PIECE", 2**14)


def assert_close(case: Case, strategy: Any, on_nonfinite: OnNonfinite = "keep") -> None:
    expected, told = normalize(case.arrays, strategy, on_nonfinite=on_nonfinite)
    report = GradientNormalizer(case.model, strategy, on_nonfinite=on_nonfinite, backend=FOREACH).normalize_()
    for name in ("norms", "scales", "norms_after", "total_norm"):
        np.testing.assert_allclose(getattr(report, name), getattr(told, name), rtol=ALLOWED, err_msg=name)
    assert report.nonfinite.tolist() == told.nonfinite.tolist()
    for layer, types in case.gradients.items():
        for kind, gradient in types.items():
            wanted = torch.from_numpy(np.asarray(expected[layer][kind])).to(gradient.dtype)
            info = torch.finfo(gradient.dtype)
            rtol, atol = 2 * ALLOWED + info.eps, info.smallest_normal * info.eps
            torch.testing.assert_close(gradient, wanted, rtol=rtol, atol=atol, equal_nan=True)


CASES: list[tuple[float, float | None, OnNonfinite]] = [
    (0.0, None, "keep"),
    (-0.9, None, "zero"),
    (0.85, None, "keep"),
    (0.0, math.nan, "zero"),
    (0.0, -math.inf, "keep"),
]


@pytest.mark.parametrize("dtype", FLOAT32, ids=str)
@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
def test_the_contract_to_six_digits(strategy: Strategy, dtype: torch.dtype) -> None:
    power, nonfinite, on_nonfinite = CASES[(DTYPES.index(dtype) + len(str(strategy))) % len(CASES)]
    magnitude = torch.finfo(dtype).max ** power
    first, second, third = (values.mul_(magnitude) for values in random_gradients((63, 1, 30), dtype))
    gradients = {"first": {"weight": first.view(7, 9), "scale": second.view(())}, "second": {"weight": third}}
    if nonfinite is not None:
        first[3] = nonfinite
    assert_close(Case.of(gradients), strategy, on_nonfinite)


@pytest.mark.parametrize("count", [1, 1025, 100_003, 300_000])
@pytest.mark.parametrize("magnitude", [1e-42, 1e-20, 1.0, 1e37])
@pytest.mark.parametrize("constant", [False, True])
def test_norms_are_right_to_six_digits(count: int, magnitude: float, *, constant: bool) -> None:
    (values,) = random_gradients((count,), torch.float32)
    # Adding up the same square again and again rounds the same way again and again.
    gradient = (torch.full((count,), 0.1) if constant else values) * magnitude
    expected = gradient.double().norm().item()
    report = GradientNormalizer(model_with([gradient]), Clip(1e300), backend=FOREACH).normalize_()
    assert report.norms.item() == pytest.approx(expected, rel=ALLOWED)


def test_one_large_value_beside_many_small_ones() -> None:
    gradient = torch.full((100_000,), 1e-3)
    gradient[77] = 3e38
    report = GradientNormalizer(model_with([gradient]), Clip(1e300), backend=FOREACH).normalize_()
    assert report.norms.item() == pytest.approx(3e38, rel=ALLOWED)


@pytest.mark.parametrize(("magnitude", "threshold"), [(1e-40, 1.0), (3e38, 1e-31), (1e-38, 3e38), (1.0, 1e-300)])
def test_scales_that_no_float32_holds(magnitude: float, threshold: float) -> None:
    gradient = torch.tensor([1.0, 0.0, -1.0]) * magnitude
    strategy = Renormalize() if threshold == 1.0 else Clip(threshold)
    assert_close(Case.of({"out": {"weight": gradient}}), strategy)


@pytest.mark.parametrize("scale", [4.0, 65536.0])
@pytest.mark.parametrize("strategy", [Renormalize(), ClipValue(0.01)], ids=str)
def test_under_a_loss_scale(strategy: Any, scale: float) -> None:
    gradient = torch.tensor([3.0, 4.0]) * scale
    GradientNormalizer(model_with([gradient]), strategy, backend=FOREACH)._normalize(torch.tensor(scale))
    expected = [0.6, 0.8] if strategy == Renormalize() else [0.01, 0.01]
    assert (gradient / scale).tolist() == pytest.approx(expected, rel=ALLOWED)


def test_a_group_that_keeps_its_values_is_not_written() -> None:
    kept, clipped = torch.ones(3), torch.full((3,), 9.0)
    GradientNormalizer(model_with([kept, clipped]), Clip(3.0, per="tensor"), backend=FOREACH).normalize_()
    assert (kept._version, clipped._version) == (0, 1)


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A parameter on Apple's GPU, as far as a selection looks, on a machine that has one."""

    def refused(*_: Any, device: torch.device, **__: Any) -> Tensor:
        assert device.type == "mps"
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    float32.has_float64.cache_clear()
    monkeypatch.setattr(torch, "ones", refused)
    yield SimpleNamespace(device=torch.device("mps", 0))
    float32.has_float64.cache_clear()


def test_the_backend_says_that_a_device_has_no_float64(mps: Any) -> None:
    said = "there is no float64 on mps:0: norms are right to 1e-6"
    assert str(select("auto", [mps])) == f"foreach (the only parameter is on mps:0; {said})"
    assert str(select("foreach", [mps])) == f"foreach (as asked; {said})"
    assert float32.table_device(mps.device) == torch.device("cpu")


def test_other_devices_calculate_in_float64() -> None:
    for device in ("cpu", "cuda", "meta"):
        assert float32.has_float64(torch.device(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("strategy", [Clip(0.5), ClipValue(0.1)], ids=str)
def test_another_default_device_changes_nothing(strategy: Any, dtype: torch.dtype) -> None:
    case = Case.of({"out": {"weight": random_gradients((63,), dtype)[0]}})
    with torch.device("meta"):
        report = GradientNormalizer(case.model, strategy, backend=FOREACH).normalize_()
    expected, told = normalize(case.arrays, strategy)
    assert report.norms_after.item() == pytest.approx(told.norms_after.item(), rel=ALLOWED)
    wanted = torch.from_numpy(np.asarray(expected["out"]["weight"])).to(dtype)
    torch.testing.assert_close(case.gradients["out"]["weight"], wanted)
