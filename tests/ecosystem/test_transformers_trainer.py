"""`normalize_gradients` in the Trainer of Transformers, compared with a loop that is written by hand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import IntervalStrategy, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from support.ecosystem import POLICY, a_model
from support.trainers import STEPS, an_optimizer, batches, check_same, mean_loss, train_by_hand
from tamegrad import SettingError
from tamegrad.integrations.transformers import normalize_gradients
from tamegrad.torch import attach


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps the state of a process for all tests, and older trainers set it in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = a_model()

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"loss": mean_loss(self.net, x)}


class InOrder(Trainer):  # type: ignore[misc]
    """A trainer that does not shuffle, so that a loop can do the same."""

    def _get_train_sampler(self, *_: object) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def a_trainer(
    folder: Path, *, count: int = STEPS, fused: bool = False, callbacks: Any = (), kind: Any = InOrder, **settings: Any
) -> Any:
    model = Model()
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=5,
        lr_scheduler_type="constant",
        **(quiet | {"max_steps": STEPS} | settings),
    )
    rows = [{"x": row} for batch in batches(count) for row in batch]
    optimizers = an_optimizer(model, fused=fused), None
    return kind(model, arguments, train_dataset=rows, optimizers=optimizers, callbacks=[*callbacks])


def force_scaler(trainer: Any) -> None:
    """Gives it a loss scale without float16, which on the CPU is something else in every trainer."""
    accelerator = trainer.accelerator
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


class TestParametersAreThoseOfALoopByHand:
    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0, 1e-3])
    def test_whatever_the_own_clipping_is(self, tmp_path: Path, max_grad_norm: float) -> None:
        trainer = a_trainer(tmp_path, max_grad_norm=max_grad_norm)
        callback = normalize_gradients(trainer, POLICY)
        trainer.train()
        check_same(trainer.model.net, train_by_hand(a_model(), batches(STEPS)))
        assert callback.normalizer is not None
        assert callback.normalizer.steps == STEPS

    def test_a_trainer_without_it_differs(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        trainer.train()
        with pytest.raises(AssertionError):
            check_same(trainer.model.net, train_by_hand(a_model(), batches(STEPS)))

    def test_accumulation(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path, count=2 * STEPS, gradient_accumulation_steps=2)
        callback = normalize_gradients(trainer, POLICY)
        trainer.train()
        check_same(trainer.model.net, train_by_hand(a_model(), batches(2 * STEPS), accumulate=2))
        assert callback.normalizer is not None
        assert callback.normalizer.steps == STEPS

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
    def test_scaler(self, tmp_path: Path, max_grad_norm: float, *, fused: bool) -> None:
        trainer = a_trainer(tmp_path, fused=fused, max_grad_norm=max_grad_norm, logging_steps=1)
        normalize_gradients(trainer, POLICY)
        force_scaler(trainer)
        trainer.train()
        check_same(trainer.model.net, train_by_hand(a_model(), batches(STEPS)))
        assert trainer.accelerator.scaler._get_growth_tracker() == STEPS
        if max_grad_norm:
            first = trainer.state.log_history[0]
            assert first["grad_norm"] == pytest.approx(first["grad/total_norm"])

    def test_fused(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path, fused=True)
        normalize_gradients(trainer, POLICY)
        trainer.train()
        check_same(trainer.model.net, train_by_hand(a_model(), batches(STEPS)))

    def test_bfloat16(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path, bf16=True)
        normalize_gradients(trainer, POLICY)
        trainer.train()

        def loss(model: nn.Module, batch: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return mean_loss(model, batch)

        check_same(trainer.model.net, train_by_hand(a_model(), batches(STEPS), loss=loss))

    @pytest.mark.parametrize("restore", [False, True])
    def test_resume(self, tmp_path: Path, *, restore: bool) -> None:
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": STEPS // 2}
        settings = saving | {"restore_callback_states_from_checkpoint": restore}
        first = a_trainer(tmp_path, max_steps=STEPS // 2, **settings)
        normalize_gradients(first, POLICY)
        first.train()
        second = a_trainer(tmp_path, **settings)
        callback = normalize_gradients(second, POLICY)
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        check_same(second.model.net, train_by_hand(a_model(), batches(STEPS)))
        assert callback.normalizer is not None
        assert callback.normalizer.steps == STEPS
        saved = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text(encoding="utf-8"))
        assert saved["stateful_callbacks"]["NormalizerCounters"]["attributes"]["counters"]["steps"] == STEPS

    def test_resume_from_a_checkpoint_that_was_made_without_it(self, tmp_path: Path) -> None:
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": STEPS // 2}
        a_trainer(tmp_path, max_steps=STEPS // 2, **saving).train()
        second = a_trainer(tmp_path, **saving)
        callback = normalize_gradients(second, POLICY)
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert callback.normalizer is not None
        assert callback.normalizer.steps == STEPS // 2

    def test_training_twice(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        callback = normalize_gradients(trainer, POLICY)
        trainer.train()
        trainer.train()
        by_hand = a_model()
        optimizer = an_optimizer(by_hand)
        for _ in range(2):
            train_by_hand(by_hand, batches(STEPS), optimizer=optimizer)
        check_same(trainer.model.net, by_hand)
        assert callback.normalizer is not None
        assert callback.normalizer.steps == STEPS

    def test_a_smaller_batch_after_memory_ran_out(self, tmp_path: Path) -> None:
        class Small(InOrder):
            def training_step(self, model: Any, inputs: Any, *others: Any) -> Any:
                if len(inputs["x"]) > 4:
                    raise RuntimeError("CUDA out of memory.")
                return super().training_step(model, inputs, *others)

        trainer = a_trainer(tmp_path, kind=Small, auto_find_batch_size=True)
        callback = normalize_gradients(trainer, POLICY)
        trainer.train()
        rows = torch.cat(batches(STEPS))
        size = trainer._train_batch_size
        assert size <= 4
        check_same(trainer.model.net, train_by_hand(a_model(), list(torch.split(rows, size))[:STEPS]))
        assert callback.normalizer is not None
        assert callback.normalizer.steps == STEPS

    def test_gradients_on_several_meshes(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        if not hasattr(trainer, "_mixed_mesh_grad_norm"):
            pytest.skip("this version of Transformers has no such path")
        normalize_gradients(trainer, POLICY)
        trainer._mixed_mesh_grads = True
        trainer.train()
        check_same(trainer.model.net, train_by_hand(a_model(), batches(STEPS)))


class TestLogs:
    def test_norms_stand_beside_the_loss(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = a_trainer(tmp_path, logging_steps=2)
        trainer.eval_dataset = trainer.train_dataset
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 2
        normalize_gradients(trainer, POLICY)
        trainer.train()
        history = trainer.state.log_history
        training = [entry for entry in history if "loss" in entry]
        assert len(training) == STEPS // 2
        for entry in training:
            assert entry["grad_norm"] == pytest.approx(entry["grad/total_norm"])
            assert entry["grad/norm/net.0"] > 0.01
        assert not [entry for entry in history if "loss" not in entry and "grad/total_norm" in entry]
        assert "grad_norm" in (printed := capsys.readouterr().out)
        assert "grad/" not in printed

    def test_they_reach_tensorboard(self, tmp_path: Path) -> None:
        writer = SummaryWriter(tmp_path / "runs")
        trainer = a_trainer(tmp_path, logging_steps=5, callbacks=[TensorBoardCallback(writer)])
        normalize_gradients(trainer, POLICY)
        trainer.train()
        events = EventAccumulator(str(tmp_path / "runs"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/grad/norm/net.0")] == [5, 10]

    @pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
    def test_a_layer_that_is_not_finite_spoils_no_other(self, tmp_path: Path, max_grad_norm: float) -> None:
        class Spoiling(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
                model.net[0].weight.register_hook(lambda gradient: gradient * torch.inf)

        settings: dict[str, Any] = {"max_grad_norm": max_grad_norm, "max_steps": 1, "logging_steps": 1}
        trainer = a_trainer(tmp_path, callbacks=[Spoiling()], **settings)
        callback = normalize_gradients(trainer, POLICY, on_nonfinite="zero")
        trainer.train()
        assert callback.normalizer is not None
        assert callback.normalizer.nonfinite_steps == {"net.0": 1}
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
        entry = trainer.state.log_history[0]
        assert entry["grad/nonfinite"] == 1
        assert "grad/norm/net.0" not in entry
        assert entry["grad/norm/net.2"] > 0.01


class TestTheTrainerIsAsBeforeAfterwards:
    def test_it_clips_again(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        clip = trainer.accelerator.clip_grad_norm_
        callback = normalize_gradients(trainer, POLICY)
        trainer.train()
        assert trainer.accelerator.clip_grad_norm_ == clip
        assert not [one for one in trainer.callback_handler.callbacks if "on_log" in vars(one)]
        assert callback.normalizer is not None
        assert not callback.normalizer.attached
        assert callback.normalizer.report is not None
        attach(trainer.model, trainer.optimizer, POLICY)

    def test_training_again_after_an_error(self, tmp_path: Path) -> None:
        class Failing(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                raise ZeroDivisionError

        trainer = a_trainer(tmp_path, callbacks=[failing := Failing()])
        callback = normalize_gradients(trainer, POLICY)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        trainer.remove_callback(failing)
        trainer.train()
        assert callback.normalizer is not None
        assert callback.normalizer.steps == STEPS


class TestRefused:
    def test_no_trainer(self) -> None:
        with pytest.raises(SettingError, match="a Sequential"):
            normalize_gradients(a_model(), POLICY)

    def test_twice(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        normalize_gradients(trainer, POLICY)
        with pytest.raises(SettingError, match="normalizes gradients already"):
            normalize_gradients(trainer, POLICY)

    def test_a_wrong_setting(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        with pytest.raises(SettingError, match="on_nonfinite"):
            normalize_gradients(trainer, POLICY, on_nonfinite="nothing")  # type: ignore[arg-type]

    def test_deepspeed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trainer = a_trainer(tmp_path)
        # DeepSpeed need not be installed for this.
        monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", object())
        with pytest.raises(SettingError, match=r"DeepSpeed.*gradient_clipping"):
            normalize_gradients(trainer, POLICY)

    def test_fsdp1(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        with pytest.raises(SettingError, match=r"FSDP1.*\"version\": 2"):
            normalize_gradients(trainer, POLICY)

    def test_apex(self, tmp_path: Path) -> None:
        trainer = a_trainer(tmp_path)
        trainer.use_apex = True
        with pytest.raises(SettingError, match=r"Apex.*bf16=True"):
            normalize_gradients(trainer, POLICY)
        assert not [one for one in trainer.callback_handler.callbacks if "tamegrad" in type(one).__module__]
