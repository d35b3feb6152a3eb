from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_optimizer
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DummyOptim
from accelerate.utils.megatron_lm import MegatronLMOptimizerWrapper

from support.ecosystem import POLICY, Recorder, a_model, loss_of, step_by_hand, timm_optim
from tamegrad import SettingError
from tamegrad.torch import attach


@pytest.fixture
def prepared() -> Iterator[Any]:
    """Returns what prepares a model and its optimizer; Accelerate keeps the state of a process for all tests."""

    def prepare(**settings: Any) -> tuple[Accelerator, Any, torch.optim.Optimizer, AcceleratedOptimizer]:
        accelerator = Accelerator(cpu=True, **settings)
        plain = a_model()
        inner = torch.optim.SGD(plain.parameters(), lr=0.1)
        model, outer = accelerator.prepare(plain, inner)
        return accelerator, model, inner, outer

    yield prepare
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("closure", [False, True])
def test_attaches_to_the_optimizer_inside(prepared: Any, *, closure: bool) -> None:
    _, model, inner, outer = prepared()
    normalizer = attach(model, outer, POLICY)
    recorder = Recorder(model.named_parameters(), inner)
    for _ in range(3):
        step_by_hand(model, outer, recorder, closure=closure)
    recorder.check(steps=3)
    assert normalizer.steps == 3
    assert normalizer.report is not None
    assert normalizer.report["0"].clipped
    assert normalizer.report["0"].norm_after == pytest.approx(0.01)


def test_a_second_normalizer_is_refused_through_either(prepared: Any) -> None:
    _, model, inner, outer = prepared()
    first = attach(model, outer, POLICY)
    for optimizer in (outer, inner):
        with pytest.raises(SettingError, match="has a normalizer already"):
            attach(model, optimizer, POLICY)
    first.detach()
    attach(model, inner, POLICY)
    with pytest.raises(SettingError, match="has a normalizer already"):
        attach(model, outer, POLICY)


def test_accumulated_gradients_are_normalized_once_a_step(prepared: Any) -> None:
    accelerator, model, inner, outer = prepared(gradient_accumulation_steps=2)
    normalizer = attach(model, outer, POLICY)
    recorder = Recorder(model.named_parameters(), inner)
    for _ in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model))
            recorder.backward_is_done()
            outer.step()
            outer.zero_grad()
    recorder.check(steps=2)
    assert normalizer.steps == 2


def test_a_loss_scale_is_no_part_of_the_norms(prepared: Any) -> None:
    _, model, inner, _ = prepared()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    outer = AcceleratedOptimizer(inner, scaler=scaler)
    normalizer = attach(model, outer, POLICY)
    recorder = Recorder(model.named_parameters(), inner)
    for _ in range(2):
        outer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(inner)
        recorder.backward_is_done()
        outer.step()
    recorder.check(steps=2)
    assert normalizer.steps == 2


def test_a_wrapper_in_a_wrapper_is_attached_to_inside_both(prepared: Any) -> None:
    accelerator, model, inner, _ = prepared()
    outer = accelerator.prepare_optimizer(pytorch_optimizer.Lookahead(inner))
    normalizer = attach(model, outer, POLICY)
    recorder = Recorder(model.named_parameters(), inner)
    for _ in range(3):
        step_by_hand(model, outer, recorder)
    recorder.check(steps=3)
    assert normalizer.steps == 3


def test_says_where_the_optimizer_is_in_a_wrapper_in_a_wrapper(prepared: Any) -> None:
    accelerator, model, inner, _ = prepared()
    outer = accelerator.prepare_optimizer(timm_optim().Lookahead(inner))
    with pytest.raises(SettingError, match=r"optimizer\.optimizer\._base_optimizer"):
        attach(model, outer, POLICY)
    attach(model, outer.optimizer._base_optimizer, POLICY)


@pytest.mark.parametrize("wrapper", [DeepSpeedOptimizerWrapper, MegatronLMOptimizerWrapper])
def test_wrappers_whose_step_does_nothing_are_refused(prepared: Any, wrapper: Any) -> None:
    _, model, inner, _ = prepared()
    with pytest.raises(SettingError, match=wrapper.__name__):
        attach(model, wrapper(inner), POLICY)
    attach(model, inner, POLICY)


def test_the_optimizer_that_deepspeed_replaces_is_refused() -> None:
    model = a_model()
    with pytest.raises(SettingError, match="gradient_clipping"):
        attach(model, DummyOptim(model.parameters()), POLICY)
