"""Optimizers around another optimizer, in timm, torch_optimizer and pytorch_optimizer."""

from typing import Any, Literal

import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch_optimizer
from pytorch_optimizer.optimizer.fp16 import SafeFP16Optimizer

from support.ecosystem import (
    POLICY,
    TOLERANCE,
    Recorder,
    a_batch,
    a_model,
    by_reference,
    loss_of,
    step_by_hand,
    timm_optim,
)
from tamegrad import ClipValue, SettingError, TamegradWarning
from tamegrad.torch import attach

# The wrapper keeps the norm of each tensor, so that its order with other strategies makes no difference.
ELEMENTS = ClipValue(0.001)
LEAVE_GRADIENTS = [
    pytorch_optimizer.Lookahead,
    pytorch_optimizer.Magma,
    pytorch_optimizer.PCGrad,
    pytorch_optimizer.ScheduleFreeWrapper,
    pytorch_optimizer.TRAC,
]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.parametrize(("library", "attribute"), [("timm", "_base_optimizer"), ("torch_optimizer", "optimizer")])
def test_a_wrapper_that_bypasses_hooks_is_refused_and_the_one_inside_is_not(library: str, attribute: str) -> None:
    wrapper = timm_optim().Lookahead if library == "timm" else torch_optimizer.Lookahead
    model = a_model()
    outer = wrapper(sgd(model))
    with pytest.raises(SettingError, match=rf"optimizer\.{attribute}\b"):
        attach(model, outer, POLICY)
    inner = getattr(outer, attribute)
    normalizer = attach(model, inner, POLICY)
    recorder = Recorder(model.named_parameters(), inner)
    for closure in (False, True, True):
        step_by_hand(model, outer, recorder, closure=closure)
    recorder.check(steps=3)
    assert normalizer.steps == 3


def test_a_wrapper_that_got_its_hooks_from_zero_grad_is_attached_to() -> None:
    model = a_model()
    outer = timm_optim().Lookahead(sgd(model))
    outer.zero_grad()
    normalizer = attach(model, outer, POLICY)
    recorder = Recorder(model.named_parameters(), outer._base_optimizer)
    for closure in (False, True, True):
        step_by_hand(model, outer, recorder, closure=closure)
    recorder.check(steps=3)
    assert normalizer.steps == 3


@pytest.mark.parametrize("wrapper", LEAVE_GRADIENTS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_a_wrapper_that_runs_hooks_is_attached_to(wrapper: Any, *, inside: bool, closure: bool) -> None:
    model = a_model()
    inner = sgd(model)
    outer = wrapper(inner)
    normalizer = attach(model, inner if inside else outer, POLICY)
    recorder = Recorder(model.named_parameters(), inner)
    if hasattr(outer, "train"):
        outer.train()
    for _ in range(3):
        step_by_hand(model, outer, recorder, closure=closure)
    recorder.check(steps=3)
    assert normalizer.steps == 3


def test_projected_gradients_of_several_losses_are_normalized() -> None:
    model = a_model()
    optimizer = pytorch_optimizer.PCGrad(sgd(model))
    normalizer = attach(model, optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), optimizer.optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward([loss_of(model), model(a_batch()).sum()])
        recorder.backward_is_done()
        optimizer.step()
    recorder.check(steps=2)
    assert normalizer.steps == 2


def orthogonal_step(normalize: Literal["outermost", "innermost"] | None) -> Recorder:
    """One step of a wrapper that makes gradients orthogonal to the parameters; None does not attach."""
    model = a_model()
    optimizer = pytorch_optimizer.OrthoGrad(sgd(model))
    if normalize is not None:
        attach(model, optimizer, ELEMENTS, normalize=normalize)
    recorder = Recorder(model.named_parameters(), optimizer.optimizer)
    step_by_hand(model, optimizer, recorder)
    return recorder


def test_what_a_wrapper_makes_of_gradients_can_be_normalized_last() -> None:
    ((_, orthogonal),) = orthogonal_step(normalize=None).steps
    ((_, innermost),) = orthogonal_step(normalize="innermost").steps
    ((_, outermost),) = orthogonal_step(normalize="outermost").steps
    expected = by_reference(orthogonal, ELEMENTS)
    for name, gradient in innermost.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=TOLERANCE)
    assert any(np.abs(gradient).max() > ELEMENTS.threshold for gradient in outermost.values())


def test_a_wrapper_that_changes_gradients_warns_of_the_choice() -> None:
    model = a_model()
    optimizer = pytorch_optimizer.OrthoGrad(sgd(model))
    attach(model, optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), optimizer.optimizer)
    with pytest.warns(TamegradWarning, match="innermost"):
        step_by_hand(model, optimizer, recorder)


def test_copies_in_float32_are_attached_to_by_name() -> None:
    model = a_model()
    inner = sgd(model)
    outer = SafeFP16Optimizer(inner)
    with pytest.raises(SettingError, match=r"optimizer\.optimizer"):
        attach(model, outer, POLICY)
    names = [name for name, _ in model.named_parameters()]
    copies = list(zip(names, outer.fp32_params, strict=True))
    normalizer = attach(copies, inner, POLICY)
    recorder = Recorder(copies, inner)
    for _ in range(2):
        outer.zero_grad()
        outer.backward(loss_of(model))
        outer.update_main_grads()
        recorder.backward_is_done()
        outer.step()
    recorder.check(steps=2)
    assert normalizer.steps == 2
