"""Copies and pickles of normalizers, what keeps what alive, and counters in checkpoints."""

import contextlib
import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.training import a_model, backward
from tamegrad import Clip, Policy, Renormalize, SettingError, TamegradWarning, UnmatchedError
from tamegrad.torch import AttachedNormalizer, GradientNormalizer, attach


class OutOfMemoryError(Exception):
    pass


class Trainer:
    def __init__(self, **settings: Any) -> None:
        self.model = a_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-9, momentum=0.9)
        self.normalizer = attach(self.model, self.optimizer, Clip(1.0), **settings)

    def step(self) -> None:
        self.optimizer.zero_grad()
        backward(self.model)
        self.optimizer.step()


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301  from this test


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestCopies:
    @pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, saved])
    def test_says_that_it_is_detached(self, make_copy: Any) -> None:
        trainer = Trainer()
        trainer.step()
        with pytest.warns(TamegradWarning, match="a copy of an attached normalizer is detached: .* call attach"):
            other = make_copy(trainer)
        assert not other.normalizer.attached
        assert repr(other.normalizer).startswith("<AttachedNormalizer: detached, 1 steps, ")
        assert trainer.normalizer.attached
        assert repr(trainer.normalizer).startswith("<AttachedNormalizer: attached to SGD, 1 steps, ")
        other.step()
        assert other.model[0].weight.grad.norm() > 1
        assert other.normalizer.steps == 1
        assert str(other.normalizer.report) == str(trainer.normalizer.report)
        other.normalizer.detach()

    def test_a_copy_can_be_attached_anew_and_leaves_the_original_alone(self) -> None:
        trainer = Trainer()
        trainer.step()
        with pytest.warns(TamegradWarning, match="is detached"):
            other = copy.deepcopy(trainer)
        other.normalizer = attach(other.model, other.optimizer, other.normalizer.policy)
        before = [parameter.grad.clone() for parameter in trainer.model.parameters()]
        other.step()
        assert other.normalizer.report is not None
        assert other.normalizer.report.norms_after.tolist() == pytest.approx([1.0, 1.0])
        assert all(torch.equal(a, b.grad) for a, b in zip(before, trainer.model.parameters(), strict=True))
        assert trainer.normalizer.steps == 1

    def test_the_policy_of_a_copy_is_its_own(self) -> None:
        trainer = Trainer()
        with pytest.warns(TamegradWarning, match="is detached"):
            other = copy.deepcopy(trainer)
        other.normalizer.policy = Renormalize()
        assert trainer.normalizer.policy.default == Clip(1.0)

    def test_a_copied_or_pickled_model_has_no_hooks(self) -> None:
        trainer = Trainer()
        trainer.step()
        for make_copy in (copy.deepcopy, pickled, saved):
            model = make_copy(trainer.model)
            for _ in range(20):
                backward(model)
                with torch.no_grad():
                    model[0].weight.add_(1.0)


@pytest.fixture
def _without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_collections")
class TestLifetimes:
    @pytest.mark.parametrize("keeps_normalizer", [False, True])
    @pytest.mark.parametrize("on_nonfinite", ["keep", "skip", "skip_group"])
    def test_a_model_is_freed_with_its_trial(self, on_nonfinite: Any, *, keeps_normalizer: bool) -> None:
        def trial() -> tuple[weakref.ref[Any], weakref.ref[Any], AttachedNormalizer | None]:
            trainer = Trainer(on_nonfinite=on_nonfinite)
            for _ in range(3):
                trainer.step()
            kept = trainer.normalizer if keeps_normalizer else None
            return weakref.ref(trainer.model), weakref.ref(trainer.optimizer), kept

        model, optimizer, normalizer = trial()
        assert optimizer() is None
        assert normalizer is None or not normalizer.attached
        assert (model() is None) != keeps_normalizer
        del normalizer
        assert model() is None

    def test_a_normalizer_that_nobody_keeps_works_as_long_as_its_optimizer(self) -> None:
        trainer = Trainer()
        del trainer.normalizer
        trainer.step()
        assert trainer.model[0].weight.grad.norm() <= 1

    def test_by_hand(self) -> None:
        def trial() -> weakref.ref[Any]:
            model = a_model()
            normalizer = GradientNormalizer(model, Clip(1.0))
            backward(model)
            normalizer.normalize_()
            return weakref.ref(model)

        assert trial()() is None

    @pytest.mark.parametrize("with_closure", [False, True])
    def test_a_step_that_raised_keeps_nothing_alive(self, *, with_closure: bool) -> None:
        class Failing(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                if closure is not None:
                    closure()
                super().step()
                raise OutOfMemoryError

        model = a_model()
        optimizer = Failing(model.parameters(), lr=0.1)
        attach(model, optimizer, Clip(1.0), normalize="outermost")

        def step() -> weakref.ref[Any]:
            activation = model(torch.ones(5, 3))
            activation.square().sum().backward(create_graph=False)
            optimizer.step(activation.sum if with_closure else None)
            raise AssertionError

        activations: list[weakref.ref[Any]] = []

        def observed(_: Any, inputs: Any, output: Any) -> None:
            del inputs
            activations.append(weakref.ref(output))

        model.register_forward_hook(observed)
        for _ in range(2):
            with contextlib.suppress(OutOfMemoryError):
                step()
        assert [activation() for activation in activations] == [None, None]


@pytest.mark.parametrize("is_attached", [False, True])
class TestCounters:
    @staticmethod
    def make(*, is_attached: bool) -> tuple[Any, Any, Any]:
        model = a_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
        if is_attached:
            normalizer: Any = attach(model, optimizer, Clip(1.0), on_nonfinite="skip")
            return model, normalizer, optimizer.step
        normalizer = GradientNormalizer(model, Clip(1.0), on_nonfinite="skip")
        return model, normalizer, normalizer.normalize_

    def test_continue_from_a_checkpoint(self, *, is_attached: bool) -> None:
        model, normalizer, step = self.make(is_attached=is_attached)
        for number in range(3):
            model.zero_grad()
            backward(model)
            if number == 1:
                model[1].bias.grad[0] = math.nan
            step()
        buffer = io.BytesIO()
        torch.save(normalizer.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        assert state == {"steps": 3, "skipped_steps": 1, "nonfinite_steps": {"1": 1}}
        model, normalizer, step = self.make(is_attached=is_attached)
        backward(model)
        step()
        normalizer.load_state_dict(state)
        assert normalizer.state_dict() == state
        model[1].bias.grad[0] = math.nan
        step()
        assert normalizer.state_dict() == {"steps": 4, "skipped_steps": 2, "nonfinite_steps": {"1": 2}}

    @pytest.mark.parametrize(
        "state",
        [
            {},
            None,
            {"steps": 1, "skipped_steps": 0},
            {"steps": "1", "skipped_steps": 0, "nonfinite_steps": {}},
            {"steps": 1, "skipped_steps": 0, "nonfinite_steps": {"0": 0.5}},
            {"steps": 1, "skipped_steps": 0, "nonfinite_steps": {}, "other": 1},
        ],
    )
    def test_anything_else_is_refused_and_changes_nothing(self, state: Any, *, is_attached: bool) -> None:
        _, normalizer, _ = self.make(is_attached=is_attached)
        with pytest.raises(SettingError, match=r"^load_state_dict\(state\): got a (dict|NoneType) with the keys"):
            normalizer.load_state_dict(state)
        assert normalizer.state_dict() == {"steps": 0, "skipped_steps": 0, "nonfinite_steps": {}}

    def test_stay_when_the_policy_changes(self, *, is_attached: bool) -> None:
        model, normalizer, step = self.make(is_attached=is_attached)
        backward(model)
        model[1].bias.grad[0] = math.nan
        step()
        report = normalizer.report
        normalizer.policy = Clip(0.5, per="tensor")
        assert normalizer.state_dict() == {"steps": 1, "skipped_steps": 1, "nonfinite_steps": {"1": 1}}
        assert normalizer.report is report
        model.zero_grad()
        backward(model)
        step()
        assert normalizer.report["1.bias"].norm_after == 0.5

    def test_a_policy_that_is_refused_changes_nothing(self, *, is_attached: bool) -> None:
        model, normalizer, step = self.make(is_attached=is_attached)
        for wrong, kind in (("Clip", SettingError), (0.5, SettingError)):
            with pytest.raises(kind, match=r"^policy: got"):
                normalizer.policy = wrong
        with pytest.raises(UnmatchedError, match="override 'nowhere'"):
            normalizer.policy = Policy(Clip(0.5), overrides={"nowhere": None})
        assert normalizer.policy.default == Clip(1.0)
        backward(model)
        step()
        assert normalizer.report["0"].norm_after == 1.0
