"""What is usually silently wrong with steps inside backward: here it is right, or refused with the reason."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from support.training import adamw, three_layers
from support.transformer import Gpt, batches, equal_parameters
from tamegrad import Clip, NonFiniteGradientError, SettingError, TamegradWarning
from tamegrad.torch import StepInBackward, attach

DATA = batches(bytes(range(256)) * 4, 6)


def loss_of(model: nn.Module) -> Any:
    return (100 * model(torch.ones(5, 3))).square().sum()


def stepped_after(make: Callable[[], Any], rounds: list[list[Callable[[Any], Any]]]) -> Any:
    """Trains with `attach`: in each round some losses, each with its own backward pass, and one step."""
    model = make()
    optimizer = adamw(model.parameters())
    attach(model, optimizer, Clip(1.0))
    for losses in rounds:
        for loss in losses:
            loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class TestAccumulation:
    def test_steps_once_with_the_sum(self) -> None:
        model = Gpt()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        losses: list[Any] = [lambda model, tokens=tokens: model.loss(tokens) for tokens in DATA]
        for start in (0, 3):
            for number, loss in enumerate(losses[start : start + 3]):
                with stepper.accumulate() if number < 2 else nullcontext():
                    loss(model).backward()
            stepper.step()
        assert stepper.steps == 2
        assert equal_parameters(model, stepped_after(Gpt, [losses[:3], losses[3:]]))

    def test_finishes_layers_that_the_last_micro_batch_does_not_use(self) -> None:
        def first(model: Any) -> Any:
            return model[2](model[0](torch.ones(5, 3))).square().sum()

        def second(model: Any) -> Any:
            return model[0](torch.ones(5, 3)).square().sum()

        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        with stepper.accumulate():
            first(model).backward()
        second(model).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert equal_parameters(model, stepped_after(three_layers, [[first, second]]))

    def test_forgotten_is_said(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        loss_of(model).backward()
        loss_of(model).backward()
        with pytest.warns(TamegradWarning, match="2 backward passes have stepped since the last step.*accumulate"):
            stepper.step()
        loss_of(model).backward()
        loss_of(model).backward()
        stepper.step()

    def test_steps_that_are_held_back_for_ever_are_said(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        for _ in range(100):
            with stepper.accumulate():
                loss_of(model).backward()
            stepper.step()
        with stepper.accumulate():
            loss_of(model).backward()
        with pytest.warns(TamegradWarning, match=r"in 100 calls of step\(\): accumulate\(\)"):
            stepper.step()

    def test_zero_grad_drops_what_was_held_back(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        with stepper.accumulate():
            loss_of(model).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        stepper.zero_grad()
        loss_of(model).backward()
        assert equal_parameters(model, stepped_after(three_layers, [[loss_of]]))


class Choosing(nn.Module):
    """Uses one of its branches, and never one of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 2)
        self.head.register_parameter("never", nn.Parameter(torch.ones(3)))

    def loss(self, branch: int) -> Any:
        return self.head(self.branches[branch](torch.ones(5, 3))).square().sum()


def test_unused_parameters_are_finished_at_the_end_of_backward() -> None:
    model = Choosing()
    stepper = StepInBackward(model, adamw, Clip(1.0))
    order = [0, 1, 1, 0]
    for branch in order:
        model.loss(branch).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert stepper.report is not None
        assert stepper.report[f"branches.{1 - branch}"].norm == 0
    losses: Any = [[lambda model, branch=branch: model.loss(branch)] for branch in order]
    assert equal_parameters(model, stepped_after(Choosing, losses))


def test_frozen_parameters_are_not_waited_for_and_are_stepped_once_they_are_unfrozen() -> None:
    def make() -> Any:
        model = three_layers()
        model[2].weight.requires_grad = False
        model[4].requires_grad_(requires_grad=False)
        return model

    def unfreezing(model: Any) -> Any:
        model.requires_grad_(requires_grad=True)
        return loss_of(model)

    model = make()
    stepper = StepInBackward(model, adamw, Clip(1.0))
    assert not model[2].weight.requires_grad
    for loss in (loss_of, loss_of, unfreezing, loss_of):
        loss(model).backward()
    assert stepper.steps == 4
    assert equal_parameters(model, stepped_after(make, [[loss_of], [loss_of], [unfreezing], [loss_of]]))


class TestRefusedInsideBackward:
    """Each is refused before anything was stepped, or says what was."""

    def refused(self, run: Callable[[], object], model: Any, match: str) -> Any:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with pytest.raises(SettingError, match=match) as caught:
            run()
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        assert "none of" in caught.value.__notes__[0]
        return caught.value

    @pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
    def test_create_graph(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        self.refused(lambda: loss_of(model).backward(create_graph=True), model, "create_graph=True.*autograd.grad")
        stepper.zero_grad()
        with stepper.accumulate(), pytest.raises(SettingError, match="create_graph"):
            loss_of(model).backward(create_graph=True)
        stepper.zero_grad()
        loss_of(model).backward()
        assert equal_parameters(model, stepped_after(three_layers, [[loss_of]]))

    def test_a_gradient_penalty_by_autograd_grad_is_right(self) -> None:
        def penalty(model: Any) -> Any:
            x = torch.ones(5, 3, requires_grad=True)
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            return gradient.square().sum()

        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        penalty(model).backward()
        assert stepper.steps == 1
        assert equal_parameters(model, stepped_after(three_layers, [[penalty]]))

    @pytest.mark.skipif(
        not hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"), reason="PyTorch does not tell"
    )
    def test_two_backward_passes_through_one_graph(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        loss = loss_of(model)
        self.refused(lambda: loss.backward(retain_graph=True), model, "retain_graph=True.*accumulate")
        stepper.zero_grad()
        with stepper.accumulate():
            loss.backward(retain_graph=True)
        loss.backward()
        twice = stepped_after(three_layers, [[lambda model: 2 * loss_of(model)]])
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twice.parameters(), strict=True))

    def test_a_second_graph_over_weights_that_changed_is_an_error_of_pytorch(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        first, second = loss_of(model), loss_of(model)
        first.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()
        assert stepper.steps == 1

    def test_reentrant_checkpoints(self) -> None:
        model = Gpt(reentrant=True)
        stepper = StepInBackward(model, adamw, Clip(1.0))
        with pytest.raises(SettingError, match="use_reentrant=True.*use_reentrant=False") as caught:
            model.loss(DATA[0]).backward()
        assert "2 of 16 layers were stepped ('head', 'norm')" in caught.value.__notes__[0]
        assert stepper.steps == 0

    def test_reentrant_checkpoints_around_everything(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        x = torch.ones(5, 3, requires_grad=True)

        def run() -> None:
            out: Any = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
            out.square().sum().backward()

        self.refused(run, model, "use_reentrant=True")
        assert stepper.steps == 0

    def test_reentrant_checkpoints_are_right_where_nothing_is_stepped(self) -> None:
        model = Gpt(reentrant=True, shares_block=True)
        stepper = StepInBackward(model, adamw, Clip(1.0))
        with stepper.accumulate():
            model.loss(DATA[0]).backward()
        plain = Gpt(shares_block=True)
        plain.loss(DATA[0]).backward()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.allclose(a.grad, b.grad) for a, b in pairs)  # type: ignore[arg-type]


class FailingError(Exception):
    pass


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        del ctx, gradients
        raise FailingError


def failing_loss(model: Any) -> Any:
    fail: Any = Failing.apply
    return model[4](fail(model[:4](torch.ones(5, 3)))).square().sum()


class TestBackwardThatRaises:
    def test_says_what_was_stepped_and_goes_on_after_zero_grad(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        before = [parameter.detach().clone() for parameter in model[:4].parameters()]
        with pytest.raises(FailingError):
            failing_loss(model).backward()
        assert stepper.steps == 0
        with pytest.warns(TamegradWarning, match=r"raised half way: .* 1 of 3 layers were stepped \('4'\)"):
            stepper.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(before, model[:4].parameters(), strict=True))
        loss_of(model).backward()
        stepper.step()
        assert stepper.steps == 1

    def test_the_next_backward_does_not_use_what_is_left(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        with pytest.raises(FailingError):
            failing_loss(model).backward()
        for context in (nullcontext(), stepper.accumulate()):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            with context, pytest.raises(SettingError, match=r"left of an earlier backward pass.* next: call zero_grad"):
                loss_of(model).backward()
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        stepper.zero_grad()
        loss_of(model).backward()
        assert stepper.steps == 1

    def test_a_non_finite_gradient_says_which_layers_were_stepped_before(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0), on_nonfinite="raise")
        handle = model[2].weight.register_hook(lambda gradient: gradient * torch.nan)
        with pytest.raises(NonFiniteGradientError, match="layer '2'") as caught:
            loss_of(model).backward()
        assert "1 of 3 layers were stepped ('4')" in caught.value.__notes__[0]
        handle.remove()
        stepper.zero_grad()
        loss_of(model).backward()
        assert stepper.steps == 1

    def test_an_error_at_the_end_of_backward(self) -> None:
        model = Choosing()
        stepper = StepInBackward(model, adamw, Clip(1.0), on_nonfinite="raise")
        weight: Any = model.head.weight
        weight.register_hook(lambda gradient: gradient * torch.nan)
        with pytest.raises(NonFiniteGradientError, match="layer 'head'") as caught:
            model.loss(0).backward()
        assert "layers were stepped ('branches.0'" in caught.value.__notes__[0]
        stepper.zero_grad()


class TestGradScaler:
    def test_is_refused_before_anything_is_stepped(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        scaler = torch.amp.GradScaler("cpu")
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(SettingError, match="GradScaler.*nothing has been stepped.*bfloat16"):
            scaler.scale(loss_of(model)).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        del stepper

    def test_is_refused_in_its_step(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        loss_of(model).backward()
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model)).backward()
        with pytest.raises(SettingError, match=r"GradScaler.step\(\) after a backward pass"):
            scaler.step(stepper)

    def test_that_is_not_enabled_is_fine(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        scaler.scale(loss_of(model)).backward()
        scaler.step(stepper)
        scaler.update()
        assert equal_parameters(model, stepped_after(three_layers, [[loss_of]]))


def test_compiled_models() -> None:
    def make() -> Any:
        return three_layers()

    model = make()
    compiled: Any = torch.compile(model, backend="aot_eager")
    stepper = StepInBackward(compiled, adamw, Clip(1.0))
    for _ in range(3):
        loss_of(compiled).backward()
        stepper.step()
    assert stepper.steps == 3
    assert all(parameter.grad is None for parameter in model.parameters())
    after = stepped_after(make, [[loss_of]] * 3)
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), after.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of compiled autograd itself
def test_compiled_autograd_is_refused_before_anything_is_stepped() -> None:
    model = three_layers()
    stepper = StepInBackward(model, adamw, Clip(1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch._dynamo.config.patch(compiled_autograd=True), pytest.raises(SettingError, match="compiled autograd"):
        torch.compile(lambda: loss_of(model).backward(), backend="eager")()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    stepper.zero_grad()
    loss_of(model).backward()
    assert stepper.steps == 1


def test_a_weight_that_backward_still_needs_is_an_error_of_pytorch_not_a_wrong_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.shared = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            frozen = nn.functional.linear(self.inner(x), self.shared.weight.detach())
            out: torch.Tensor = self.shared(frozen)
            return out

    model = Detached()
    stepper = StepInBackward(model, adamw, Clip(1.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model).backward()
    with pytest.warns(TamegradWarning, match="raised half way"):
        stepper.zero_grad()
