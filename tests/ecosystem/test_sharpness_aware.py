"""Sharpness-aware optimizers, which take two passes a step, the second at other parameters."""

from typing import Any

import pytest
import pytorch_optimizer
import torch

from support.ecosystem import POLICY, Recorder, a_batch, a_model, loss_of
from tamegrad import TamegradWarning
from tamegrad.torch import attach


def evaluated(model: torch.nn.Module, optimizer: Any, recorder: Recorder) -> Any:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    recorder.backward_is_done()
    return loss


@pytest.mark.parametrize("kind", [pytorch_optimizer.SAM, pytorch_optimizer.FriendlySAM])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_the_gradient_of_the_second_pass_is_normalized(kind: Any, *, closure: bool, inside: bool) -> None:
    model = a_model()
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.01)
    normalizer = attach(model, optimizer.base_optimizer if inside else optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), optimizer.base_optimizer)
    for _ in range(3):
        evaluated(model, optimizer, recorder)
        if closure:
            optimizer.step(lambda: evaluated(model, optimizer, recorder))
        else:
            optimizer.first_step(zero_grad=True)
            evaluated(model, optimizer, recorder)
            optimizer.second_step()
    recorder.check(steps=3)
    assert normalizer.steps == 3
    assert normalizer.report is not None
    assert normalizer.report["0"].clipped


def a_mixing_optimizer(name: str, model: Any) -> Any:
    """Makes an optimizer that mixes the gradients of both passes."""
    if name == "WSAM":
        return pytorch_optimizer.WSAM(model, model.parameters(), torch.optim.SGD, lr=0.01, decouple=False)
    if name == "LookSAM":
        return pytorch_optimizer.LookSAM(model.parameters(), torch.optim.SGD, lr=0.01)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = pytorch_optimizer.ProportionScheduler(torch.optim.lr_scheduler.ConstantLR(base), 0.1, 0.01)
    return pytorch_optimizer.GSAM(model.parameters(), base, model, schedule)


@pytest.mark.parametrize("name", ["GSAM", "LookSAM", "WSAM"])
def test_an_optimizer_that_mixes_both_gradients_warns_of_the_choice(name: str) -> None:
    model = a_model()
    optimizer = a_mixing_optimizer(name, model)
    attach(model, optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), optimizer.base_optimizer)

    @torch.enable_grad()
    def closure() -> Any:
        loss = evaluated(model, optimizer, recorder)
        return (None, loss) if name == "GSAM" else loss

    def two_steps() -> None:
        for _ in range(2):  # LookSAM mixes what the first step stored into the second
            optimizer.step(closure)

    evaluated(model, optimizer, recorder)
    with pytest.warns(TamegradWarning, match="innermost"):
        two_steps()


@pytest.mark.parametrize("name", ["GSAM", "LookSAM", "WSAM"])
def test_what_an_optimizer_mixes_can_be_normalized_last(name: str) -> None:
    model = a_model()
    optimizer = a_mixing_optimizer(name, model)
    normalizer = attach(model, optimizer, POLICY, normalize="innermost")
    recorder = Recorder(model.named_parameters(), optimizer.base_optimizer)

    @torch.enable_grad()
    def closure() -> Any:
        loss = evaluated(model, optimizer, recorder)
        return (None, loss) if name == "GSAM" else loss

    evaluated(model, optimizer, recorder)
    optimizer.step(closure)
    ((_, found),) = recorder.steps
    layers = [[found[f"{layer}.weight"], found[f"{layer}.bias"]] for layer in (0, 2)]
    for gradients in layers:
        norm = torch.cat([torch.from_numpy(gradient).ravel() for gradient in gradients]).norm()
        assert norm.item() == pytest.approx(0.01)
    assert normalizer.steps == 1


def test_a_step_without_a_closure_that_evaluates_the_model_itself_can_be_normalized_last() -> None:
    model = a_model()
    optimizer = a_mixing_optimizer("GSAM", model)
    normalizer = attach(model, optimizer, POLICY, normalize="innermost")
    for _ in range(2):
        optimizer.set_closure(lambda output, _: (50 * output).square().mean(), a_batch(), None)
        optimizer.step()
        assert normalizer.report is not None
        assert normalizer.report["0"].norm_after == pytest.approx(0.01)
    assert normalizer.steps == 2


def test_both_evaluations_of_a_closure_are_normalized() -> None:
    model = a_model()
    optimizer = pytorch_optimizer.BSAM(model.parameters(), num_data=5, lr=0.01)
    normalizer = attach(model, optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), optimizer)
    evaluated(model, optimizer, recorder)
    optimizer.step(lambda: evaluated(model, optimizer, recorder))
    recorder.check(steps=2)
    assert normalizer.steps == 1
    assert normalizer.report is not None
    assert normalizer.report["0"].clipped
