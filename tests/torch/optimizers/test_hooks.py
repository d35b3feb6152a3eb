"""Every signature of `step`, steps inside steps, several optimizers, groups that are left out, compiled steps."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from support.compiling import compile_counter, reset_compiler
from support.training import a_model, backward
from tamegrad import Clip, ClipValue, Renormalize, SettingError, TamegradWarning
from tamegrad.torch import GradientNormalizer, attach, normalize_grad_


class Recording(torch.optim.Optimizer):
    """Remembers the gradients that it steps with."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-9})
        self.seen: list[Tensor] = []

    def update(self) -> None:
        self.seen = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"])

    def norm(self) -> float:
        return float(torch.cat([gradient.flatten() for gradient in self.seen]).norm())


class TestSignatures:
    """`step()` may take no closure, a loss, further arguments, or callables of other names."""

    class WithoutClosure(Recording):
        def step(self) -> None:  # type: ignore[override]
            self.update()

    class WithLoss(Recording):
        def step(self, loss: Any = None) -> None:  # type: ignore[override]
            assert loss is None or float(loss) > 0
            self.update()

    class WithMore(Recording):
        def step(self, loss: Any, closure: Any = None, *, hessian: Any = None) -> None:  # type: ignore[override]
            assert float(loss) > 0
            assert hessian is None or hessian == [loss]
            if closure is not None:
                closure()
            self.update()

    class WithClosure(Recording):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            result = closure() if closure is not None else None
            self.update()
            return result

    @pytest.mark.parametrize(
        ("kind", "call"),
        [
            (WithoutClosure, lambda step, **_: step()),
            (WithLoss, lambda step, **_: step()),
            (WithLoss, lambda step, loss, **_: step(loss)),
            (WithLoss, lambda step, loss, **_: step(loss.item())),
            (WithLoss, lambda step, loss, **_: step(loss=loss)),
            (WithMore, lambda step, loss, **_: step(loss, None)),
            (WithMore, lambda step, loss, closure: step(loss, closure, hessian=[loss])),
            (WithMore, lambda step, loss, closure: step(loss, closure=closure)),
            (WithClosure, lambda step, **_: step(None)),
            (WithClosure, lambda step, **_: step(closure=None)),
            (WithClosure, lambda step, closure, **_: step(closure)),
        ],
    )
    def test_the_optimizer_sees_normalized_gradients(self, kind: Any, call: Any) -> None:
        model = a_model()
        optimizer = kind(model.parameters())
        normalizer = attach(model, optimizer, Clip(1.0, per="model"))

        def closure() -> Any:
            with torch.enable_grad():
                optimizer.zero_grad()
                return backward(model), "more"

        for step in range(1, 3):
            optimizer.zero_grad()
            result = call(optimizer.step, loss=backward(model).detach(), closure=closure)
            assert result is None or result[1] == "more"
            assert optimizer.norm() == pytest.approx(1.0)
            assert normalizer.steps == step

    def test_callables_of_other_names_are_refused_before_anything_changes(self) -> None:
        class TwoClosures(Recording):
            def step(self, *, forward: Any, backward: Any) -> None:  # type: ignore[override]
                raise AssertionError(forward, backward)

        model = a_model()
        optimizer = TwoClosures(model.parameters())
        attach(model, optimizer, Clip(1.0))
        with pytest.raises(SettingError, match=r"^TwoClosures.step: got the callables 'forward', 'backward'"):
            optimizer.step(forward=a_model, backward=a_model)
        with pytest.raises(SettingError, match="got 2 callables"):
            optimizer.step(a_model, a_model)  # type: ignore[call-arg]


class Surgery(torch.optim.SGD):
    """Finishes the gradients inside its step, and leaves the update to its base."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(10.0)
        super().step()
        return loss


class Raising(torch.optim.SGD):
    """Its base raises in the first step, which it does not mind."""

    tries = 0

    def step(self, closure: Any = None) -> Any:
        self.tries += 1
        if self.tries == 1:
            try:
                super().step(closure=lambda: 1 / 0)
            except ZeroDivisionError:
                return None
        return super().step(closure)


class TestStepsInsideSteps:
    """Where a step changes the gradients and calls another step, the user says which of them normalizes."""

    @pytest.mark.parametrize(("use_closure", "compiled"), [(False, False), (True, False), (False, True)])
    @pytest.mark.parametrize(("normalize", "after"), [("outermost", 10.0), ("innermost", 1.0)])
    def test_normalizes_at_the_step_that_the_user_chose(
        self, normalize: Any, after: float, *, use_closure: bool, compiled: bool
    ) -> None:
        model = a_model()
        optimizer = Surgery(model.parameters(), lr=1e-9)
        normalizer = attach(model, optimizer, Clip(1.0, per="model"), normalize=normalize)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(1, 3):
            optimizer.zero_grad()
            if use_closure:
                step(lambda: backward(model))
            else:
                backward(model)
                step()
            report = normalize_grad_(model, Clip(math.inf, per="model"))
            assert report.total_norm.item() == pytest.approx(after)
            assert normalizer.steps == number
        reset_compiler()

    def test_without_a_choice_it_is_the_outermost_and_warns_once(self) -> None:
        model = a_model()
        optimizer = Surgery(model.parameters(), lr=1e-9)
        attach(model, optimizer, Clip(1.0, per="model"))
        backward(model)
        with pytest.warns(
            TamegradWarning, match='Surgery.step.. changed its gradients .* normalize="innermost"'
        ) as seen:
            optimizer.step()
        assert seen[0].filename == __file__
        assert normalize_grad_(model, Clip(math.inf, per="model")).total_norm.item() == pytest.approx(10.0)
        optimizer.step()

    def test_a_step_inside_with_the_same_gradients_needs_no_choice(self) -> None:
        class Logging(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        model = a_model()
        optimizer = Logging(model.parameters(), lr=0.1)
        normalizer = attach(model, optimizer, Renormalize())
        for step in range(1, 3):
            backward(model)
            optimizer.step()
            assert normalizer.steps == step

    def test_a_step_inside_that_raised_does_not_confuse_the_next(self) -> None:
        model = a_model()
        optimizer = Raising(model.parameters(), lr=1e-9)
        normalizer = attach(model, optimizer, Clip(1.0, per="model"))
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            assert normalize_grad_(model, Clip(math.inf, per="model")).total_norm.item() == pytest.approx(1.0)
        assert normalizer.steps == 3

    def test_innermost_is_refused_where_no_step_is_inside(self) -> None:
        model = a_model()
        with pytest.raises(SettingError, match=r'normalize="innermost".*: got an optimizer whose step calls no other'):
            attach(model, torch.optim.SGD(model.parameters()), Clip(1.0), normalize="innermost")
        with pytest.raises(SettingError, match=r"^attach\(normalize\): got 'inner'; allowed: 'outermost', 'innermost'"):
            attach(model, torch.optim.SGD(model.parameters()), Clip(1.0), normalize="inner")  # type: ignore[arg-type]

    def test_innermost_that_turns_out_to_call_no_step_raises(self) -> None:
        class Alone(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                return closure

        model = a_model()
        optimizer = Alone(model.parameters(), lr=0.1)
        attach(model, optimizer, Clip(1.0), normalize="innermost")
        backward(model)
        with pytest.raises(SettingError, match="got a step that called no other step inside"):
            optimizer.step()


class TestSeveralOptimizers:
    """Layers whose parameters are shared out over several optimizers."""

    @staticmethod
    def make(**settings: Any) -> Any:
        model = a_model()
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
        muon, adamw = torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(others, lr=0.1)
        return model, muon, adamw, attach(model, [muon, adamw], Clip(1.0), **settings)

    @pytest.mark.parametrize("strategy", [Clip(1.0), Renormalize(per="model"), ClipValue(0.1)])
    def test_a_round_normalizes_all_gradients_together(self, strategy: Any) -> None:
        model, muon, adamw, normalizer = self.make()
        normalizer.policy = strategy
        expected = a_model()
        for step in range(1, 4):
            model.zero_grad()
            backward(model)
            for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
                theirs.grad = ours.grad.clone()
            normalize_grad_(expected, strategy)
            for optimizer in (muon, adamw) if step != 2 else (adamw, muon):
                optimizer.step()
            for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
                assert torch.equal(ours.grad, theirs.grad)
            assert normalizer.steps == step

    def test_closures_make_the_gradients_of_each_step(self) -> None:
        model, muon, adamw, normalizer = self.make()

        def closure() -> Any:
            model.zero_grad()
            return backward(model)

        for optimizer in (muon, adamw, muon):
            optimizer.step(closure)
            assert normalize_grad_(model, Clip(math.inf)).norms.tolist() == pytest.approx([1.0, 1.0])
        assert normalizer.report.norms.min() > 1

    def test_gradients_that_changed_between_the_steps_are_refused(self) -> None:
        model, muon, adamw, _ = self.make()
        backward(model)
        muon.step()
        model.zero_grad()
        backward(model)
        before = model[0].bias.detach().clone()
        with pytest.raises(SettingError, match=r"^AdamW.step: got gradients that changed since they were normalized"):
            adamw.step()
        assert torch.equal(model[0].bias, before)

    @pytest.mark.parametrize(("fused", "unscales"), [(False, True), (True, False), (True, True)])
    def test_a_gradient_scaler_changes_nothing(self, *, fused: bool, unscales: bool) -> None:
        models = [a_model(), a_model()]
        for model, loss_scale in zip(models, (1024.0, 1.0), strict=True):
            parts = [model[0].bias], [p for p in model.parameters() if p is not model[0].bias]
            optimizers = [torch.optim.Adam(part, lr=0.1, fused=fused) for part in parts]
            normalizer = attach(model, optimizers, Clip(1.0))
            scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
            for _ in range(2):
                model.zero_grad()
                scaler.scale((100 * model(torch.ones(5, 3))).square().sum()).backward()
                for optimizer in optimizers if unscales else []:
                    scaler.unscale_(optimizer)
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
            assert normalizer.report is not None
            assert normalizer.report.norms_after.tolist() == pytest.approx([1.0, 1.0])
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_a_gradient_scaler_that_would_unscale_between_the_steps_is_refused(self) -> None:
        # The second one is kept alive: an optimizer that is gone has no gradients to unscale.
        model, muon, _adamw, _ = self.make()
        before = model[0].weight.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale((100 * model(torch.ones(5, 3))).square().sum()).backward()
        with pytest.raises(SettingError, match=r"^GradScaler.step: .*call scaler.unscale_\(optimizer\) for"):
            scaler.step(muon)
        assert torch.equal(before, model[0].weight)

    def test_a_skipped_round_skips_every_optimizer(self) -> None:
        model, muon, adamw, normalizer = self.make(on_nonfinite="skip")
        backward(model)
        model[0].bias.grad[0] = math.nan
        before = [parameter.detach().clone() for parameter in model.parameters()]
        muon.step()
        adamw.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not muon.state
        assert not adamw.state
        assert normalizer.skipped_steps == 1
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_an_optimizer_twice_is_refused(self) -> None:
        model = a_model()
        optimizer = torch.optim.SGD(model.parameters())
        with pytest.raises(SettingError, match="got a list with an optimizer twice"):
            attach(model, [optimizer, optimizer], Clip(1.0))


class TestSkippingOneGroup:
    """`on_nonfinite="skip_group"` leaves non-finite groups out of the step, and only them."""

    @pytest.mark.parametrize("use_closure", [False, True])
    @pytest.mark.parametrize(
        "make",
        [
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1, fused=True),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
        ],
    )
    def test_parameters_and_momentum_of_the_group_stay(self, make: Any, *, use_closure: bool) -> None:
        model = a_model()
        optimizer = make(model.parameters())
        normalizer = attach(model, optimizer, Clip(1.0), on_nonfinite="skip_group")
        backward(model)
        optimizer.step()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        state = {name: value.clone() for name, value in optimizer.state[model[0].bias].items() if value is not None}

        def closure() -> Any:
            model.zero_grad()
            loss = backward(model)
            model[0].weight.grad[0, 0] = math.inf
            return loss

        if use_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert moved == [False, False, True, True]
        assert all(torch.equal(optimizer.state[model[0].bias][name], value) for name, value in state.items())
        assert normalizer.report is not None
        assert [(row.nonfinite, row.scale == 1) for row in normalizer.report] == [(1, True), (0, False)]
        assert not normalizer.report.skipped
        assert normalizer.nonfinite_steps == {"0": 1}
        assert model[0].weight.grad[0, 0] == math.inf
        closure()
        model[0].weight.grad[0, 0] = 1.0
        optimizer.step()
        assert not torch.equal(before[0], model[0].weight)

    def test_by_hand_the_gradients_are_removed(self) -> None:
        model = a_model()
        normalizer = GradientNormalizer(model, Clip(1.0, per="tensor"), on_nonfinite="skip_group")
        backward(model)
        model[1].weight.grad[0, 0] = math.nan
        report = normalizer.normalize_()
        assert [parameter.grad is None for parameter in model.parameters()] == [False, False, True, False]
        assert report["1.weight"].nonfinite == 1

    def test_lbfgs_is_refused(self) -> None:
        model = a_model()
        with pytest.raises(SettingError, match='got "skip_group" with LBFGS'):
            attach(model, torch.optim.LBFGS(model.parameters()), Clip(1.0), on_nonfinite="skip_group")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_only_creates_the_optimizers_state_is_no_step(make: Any) -> None:
    model = a_model()
    optimizer = make(model.parameters(), lr=0.1)
    normalizer = attach(model, optimizer, Clip(1.0))
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    assert (normalizer.steps, normalizer.report) == (0, None)
    backward(model)
    optimizer.step()
    report = normalizer.report
    model.zero_grad()
    get_optimizer_state_dict(model, optimizer)
    assert normalizer.steps == 1
    assert normalizer.report is report


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_a_warm_up_from_a_learning_rate_of_zero_counts_its_steps(factor: float) -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    normalizer = attach(model, optimizer, Clip(1.0))
    (factor * model(torch.ones(5, 3)).square().sum()).backward()
    optimizer.step()
    assert normalizer.steps == 1
    assert normalizer.report is not None
    assert (normalizer.report.total_norm == 0) == (factor == 0)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_compiled_step_has_as_many_graphs_as_without_tamegrad(make: Any) -> None:
    counts = []
    for attaches in (False, True):
        reset_compiler()
        model = a_model()
        optimizer = make(model.parameters(), lr=0.1)
        normalizer = attach(model, optimizer, Clip(1.0)) if attaches else None
        counter = compile_counter()
        step: Any = torch.compile(optimizer.step, backend=counter)
        for _ in range(12):
            model.zero_grad()
            backward(model)
            step()
        counts.append(counter.frame_count)
        assert normalizer is None or normalizer.steps == 12
    reset_compiler()
    assert counts[0] == counts[1]
