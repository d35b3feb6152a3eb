"""Before the Triton kernels are used on a GPU they are tried there; if they fail, `auto` says why and falls back."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from support.interpreted import MARKS, patched_once
from tamegrad import SettingError
from tamegrad.torch.backends import select, selection
from tamegrad.torch.backends.gpu import GpuBackend, trial
from tamegrad.torch.backends.gpu.trial import problem_on

__all__ = ["patched_once"]

pytestmark = MARKS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    problem_on.cache_clear()
    yield
    problem_on.cache_clear()


class OnGpu:
    """A parameter on a GPU, as far as a selection looks."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)


def on_gpus(*indices: int) -> list[Any]:
    return [OnGpu(index) for index in indices]


def test_the_kernels_pass_where_they_are_right() -> None:
    assert problem_on(CPU) is None


def test_wrong_norms_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = GpuBackend.measure
    monkeypatch.setattr(GpuBackend, "measure", lambda *args: measure(*args) * (1 + 1e-9))
    assert problem_on(CPU) == "wrong numbers: norms differs from what PyTorch's operations give"


def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = GpuBackend.apply_

    def slightly_off(self: Any, gradients: Any, decision: Any, changed: Any) -> None:
        apply(self, gradients, decision, changed)
        values: Tensor = gradients.values[2]
        values.mul_(1 + 1e-6)

    monkeypatch.setattr(GpuBackend, "apply_", slightly_off)
    assert problem_on(CPU) == "wrong numbers: layer.2 differs from what PyTorch's operations give"


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler.\nSet CC"), KeyError("sm_999"), OSError()])
def test_whatever_a_compiler_raises_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(GpuBackend, "measure", failing)
    problem = problem_on(CPU)
    assert problem is not None
    assert problem.startswith(type(error).__name__)
    assert "\n" not in problem
    # It is kept.
    monkeypatch.undo()
    assert problem_on(CPU) == problem


def test_auto_does_not_take_the_kernels_before_a_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "problem_on", None)
    assert str(select("auto", on_gpus(0, 0))) == (
        "foreach (the 2 parameters are on cuda:0, and no run on a GPU has confirmed the Triton kernels yet)"
    )


class TestOnceAllowed:
    """What `auto` does when a run on a GPU has confirmed the kernels."""

    @pytest.fixture(autouse=True)
    def _allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(selection, "AUTO_TAKES_TRITON", True)

    def test_auto_takes_kernels_that_pass_on_all_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tried: list[torch.device] = []
        monkeypatch.setattr(trial, "problem_on", tried.append)
        assert str(select("auto", on_gpus(0, 1, 0))) == "gpu (the 3 parameters are on cuda:0, cuda:1)"
        assert tried == [torch.device("cuda", 0), torch.device("cuda", 1)]

    def test_auto_says_why_it_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trial, "problem_on", lambda device: "RuntimeError: no C compiler" if device.index else None)
        assert str(select("auto", on_gpus(0, 1))) == (
            "foreach (the 2 parameters are on cuda:0, cuda:1, but the Triton kernels cannot be used: "
            "RuntimeError: no C compiler (on cuda:1))"
        )

    def test_auto_says_that_triton_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(selection, "_problem_with", lambda _: ImportError("No module named 'triton'"))
        assert "cannot be used: No module named 'triton'" in select("auto", on_gpus(0)).reason

    def test_other_devices_are_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trial, "problem_on", None)
        parameters = [*on_gpus(0), torch.zeros(1)]
        assert str(select("auto", parameters)) == "foreach (the 2 parameters are on cpu, cuda:0)"


def test_kernels_that_fail_are_refused_where_they_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "problem_on", lambda _: "KeyError: 'sm_999'")
    with pytest.raises(SettingError, match=r"failed their trial: KeyError: 'sm_999' \(on cuda:0\); .*\"foreach\""):
        select("gpu", on_gpus(0))
    # On the CPU, the interpreter runs them.
    assert select("gpu", [torch.zeros(1)]).name == "gpu"
