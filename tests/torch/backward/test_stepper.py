"""`StepInBackward` behaves like one optimizer of the model, says what it refuses, and keeps nothing alive."""

import copy
import gc
import io
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as checkpoints

from support.training import adamw, three_layers
from support.transformer import Gpt, batches, equal_parameters, trained
from tamegrad import Clip, Policy, Renormalize, SettingError, TamegradWarning, UnmatchedError
from tamegrad.report import Report
from tamegrad.torch import StepInBackward, Summary, attach

DATA = batches(bytes(range(256)) * 4, 6)


def backward(model: nn.Module) -> None:
    (100 * model(torch.ones(5, 3, dtype=next(model.parameters()).dtype))).square().sum().backward()


class After:
    """The normal way: one optimizer, which steps after backward."""

    def __init__(self, make_optimizer: Any = adamw) -> None:
        self.model = Gpt()
        self.optimizer = make_optimizer(list(self.model.parameters()))
        self.normalizer = attach(self.model, self.optimizer, Clip(0.1))

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Inside:
    """Steps inside backward."""

    def __init__(self, make_optimizer: Any = adamw) -> None:
        self.model = Gpt()
        self.optimizer = StepInBackward(self.model, make_optimizer, Clip(0.1))

    def step(self) -> None:
        """Leaves `step` out of the loop."""


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("first", "second"), [(Inside, Inside), (Inside, After), (After, Inside)], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_resumes_exactly_and_exchanges_states_with_an_ordinary_optimizer(
    first: Any, second: Any, optimizer: str
) -> None:
    def make(params: Any) -> Any:
        options = {"momentum": 0.9} if optimizer == "SGD" else {}
        return getattr(torch.optim, optimizer)(params, lr=0.01, **options)

    whole = After(make)
    trained(whole.model, whole.step, DATA)
    before, resumed = first(make), second(make)
    trained(before.model, before.step, DATA[:3])
    resumed.model.load_state_dict(through_a_file(before.model.state_dict()))
    resumed.optimizer.load_state_dict(through_a_file(before.optimizer.state_dict()))
    trained(resumed.model, resumed.step, DATA[3:])
    assert equal_parameters(whole.model, resumed.model)


def test_a_state_of_an_older_pytorch_is_completed_as_the_optimizer_does_it() -> None:
    inside = Inside()
    trained(inside.model, inside.step, DATA[:1])
    state = inside.optimizer.state_dict()
    del state["param_groups"][0]["amsgrad"]
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
    other = Inside()
    other.optimizer.load_state_dict(state)
    trained(other.model, other.step, DATA[:1])
    assert other.optimizer.state_dict()["param_groups"][0]["amsgrad"] is False


def test_a_state_of_another_model_is_refused() -> None:
    stepper = StepInBackward(three_layers(), adamw, Clip(1.0))
    with pytest.raises(ValueError, match="doesn't match the size"):
        stepper.load_state_dict(Inside().optimizer.state_dict())


def test_checkpoints_of_torch_distributed() -> None:
    first, second, whole = Inside(), Inside(), After()
    trained(whole.model, whole.step, DATA)
    trained(first.model, first.step, DATA[:3])
    model, optimizer = checkpoints.get_state_dict(first.model, first.optimizer)
    checkpoints.set_state_dict(
        second.model, second.optimizer, model_state_dict=model, optim_state_dict=copy.deepcopy(optimizer)
    )
    trained(second.model, second.step, DATA[3:])
    assert equal_parameters(whole.model, second.model)


@pytest.mark.parametrize("leaves_step_in", [False, True])
def test_learning_rate_schedulers(*, leaves_step_in: bool) -> None:
    after, inside = After(), Inside()
    for trainer in (after, inside):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(trainer.optimizer, max_lr=0.1, total_steps=6)

        def step(trainer: Any = trainer, scheduler: Any = scheduler) -> None:
            if leaves_step_in and trainer is inside:
                trainer.optimizer.step()
            trainer.step()
            scheduler.step()

        trained(trainer.model, step, DATA[:5])
    assert inside.optimizer.param_groups[0]["lr"] == after.optimizer.param_groups[0]["lr"] != 0.01
    assert equal_parameters(after.model, inside.model)


def test_hyper_parameters_changed_between_steps() -> None:
    after, inside = After(), Inside()
    for trainer in (after, inside):
        for index, tokens in enumerate(DATA[:3]):
            trainer.optimizer.param_groups[0].update(lr=0.01 * (index + 1), weight_decay=0.1 * index, betas=(0.8, 0.9))
            trained(trainer.model, trainer.step, [tokens])
    assert equal_parameters(after.model, inside.model)


def test_a_learning_rate_that_is_a_tensor_is_shared_by_all_layers() -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=torch.tensor(0.01))

    after, inside = After(make), Inside(make)
    for trainer in (after, inside):
        for value in (0.01, 0.05):
            trainer.optimizer.param_groups[0]["lr"].fill_(value)
            trained(trainer.model, trainer.step, DATA[:1])
    assert len(inside.optimizer.param_groups) == 1
    assert equal_parameters(after.model, inside.model)


def test_layers_with_hyper_parameters_of_their_own_keep_them() -> None:
    model = three_layers()

    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.5 if params[0] is model[0].weight else 0.25)

    stepper = StepInBackward(model, make, Renormalize())
    assert [(group["lr"], len(group["params"])) for group in stepper.param_groups] == [(0.5, 2), (0.25, 4)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model)
    moved = [(a - b).norm() for a, b in zip(before, model.parameters(), strict=True)]
    for pair, rate in zip((moved[:2], moved[2:4], moved[4:]), (0.5, 0.25, 0.25), strict=True):
        assert torch.hypot(*pair).item() == pytest.approx(rate)


def test_step_runs_a_closure_and_its_hooks() -> None:
    after, inside = After(), Inside()
    seen = []
    inside.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    trained(after.model, after.step, DATA[:1])

    def closure() -> Any:
        loss = inside.model.loss(DATA[0])
        loss.backward()
        return loss

    with torch.no_grad():
        assert inside.optimizer.step(closure).item() > 0
    assert equal_parameters(after.model, inside.model)
    assert (inside.optimizer.steps, seen) == (1, [1])


def test_gradients_that_someone_puts_there_are_stepped_by_step() -> None:
    after, inside = After(), Inside()
    for trainer in (after, inside):
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        trainer.optimizer.step()
    assert all(parameter.grad is None for parameter in inside.model.parameters())
    assert equal_parameters(after.model, inside.model)
    assert str(inside.optimizer.report) == str(after.normalizer.report)


def test_step_without_any_gradient_warns_once() -> None:
    inside = Inside()
    with pytest.warns(TamegradWarning, match="nothing to step: no gradient of this model"):
        inside.optimizer.step()
    inside.optimizer.step()


def test_only_some_parameters() -> None:
    model = three_layers()
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    stepper = StepInBackward(model, adamw, Clip(1.0), parameters=[*model[4].parameters(), *model[2].parameters()])
    assert [layer.name for layer in stepper.plan.layers] == ["2", "4"]
    assert stepper.param_groups[0]["params"][0] is model[4].weight
    backward(model)
    assert stepper.report is not None
    assert stepper.report.groups == ("2", "4")


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"policy": Clip(1.0, per="model")}, r'\(policy\): got Clip\(1, per="model"\).*per="layer".*attach\(\)'),
            ({"policy": Policy(Clip(1.0), {"0": Clip(2.0, per="model")})}, "known only when every gradient"),
            ({"on_nonfinite": "skip"}, r'\(on_nonfinite\): got "skip".*"skip_group".*"zero"'),
            ({"on_nonfinite": "skp"}, "on_nonfinite"),
            ({"make_optimizer": lambda params: params}, r"\(make_optimizer\): got a list for layer '0'"),
            ({"make_optimizer": torch.optim.LBFGS}, "got a LBFGS"),
            ({"make_optimizer": lambda params: adamw(params[:1])}, "with 1 parameters for layer '0'.*0.weight, 0.bias"),
            ({"model": three_layers().named_parameters()}, r"\(model\): got a generator"),
        ],
    )
    def test_at_construction(self, settings: Any, match: str) -> None:
        arguments = {"model": three_layers(), "make_optimizer": adamw, "policy": Clip(1.0), **settings}
        with pytest.raises(SettingError, match=match):
            StepInBackward(**arguments)
        if isinstance(arguments["model"], nn.Module):
            backward(arguments["model"])
            assert all(parameter.grad is not None for parameter in arguments["model"].parameters())

    def test_unknown_layers_and_overrides(self) -> None:
        with pytest.raises(UnmatchedError, match="override 'nowhere'"):
            StepInBackward(three_layers(), adamw, Clip(1.0), overrides={"nowhere": None})
        with pytest.raises(UnmatchedError, match="layers="):
            StepInBackward(three_layers(), adamw, Clip(1.0), layers=["nowhere"])

    def test_a_second_one(self) -> None:
        model = three_layers()
        first = StepInBackward(model, adamw, Clip(1.0))
        with pytest.raises(SettingError, match=r"the parameter 0.weight, that a StepInBackward steps already.*detach"):
            StepInBackward(model, adamw, Clip(1.0))
        first.detach()
        first.detach()
        second = StepInBackward(model, adamw, Clip(1.0))
        backward(model)
        assert (first.steps, second.steps) == (0, 1)
        assert (first.attached, second.attached) == (False, True)
        with pytest.raises(SettingError, match=r"a call after detach"):
            first.step()

    def test_two_for_different_parameters_are_fine(self) -> None:
        model = three_layers()
        one = StepInBackward(model, adamw, Clip(1.0), parameters=model[0].parameters())
        other = StepInBackward(model, adamw, Clip(1.0), parameters=model[2:].parameters())
        backward(model)
        assert (one.steps, other.steps) == (1, 1)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_attach(self) -> None:
        model = three_layers()
        stepper = StepInBackward(model, adamw, Clip(1.0))
        with pytest.raises(
            SettingError, match="a StepInBackward, which normalizes.*choose the policy where it is made"
        ):
            attach(model, stepper, Clip(1.0))

    def test_further_parameters(self) -> None:
        stepper = StepInBackward(three_layers(), adamw, Clip(1.0))
        with pytest.raises(SettingError, match=r"add_param_group: got further parameters"):
            stepper.add_param_group({"params": [nn.Parameter(torch.ones(1))]})

    def test_an_optimizer_with_state_in_its_groups(self) -> None:
        class Counting(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
                return super().step(closure)

        model = three_layers()
        stepper = StepInBackward(model, lambda params: Counting([{"params": params, "k": 0}], lr=0.1), Clip(1.0))
        with pytest.raises(SettingError, match=r"changes 'k' of its group.*layer '4' has been stepped"):
            backward(model)
        with pytest.raises(SettingError, match="left of an earlier backward pass"):
            backward(model)
        stepper.zero_grad()

    @pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_copies(self, make_copy: Any) -> None:
        stepper = StepInBackward(three_layers(), adamw, Clip(1.0))
        with pytest.raises(SettingError, match="a copy or pickle of StepInBackward.*load the state_dict"):
            make_copy(stepper)


def test_a_copied_model_has_no_hooks() -> None:
    model = three_layers()
    stepper = StepInBackward(model, adamw, Clip(1.0))
    other = copy.deepcopy(model)
    backward(other)
    assert all(parameter.grad is not None for parameter in other.parameters())
    assert stepper.steps == 0


def test_the_policy_can_change_and_counters_stay() -> None:
    model = three_layers()
    stepper = StepInBackward(model, adamw, Clip(1.0), on_nonfinite="skip_group")
    handle = model[2].weight.register_hook(lambda gradient: gradient * math.nan)
    backward(model)
    handle.remove()
    assert stepper.nonfinite_steps == {"2": 1}
    with pytest.raises(SettingError, match='per="model"'):
        stepper.policy = Clip(1.0, per="model")
    with pytest.raises(UnmatchedError):
        stepper.policy = Policy(Clip(1.0), {"nowhere": None})
    assert stepper.policy.default == Clip(1.0)
    stepper.policy = Clip(0.5, per="tensor")
    assert stepper.nonfinite_steps == {"2": 1}
    backward(model)
    assert stepper.report is not None
    assert stepper.report["4.bias"].norm_after == 0.5
    model[4] = nn.Linear(4, 2)
    with pytest.raises(SettingError, match="other parameters"):
        stepper.policy = Clip(0.5)


def test_counters_stay_when_the_model_has_moved_to_another_device() -> None:
    model = three_layers()
    stepper = StepInBackward(model, adamw, Clip(1.0), on_nonfinite="skip_group")
    handle = model[2].weight.register_hook(lambda gradient: gradient * math.nan)
    for _ in range(2):
        backward(model)
        for unit in stepper._units:
            unit._device = torch.device("meta")
    handle.remove()
    backward(model)
    assert stepper.nonfinite_steps == {"2": 2}


def test_reports_are_snapshots_and_total_norms_do_not_overflow() -> None:
    model = three_layers().double()
    stepper = StepInBackward(model, lambda params: torch.optim.SGD(params, lr=0.0), Clip(1.0))
    backward(model)
    first = stepper.report
    assert first is not None
    shown = str(first)
    loss: Any = 1e200 * model(torch.ones(5, 3, dtype=torch.double))
    loss.sum().backward()
    assert str(first) == shown
    assert stepper.report is not None
    assert 1e200 < stepper.report.total_norm.item() < math.inf
    assert (len(first), first.skipped) == (3, False)


class TestLifetimes:
    @pytest.fixture(autouse=True)
    def _without_collections(self) -> Any:
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def test_everything_is_freed_with_its_trial(self) -> None:
        def trial() -> list[weakref.ref[Any]]:
            inside = Inside()
            trained(inside.model, inside.step, DATA[:2])
            return [weakref.ref(inside.model), weakref.ref(inside.optimizer)]

        assert [reference() for reference in trial()] == [None, None]

    def test_gradients_are_freed_while_backward_runs(self) -> None:
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))
        most = 0
        gradients: list[weakref.ref[Any]] = []

        def seen(gradient: torch.Tensor) -> None:
            nonlocal most
            gradients.append(weakref.ref(gradient))
            most = max(most, sum(reference() is not None for reference in gradients))

        for parameter in model.parameters():
            register: Any = parameter.register_hook
            register(seen)
        stepper = StepInBackward(model, adamw, Clip(1.0))
        model(torch.ones(2, 8)).sum().backward()
        assert len(gradients) == 20
        assert most <= 4
        assert stepper.report is not None
        assert all(reference() is None for reference in gradients)

    def test_a_forgotten_one_is_said(self) -> None:
        model = three_layers()
        StepInBackward(model, adamw, Clip(1.0))
        with pytest.warns(TamegradWarning, match="nothing steps this model: its StepInBackward is gone") as caught:
            backward(model)
        assert caught[0].filename == __file__
        stepper = StepInBackward(model, adamw, Clip(1.0))
        stepper.zero_grad()
        backward(model)
        assert stepper.steps == 1


def test_sinks_and_a_summary_see_every_step() -> None:
    class Steps:
        def __init__(self) -> None:
            self.seen: list[tuple[int, list[float]]] = []

        def write(self, step: int, report: Report[Any]) -> None:
            self.seen.append((step, report.norms_after.tolist()))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    sink, summary = Steps(), Summary()
    stepper = StepInBackward(
        model, lambda params: torch.optim.SGD(params, lr=1e-9), Clip(1.0), sinks=[sink], log_every=2
    )
    for _ in range(5):
        (100 * model(torch.ones(5, 3))).square().sum().backward()
        assert stepper.report is not None
        summary.update(stepper.report)
    assert sink.seen == [(2, [1.0, 1.0]), (4, [1.0, 1.0])]
    assert (summary.steps, summary["0"].clipped) == (5, 1.0)
