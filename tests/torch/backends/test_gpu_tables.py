"""What the GPU backend keeps from step to step, and what it must not keep: addresses, copies, CUDA graphs."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.contract import Case
from support.gradients import model_with
from support.interpreted import MARKS, drawn, patched_once
from tamegrad import Clip, SettingError
from tamegrad.decide import Decision
from tamegrad.strategies import OnNonfinite
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.backends import gpu, kept
from tamegrad.torch.backends.gpu import GpuBackend, layout
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.memory import Memory

__all__ = ["patched_once"]

pytestmark = MARKS

GPU: Any = "gpu"


def collected(*tensors: Tensor) -> Gradients:
    return Gradients(list(tensors), Memory.of(tensors))


def backend_for(policy: object, count: int) -> GpuBackend:
    plan = GradientNormalizer(model_with([drawn(1) for _ in range(count)]), policy).plan
    return GpuBackend(plan, [True] * count)


def decided(backend: GpuBackend, gradients: Gradients) -> Decision[Any]:
    steps = torch.zeros(len(backend.plan.groups), dtype=torch.int64)
    table = backend.measure(gradients, None)
    return backend.decide(table, on_nonfinite="keep", nonfinite_steps=steps, loss_scale=None, total=None)


def test_a_group_that_keeps_its_values_is_not_written() -> None:
    # Calculating with a signaling NaN makes it quiet: a kernel that writes back what it read changes the bits.
    kept, clipped = drawn(9), drawn(9)
    backend, gradients = backend_for(Clip(0.5, per="tensor"), 2), collected(kept, clipped)
    kept.mul_(0.1)
    decision = decided(backend, gradients)
    signaling = 0x7F800001
    kept.view(torch.int32).fill_(signaling)
    backend.apply_(gradients, decision, np.array([True, True]))
    assert (kept.view(torch.int32) == signaling).all()
    assert clipped.norm().item() == pytest.approx(0.5)


def test_steps_that_overlap_do_not_mix() -> None:
    # As when threads share a normalizer. Triton's interpreter allows only one thread.
    backend = backend_for(Clip(0.5, per="tensor"), 2)
    first, second = collected(drawn(9), drawn(2000, seed=1)), collected(drawn(30, seed=2), drawn(4, seed=3).half())
    before = [values.clone() for values in first.values + second.values if values is not None]
    decisions = [decided(backend, gradients) for gradients in (first, second)]
    for gradients, decision in zip((first, second), decisions, strict=True):
        backend.apply_(gradients, decision, np.array([True, True]))
    after = [values for values in first.values + second.values if values is not None]
    for values, original in zip(after, before, strict=True):
        torch.testing.assert_close(values, original * (0.5 / original.double().norm()).item())


def test_autograd_learns_of_all_that_may_change() -> None:
    # Which gradients do change is known to the device alone.
    changed, kept = drawn(9), drawn(9, seed=1)
    versions = changed._version, kept._version
    backend, gradients = backend_for(Clip(0.5, per="tensor"), 2), collected(changed, kept)
    backend.apply_(gradients, decided(backend, gradients), np.array([True, True]))
    assert (changed._version, kept._version) == (versions[0] + 1, versions[1] + 1)


def test_memory_that_was_replaced_since_measuring_is_not_written() -> None:
    gradient = drawn(9)
    old = gradient.detach()
    backend, gradients = backend_for(Clip(0.5), 1), collected(gradient)
    decision = decided(backend, gradients)
    gradient.data = drawn(9)
    backend.apply_(gradients, decision, np.array([True]))
    assert old.equal(drawn(9))
    assert gradient.norm().item() == pytest.approx(0.5)
    gradient.data = drawn(8)
    with pytest.raises(SettingError, match="got a gradient that changed its size or dtype while it was normalized"):
        backend.apply_(gradients, decision, np.array([True]))
    assert gradient.equal(drawn(8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])  # noqa: S301
def test_a_copy_of_a_normalizer_changes_its_own_gradients_alone(copied: Any) -> None:
    normalizer = GradientNormalizer(nn.Linear(3, 2), Clip(0.5), backend=GPU)

    def step(of: GradientNormalizer, seed: int) -> list[Tensor]:
        gradients = [drawn(*parameter.shape, seed=seed) for parameter in of._step.parameters]
        for parameter, gradient in zip(of._step.parameters, gradients, strict=True):
            parameter.grad = gradient
        of.normalize_()
        assert math.hypot(*(gradient.norm() for gradient in gradients)) == pytest.approx(0.5)
        return gradients

    step(normalizer, 0)
    other = copied(normalizer)
    for seed, one, another in [(1, other, normalizer), (2, normalizer, other)]:
        kept = [parameter.grad for parameter in another._step.parameters]
        before = [None if gradient is None else gradient.clone() for gradient in kept]
        for _ in range(2):
            step(one, seed)
        for gradient, clone in zip(kept, before, strict=True):
            assert gradient is clone is None or gradient.equal(clone)


def test_the_tables_follow_gradients_that_move_change_or_are_missing() -> None:
    case = Case.of({name: {"weight": drawn(4, 4)} for name in ("first", "second")})
    normalizer = GradientNormalizer(case.model, Clip(0.5), backend=GPU)
    first, second = case.model.get_parameter("first.weight"), case.model.get_parameter("second.weight")
    held: list[Tensor] = []  # so that no address comes twice
    for step, values in enumerate([drawn(4, 4, seed=1), drawn(4, 4, seed=2), None, drawn(4, 4).T, drawn(4, 4)]):
        held += [gradient for gradient in (first.grad, second.grad) if gradient is not None]
        first.grad, second.grad = values, drawn(4, 4, seed=7 + step)
        before = [0.0 if gradient is None else gradient.norm().item() for gradient in (first.grad, second.grad)]
        report = normalizer.normalize_()
        assert report.norms.tolist() == pytest.approx(before)
        after = [0.0 if gradient is None else gradient.norm().item() for gradient in (first.grad, second.grad)]
        assert after == pytest.approx([min(norm, 0.5) for norm in before])


def test_no_gradient_at_all() -> None:
    case = Case.of({"out": {"weight": drawn(3)}})
    case.model.get_parameter("out.weight").grad = None
    with pytest.warns(UserWarning, match="nothing to normalize"):
        report = GradientNormalizer(case.model, Clip(0.5), backend=GPU).normalize_()
    assert report["out"].norm == 0


@pytest.mark.parametrize(
    ("interpreted", "device", "message"),
    [
        (False, "cpu", "got a gradient on the CPU; allowed: gradients on a GPU; next: move the model"),
        (True, "meta", "got a gradient on the device meta; allowed: gradients on the CPU, while TRITON_INTERPRET=1"),
    ],
)
def test_gradients_that_kernels_cannot_read_are_refused(
    interpreted: bool,  # noqa: FBT001
    device: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", interpreted)
    with pytest.raises(SettingError, match=message):
        GradientNormalizer(model_with([drawn(3).to(device)]), Clip(0.5), backend=GPU).normalize_()


class TestCapture:
    """What a CUDA graph allows for, as far as the host decides on it."""

    @pytest.fixture
    def capturing(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        now = [False]
        for module in (kept, layout):
            monkeypatch.setattr(module, "is_capturing", lambda: now[0])
        return now

    def test_the_first_step_is_refused(self, capturing: list[bool]) -> None:
        capturing[0] = True
        case = Case.of({"out": {"weight": drawn(3)}})
        with pytest.raises(SettingError, match=r"the first step, while a CUDA graph .*; next: run a few steps before"):
            GradientNormalizer(case.model, Clip(0.5), backend=GPU).normalize_()

    @pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
    def test_what_reads_the_device_is_refused(self, on_nonfinite: OnNonfinite, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        case = Case.of({"out": {"weight": drawn(3)}})
        with pytest.raises(SettingError, match=r'a CUDA graph is captured.*; allowed: "keep" or "zero"'):
            GradientNormalizer(case.model, Clip(0.5), on_nonfinite=on_nonfinite).normalize_()
        assert case.gradients["out"]["weight"].equal(drawn(3))

    def test_other_shapes_are_refused(self, capturing: list[bool]) -> None:
        case = Case.of({"out": {"weight": drawn(3), "bias": drawn(3)}})
        normalizer = GradientNormalizer(case.model, Clip(0.5), backend=GPU)
        normalizer.normalize_()
        case.model.get_parameter("out.bias").grad = None
        capturing[0] = True
        with pytest.raises(SettingError, match="a step with gradients of other shapes"):
            normalizer.normalize_()

    def test_addresses_of_a_capture_are_used_in_it_alone(self, capturing: list[bool]) -> None:
        parameter = torch.nn.Parameter(torch.zeros(3))
        normalizer = GradientNormalizer([("out.weight", parameter)], Clip(0.5), backend=GPU)
        outside, inside, again = drawn(3), drawn(3, seed=1), drawn(3, seed=2)
        for captured, gradient in [(False, outside), (True, inside), (False, outside)]:
            capturing[0] = captured
            gradient.mul_(100)
            parameter.grad = gradient
            normalizer.normalize_()
            assert gradient.norm().item() == pytest.approx(0.5)
        capturing[0] = True
        for gradient, allowed in [(inside, True), (again, False)]:
            parameter.grad = gradient
            if allowed:
                normalizer.normalize_()
                continue
            with pytest.raises(SettingError, match="a second step with other addresses"):
                normalizer.normalize_()


def test_alternating_sets_of_gradients_make_each_layout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a mixture of experts.
    made: list[int] = []

    class Counted(layout.Layout):
        def __init__(self, facts: Any, groups: int, device: torch.device) -> None:
            made.append(len(facts))
            super().__init__(facts, groups, device)

    monkeypatch.setattr(gpu, "Layout", Counted)
    model = model_with([drawn(4, seed=seed) for seed in range(4)])
    parameters = list(model.parameters())
    normalizer = GradientNormalizer(model, Clip(0.5, per="tensor"), backend=GPU)
    for step in range(6):
        for index, parameter in enumerate(parameters):
            parameter.grad = drawn(4, seed=10 * step + index) if (index + step) % 3 else None
        before = [0.0 if p.grad is None else p.grad.norm().item() for p in parameters]
        assert normalizer.normalize_().norms.tolist() == pytest.approx(before)
    assert len(made) == 3
