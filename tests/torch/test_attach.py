import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from tamegrad import Clip, NonFiniteGradientError, Renormalize, SettingError, UnmatchedError
from tamegrad.torch import attach, normalize_grad_

# Every optimizer of torch.optim, found rather than listed, so that a new one is tested as soon as it appears.
OPTIMIZERS = {
    name: optimizer
    for name, optimizer in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(optimizer, torch.optim.Optimizer) and optimizer is not torch.optim.Optimizer
}
LARGE = 50.0


def a_model(*, sparse: bool = False) -> Any:
    torch.manual_seed(0)
    if sparse:
        return nn.Sequential(nn.Embedding(3, 2, sparse=True))
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))


def loss_of(model: Any) -> Any:
    torch.manual_seed(1)
    takes_indices = isinstance(model[0], nn.Embedding)
    return (model(torch.randint(3, (8,)) if takes_indices else torch.randn(8, 3)) * LARGE).square().mean()


def closure_of(model: nn.Module) -> Any:
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss


def an_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    # Muon takes matrices only, which is why the model has no biases.
    settings: dict[str, Any] = {} if name in {"Adafactor", "Muon", "Adadelta"} else {"lr": 0.01}
    make: Any = OPTIMIZERS[name]
    optimizer: torch.optim.Optimizer = make(model.parameters(), **settings)
    return optimizer


def test_finds_the_optimizers() -> None:
    assert {"SGD", "Adam", "AdamW", "RMSprop", "LBFGS", "Adagrad"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_same_as_by_hand(name: str) -> None:
    attached, by_hand = (a_model(sparse=name == "SparseAdam") for _ in range(2))
    optimizer, other = an_optimizer(name, attached), an_optimizer(name, by_hand)
    normalizer = attach(attached, optimizer, Clip(0.5))

    def normalized_closure() -> Any:
        loss = closure_of(by_hand)
        assert normalize_grad_(by_hand, Clip(0.5)).clipped.any()
        return loss

    for _ in range(3):
        if name == "LBFGS":
            optimizer.step(lambda: closure_of(attached))
            other.step(normalized_closure)
        else:
            closure_of(attached)
            optimizer.step()
            normalized_closure()
            other.step()
    for ours, theirs in zip(attached.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert normalizer.report is not None
    assert normalizer.report.norms_after.max().item() <= 0.5


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_evaluated_before_its_gradients_are_normalized(*, keyword: bool) -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normalizer = attach(model, optimizer, Renormalize())
    seen: list[float] = []

    def closure() -> Any:
        loss = closure_of(model)
        seen.append(loss.item())
        return loss

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss is not None
    assert seen == [loss.item()]
    assert [parameter.grad.norm().item() for parameter in model.parameters() if parameter.grad is not None] == [
        pytest.approx(1.0)
    ] * 2
    assert normalizer.report is not None
    assert normalizer.report.norms.min() > 1


def test_after_detach_it_changes_nothing_and_keeps_its_report() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normalizer = attach(model, optimizer, Clip(1e-6))
    closure_of(model)
    optimizer.step()
    report = normalizer.report
    normalizer.detach()
    normalizer.detach()
    closure_of(model)
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step()
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert normalizer.report is report


def test_two_optimizers_of_one_model_have_two_policies() -> None:
    model = a_model()
    first, second = (torch.optim.SGD(model[index].parameters(), lr=0.1) for index in (0, 2))
    one = attach(model, first, Clip(0.1), overrides={"2": None})
    two = attach(model, second, Clip(0.2))
    closure_of(model)
    first.step()
    second.step()
    assert one.report is not None
    assert two.report is not None
    assert (one.report.groups, one.report.norms_after.tolist()) == (("0",), [0.1])
    assert (two.report.groups, two.report.norms_after.tolist()) == (("2",), [0.2])


@pytest.mark.parametrize("use_closure", [False, True])
def test_skip_leaves_parameters_and_state_alone(*, use_closure: bool) -> None:
    model = a_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    normalizer = attach(model, optimizer, Clip(0.5), on_nonfinite="skip")
    closure_of(model)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    steps = [state["step"].item() for state in optimizer.state.values()]

    def bad_closure() -> Any:
        loss = closure_of(model)
        gradient = model[0].weight.grad
        assert gradient is not None
        gradient[0, 0] = math.nan
        return loss

    if use_closure:
        optimizer.step(bad_closure)
    else:
        bad_closure()
        optimizer.step()
    assert normalizer.report is not None
    assert normalizer.report.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [state["step"].item() for state in optimizer.state.values()] == steps
    assert model[0].weight.grad is not None
    assert model[0].weight.grad[0, 0].isnan()
    closure_of(model)
    optimizer.step()
    assert normalizer.report.total_norm.isfinite()
    assert not torch.equal(before[0], model[0].weight)


def test_raise_stops_the_step() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, Clip(0.5), on_nonfinite="raise")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    closure_of(model)
    assert model[2].weight.grad is not None
    model[2].weight.grad[0, 0] = math.inf
    with pytest.raises(NonFiniteGradientError, match=r"^gradients of layer '2': got 2.weight: 1 \+inf"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_refuses_skip_under_lbfgs() -> None:
    model = a_model()
    with pytest.raises(SettingError, match=r"^attach\(on_nonfinite\): got \"skip\" with LBFGS"):
        attach(model, torch.optim.LBFGS(model.parameters()), Clip(1.0), on_nonfinite="skip")


def test_refuses_an_optimizer_of_another_model() -> None:
    with pytest.raises(SettingError, match=r"^attach\(model, optimizer\): got an optimizer that holds no parameter of"):
        attach(a_model(), torch.optim.SGD(a_model().parameters(), lr=0.1), Clip(1.0))


def test_refuses_anything_but_an_optimizer() -> None:
    with pytest.raises(SettingError, match=r"^attach\(optimizer\): got a Sequential; allowed: an optimizer"):
        attach(a_model(), a_model(), Clip(1.0))
    with pytest.raises(SettingError, match=r"^attach\(optimizer\): got an empty list"):
        attach(a_model(), [], Clip(1.0))


def test_a_refused_attach_leaves_no_hook() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnmatchedError):
        attach(model, optimizer, Clip(1e-6), overrides={"nowhere": None})
    closure_of(model)
    before = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[0].weight.grad, before)
