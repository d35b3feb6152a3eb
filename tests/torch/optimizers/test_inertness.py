"""A normalizer that is attached to an optimizer whose `step` nobody calls says so."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from support.compiling import compile_counter, reset_compiler
from tamegrad import Clip, TamegradWarning
from tamegrad.torch import AttachedNormalizer, attach

MESSAGE = r"no step\(\) of the SGD that tamegrad is attached to was seen"


def a_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def backward(model: nn.Module) -> None:
    model(torch.ones(5, 3)).square().sum().backward()


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(1e-9)


def attached(**settings: Any) -> tuple[Any, torch.optim.Optimizer, AttachedNormalizer]:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    return model, optimizer, attach(model, optimizer, Clip(1.0), **settings)


def test_ten_changes_without_a_step_warn_once_at_the_line_that_attached() -> None:
    model, _, normalizer = attached()
    for _ in range(10):
        backward(model)
        change(model)
    with pytest.warns(TamegradWarning, match=MESSAGE) as seen:
        backward(model)
    assert seen[0].filename == __file__
    for _ in range(20):
        backward(model)
        change(model)
    assert normalizer.report is None
    assert normalizer.steps == 0


def test_asking_for_the_report_after_two_changes_warns() -> None:
    model, _, normalizer = attached()
    for _ in range(2):
        assert normalizer.report is None
        backward(model)
        change(model)
    with pytest.warns(TamegradWarning, match=MESSAGE):
        assert normalizer.report is None


def test_an_optimizer_that_bypasses_its_hooks_is_noticed() -> None:
    model, optimizer, _ = attached()
    bypass: Any = type(optimizer).step
    for _ in range(10):
        backward(model)
        bypass.__wrapped__(optimizer)
    with pytest.warns(TamegradWarning, match=MESSAGE):
        backward(model)


def step_often(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(15):
        backward(model)
        optimizer.step()


def attack_the_embedding(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # Adversarial training changes parameters a few times before each step.
    for _ in range(5):
        for _ in range(4):
            backward(model)
            change(model)
        backward(model)
        optimizer.step()


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(40):
        backward(model)
    optimizer.step()


def load_a_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer
    model.load_state_dict(a_model().state_dict())
    change(model)
    backward(model)
    change(model)


class Searching(torch.optim.SGD):
    """Evaluates the model and changes the parameters several times in each step, without a closure."""

    model: nn.Module

    def step(self, closure: Any = None) -> Any:
        for _ in range(5):
            backward(self.model)
            change(self.model)
        return super().step(closure)


def evaluate_inside_the_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer
    searching = Searching(model.parameters(), lr=1e-9)
    searching.model = model
    normalizer = attach(model, searching, Clip(1.0), normalize="innermost")
    for _ in range(3):
        searching.step()
        assert normalizer.report is not None


def evaluate_a_closure_often(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer
    lbfgs: Any = torch.optim.LBFGS(model.parameters(), max_iter=30, tolerance_grad=0, tolerance_change=0)
    attach(model, lbfgs, Clip(1.0))

    def closure() -> Any:
        lbfgs.zero_grad()
        loss = model(torch.ones(5, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        lbfgs.step(closure)


@pytest.mark.parametrize(
    "train",
    [
        step_often,
        attack_the_embedding,
        accumulate,
        load_a_checkpoint,
        evaluate_inside_the_step,
        evaluate_a_closure_often,
    ],
)
def test_what_people_do_between_steps_does_not_warn(train: Any) -> None:
    model, optimizer, normalizer = attached()
    if train in {evaluate_a_closure_often, evaluate_inside_the_step}:
        normalizer.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
        assert normalizer.report is None or normalizer.steps > 0


def test_after_detach_nothing_is_watched() -> None:
    model, _, normalizer = attached()
    normalizer.detach()
    for _ in range(20):
        backward(model)
        change(model)
    assert normalizer.report is None


def test_a_model_without_trained_parameters_is_not_watched() -> None:
    model = a_model().requires_grad_(requires_grad=False)
    normalizer = attach(model, torch.optim.SGD(model.parameters()), Clip(1.0))
    assert normalizer.report is None


def test_parameters_that_replace_others_are_watched_from_the_next_step_on() -> None:
    model, optimizer, normalizer = attached()
    backward(model)
    optimizer.step()
    old = weakref.ref(model[1].weight)
    model[1] = nn.Linear(4, 2)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    backward(model)
    optimizer.step()
    optimizer.state.clear()
    gc.collect()
    assert old() is None
    for _ in range(10):
        backward(model)
        change(model[1])
    with pytest.warns(TamegradWarning, match=MESSAGE):
        backward(model)
    assert normalizer.steps == 2


def test_a_compiled_model_has_as_many_graphs_as_without_tamegrad() -> None:
    counts = []
    for attaches in (False, True):
        reset_compiler()
        model, optimizer, normalizer = attached()
        if not attaches:
            normalizer.detach()
        counter = compile_counter()
        compiled: Any = torch.compile(model, backend=counter)
        for _ in range(12):
            optimizer.zero_grad()
            backward(compiled)
            optimizer.step()
        counts.append((counter.frame_count, counter.op_count))
    reset_compiler()
    assert counts[0] == counts[1]
