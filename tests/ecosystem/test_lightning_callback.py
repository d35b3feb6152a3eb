"""`NormalizeGradients` in Lightning's own trainers, compared with a loop that is written by hand."""

import contextlib
import copy
import csv
import importlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.ecosystem import POLICY, a_model
from support.trainers import STEPS, an_optimizer, batches, check_same, mean_loss, normalize_by_reference, train_by_hand
from tamegrad import Clip, Keep, SettingError
from tamegrad.integrations.lightning import NormalizeGradients
from tamegrad.torch import attach

# The same code is published twice, under two names.
LIBRARIES = ["lightning.pytorch", "pytorch_lightning"]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


def a_module(library: Any, *, automatic: bool = True, fused: bool = False, accumulate: int = 1) -> Any:
    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = a_model()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return an_optimizer(self.net, fused=fused)

        def training_step(self, batch: Tensor, number: int) -> Any:
            if automatic:
                return mean_loss(self.net, batch)
            optimizer = self.optimizers()
            self.manual_backward(mean_loss(self.net, batch) / accumulate)
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            return None

    return Module()


def a_trainer(library: Any, *callbacks: Any, **settings: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = False
    epochs = {} if "max_steps" in settings else {"max_epochs": 1}
    return library.Trainer(accelerator="cpu", devices=1, callbacks=[*callbacks], **(quiet | epochs | settings))


def loader(count: int = STEPS) -> Any:
    return torch.utils.data.DataLoader(batches(count), batch_size=None)  # type: ignore[arg-type]


def scaler(library: Any) -> Any:
    """A loss scale without float16, which on the CPU is something else in every trainer."""
    precision: Any = importlib.import_module(f"{library.__name__}.plugins.precision").MixedPrecision

    class Scaled(precision):  # type: ignore[misc]
        @contextlib.contextmanager
        def forward_context(self) -> Iterator[None]:
            yield

    return Scaled("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


class TestParametersAreThoseOfALoopByHand:
    @pytest.mark.parametrize("automatic", [True, False])
    def test_plain(self, library: Any, *, automatic: bool) -> None:
        module = a_module(library, automatic=automatic)
        callback = NormalizeGradients(POLICY)
        a_trainer(library, callback).fit(module, loader())
        check_same(module.net, train_by_hand(a_model(), batches(STEPS)))
        assert callback.normalizers[0].steps == STEPS

    def test_a_trainer_without_it_differs(self, library: Any) -> None:
        module = a_module(library)
        a_trainer(library).fit(module, loader())
        with pytest.raises(AssertionError):
            check_same(module.net, train_by_hand(a_model(), batches(STEPS)))

    @pytest.mark.parametrize("automatic", [True, False])
    def test_accumulation(self, library: Any, *, automatic: bool) -> None:
        settings: dict[str, Any] = {"accumulate_grad_batches": 2} if automatic else {}
        module = a_module(library, automatic=automatic, accumulate=2)
        callback = NormalizeGradients(POLICY)
        a_trainer(library, callback, **settings).fit(module, loader(2 * STEPS))
        check_same(module.net, train_by_hand(a_model(), batches(2 * STEPS), accumulate=2))
        assert callback.normalizers[0].steps == STEPS

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("automatic", [True, False])
    def test_scaler(self, library: Any, *, automatic: bool, fused: bool) -> None:
        module = a_module(library, automatic=automatic, fused=fused)
        a_trainer(library, NormalizeGradients(POLICY), plugins=[scaler(library)]).fit(module, loader())
        check_same(module.net, train_by_hand(a_model(), batches(STEPS)))

    def test_fused(self, library: Any) -> None:
        module = a_module(library, fused=True)
        a_trainer(library, NormalizeGradients(POLICY)).fit(module, loader())
        check_same(module.net, train_by_hand(a_model(), batches(STEPS)))

    def test_bfloat16(self, library: Any) -> None:
        module = a_module(library)
        a_trainer(library, NormalizeGradients(POLICY), precision="bf16-mixed").fit(module, loader())

        def loss(model: nn.Module, batch: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return mean_loss(model, batch)

        check_same(module.net, train_by_hand(a_model(), batches(STEPS), loss=loss))

    def test_resume(self, library: Any, tmp_path: Path) -> None:
        # Lightning resumes from the end of an epoch.
        first = a_trainer(library, NormalizeGradients(POLICY))
        first.fit(a_module(library), loader(STEPS // 2))
        first.save_checkpoint(tmp_path / "half.ckpt")
        module, callback = a_module(library), NormalizeGradients(POLICY)
        second = a_trainer(library, callback, max_epochs=2)
        second.fit(module, loader(STEPS // 2), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
        check_same(module.net, train_by_hand(a_model(), batches(STEPS // 2) * 2))
        assert callback.normalizers[0].steps == STEPS

    def test_own_clipping_too_is_refused(self, library: Any) -> None:
        module = a_module(library)
        with pytest.raises(SettingError, match=r"gradient_clip_val.*got 0.5.*leave gradient_clip_val out"):
            a_trainer(library, NormalizeGradients(POLICY), gradient_clip_val=0.5).fit(module, loader())
        check_same(module.net, a_model())

    def test_compiled(self, library: Any) -> None:
        module = a_module(library)
        compiled = torch.compile(module, backend="eager")
        a_trainer(library, NormalizeGradients(POLICY)).fit(compiled, loader())
        check_same(module.net, train_by_hand(a_model(), batches(STEPS)))

    def test_several_epochs_and_validation(self, library: Any) -> None:
        module = a_module(library)
        module.validation_step = lambda batch, *_: module.log("loss", mean_loss(module.net, batch))
        trainer = a_trainer(library, NormalizeGradients(POLICY), max_epochs=2, num_sanity_val_steps=1)
        trainer.fit(module, loader(5), loader(1))
        check_same(module.net, train_by_hand(a_model(), batches(5) * 2))


def a_gan(library: Any) -> Any:
    class Gan(library.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.generator, self.critic = nn.Linear(4, 4), nn.Linear(4, 1)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return an_optimizer(self.generator), an_optimizer(self.critic)

        def generator_loss(self, batch: Tensor) -> Any:
            return 100 * self.critic(self.generator(batch)).square().mean()

        def critic_loss(self, batch: Tensor) -> Any:
            return 100 * (self.critic(batch) - self.critic(self.generator(batch))).square().mean()

        def training_step(self, batch: Tensor, _: int) -> None:
            for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.critic_loss), strict=True):
                with optimizer.toggle_model():
                    optimizer.zero_grad()
                    self.manual_backward(loss(batch))
                    optimizer.step()

    return Gan()


class TestSeveralOptimizers:
    def test_each_has_its_strategy(self, library: Any) -> None:
        gan, callback = a_gan(library), NormalizeGradients([Clip(0.5), Clip(0.01)])
        a_trainer(library, callback).fit(gan, loader())
        by_hand = a_gan(library)
        generating, judging = by_hand.configure_optimizers()
        for batch in batches(STEPS):
            by_hand.zero_grad()
            by_hand.generator_loss(batch).backward()
            normalize_by_reference(by_hand.generator, Clip(0.5))
            generating.step()
            by_hand.zero_grad()
            by_hand.critic_loss(batch).backward()
            normalize_by_reference(by_hand.critic, Clip(0.01))
            judging.step()
        check_same(gan, by_hand)
        assert [normalizer.steps for normalizer in callback.normalizers] == [STEPS, STEPS]
        assert [normalizer.plan.groups[0].name for normalizer in callback.normalizers] == ["generator", "critic"]

    def test_one_strategy_is_for_all(self, library: Any) -> None:
        callback = NormalizeGradients(POLICY)
        a_trainer(library, callback).fit(a_gan(library), loader())
        assert [normalizer.plan.groups[0].strategy for normalizer in callback.normalizers] == [POLICY, POLICY]

    def test_a_policy_for_all_may_name_layers_of_each(self, library: Any) -> None:
        callback = NormalizeGradients(POLICY, overrides={"generator": Keep(), "critic": Clip(0.5)})
        a_trainer(library, callback).fit(a_gan(library), loader())
        assert [normalizer.plan.groups[0].strategy for normalizer in callback.normalizers] == [Keep(), Clip(0.5)]

    def test_a_list_of_another_length_is_refused(self, library: Any) -> None:
        gan = a_gan(library)
        with pytest.raises(SettingError, match="a list of 1 for 2 optimizers"):
            a_trainer(library, NormalizeGradients([Keep()])).fit(gan, loader())


class TestAttachesAndDetaches:
    def test_after_the_fit_the_optimizer_is_free_and_the_report_stays(self, library: Any) -> None:
        module, callback = a_module(library), NormalizeGradients(POLICY)
        trainer = a_trainer(library, callback)
        trainer.fit(module, loader())
        assert not callback.normalizers[0].attached
        assert callback.normalizers[0].report["net.0"].clipped  # type: ignore[index]
        attach(module, trainer.optimizers[0], POLICY)

    def test_after_an_error_too(self, library: Any) -> None:
        module, callback = a_module(library), NormalizeGradients(POLICY)
        module.on_train_batch_end = lambda *_: 1 / 0
        trainer = a_trainer(library, callback)
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, loader())
        assert not callback.normalizers[0].attached
        attach(module, trainer.optimizers[0], POLICY)

    def test_the_next_fit_goes_on(self, library: Any) -> None:
        module, callback = a_module(library), NormalizeGradients(POLICY)
        trainer = a_trainer(library, callback)
        trainer.fit(module, loader(5))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader(5))
        assert callback.normalizers[0].steps == 10

    def test_another_trainer_starts_anew(self, library: Any) -> None:
        callback = NormalizeGradients(POLICY)
        for _ in range(2):
            module = a_module(library)
            a_trainer(library, callback).fit(module, loader())
            check_same(module.net, train_by_hand(a_model(), batches(STEPS)))
            assert callback.normalizers[0].steps == STEPS

    def test_nonfinite_steps_are_in_the_checkpoint(self, library: Any, tmp_path: Path) -> None:
        module, callback = a_module(library), NormalizeGradients(POLICY, on_nonfinite="zero")
        data = batches(2)
        data[0][0, 0] = torch.inf
        trainer = a_trainer(library, callback)
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["NormalizeGradients"]
        assert saved["normalizers"][0] == callback.normalizers[0].state_dict()
        assert saved["normalizers"][0]["steps"] == 2
        assert saved["normalizers"][0]["nonfinite_steps"] == {"net.0": 1}

    def test_copies_are_callbacks_too(self, library: Any) -> None:
        # As a strategy that starts processes makes them; after a fit every callback holds the module.
        callback = NormalizeGradients(POLICY)
        callback.load_state_dict({"normalizers": [{"steps": 3, "skipped_steps": 0, "nonfinite_steps": {}}]})
        for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):  # noqa: S301
            assert isinstance(copied, library.Callback)
            assert isinstance(copied, NormalizeGradients)
            assert copied.state_dict() == callback.state_dict()
            module = a_module(library)
            a_trainer(library, copied).fit(module, loader())
            check_same(module.net, train_by_hand(a_model(), batches(STEPS)))


class TestOtherCallbacks:
    def test_searching_for_a_learning_rate_leaves_it_out_and_puts_it_back(self, library: Any, tmp_path: Path) -> None:
        tuner = importlib.import_module(f"{library.__name__}.tuner").Tuner
        module, callback = a_module(library), NormalizeGradients(POLICY)
        module.lr = 0.1
        trainer = a_trainer(library, callback, default_root_dir=tmp_path)
        tuner(trainer).lr_find(module, loader(), num_training=3, update_attr=False)
        assert callback.normalizers == []
        trainer.fit(module, loader())
        check_same(module.net, train_by_hand(a_model(), batches(STEPS)))

    def test_weight_averaging(self, library: Any) -> None:
        averaging = importlib.import_module(f"{library.__name__}.callbacks").StochasticWeightAveraging
        module, callback = a_module(library), NormalizeGradients(POLICY)
        trainer = a_trainer(library, callback, averaging(swa_lrs=0.1, swa_epoch_start=1), max_epochs=3)
        trainer.fit(module, loader(5))
        assert callback.normalizers[0].steps == 15
        assert callback.normalizers[0].report["net.0"].norm_after == pytest.approx(0.01)  # type: ignore[index]

    def test_finetuning(self, library: Any) -> None:
        base: Any = importlib.import_module(f"{library.__name__}.callbacks").BaseFinetuning

        class Finetuning(base):  # type: ignore[misc]
            def freeze_before_training(self, pl_module: Any) -> None:
                self.freeze(pl_module.net[0])

            def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)

        module, callback = a_module(library), NormalizeGradients(POLICY)
        module.configure_optimizers = lambda: torch.optim.SGD(
            [parameter for parameter in module.parameters() if parameter.requires_grad], lr=0.1
        )
        found: list[tuple[str, ...]] = []
        module.on_train_epoch_end = lambda: found.append(callback.normalizers[0].report.groups)  # type: ignore[union-attr]
        a_trainer(library, callback, Finetuning(), max_epochs=2).fit(module, loader(2))
        assert found == [("net.2",), ("net.0", "net.2")]


class TestLogging:
    def logged(
        self, library: Any, tmp_path: Path, callback: Any, *others: Any, module: Any = None, **settings: Any
    ) -> Any:
        logger = importlib.import_module(f"{library.__name__}.loggers").CSVLogger(tmp_path)
        trainer = a_trainer(library, callback, *others, logger=logger, log_every_n_steps=1, **settings)
        trainer.fit(module or a_module(library), loader())
        with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8") as file:
            return trainer, list(csv.DictReader(file))

    def test_every_so_many_steps_with_the_step_of_the_learning_rate_monitor(self, library: Any, tmp_path: Path) -> None:
        monitor = importlib.import_module(f"{library.__name__}.callbacks").LearningRateMonitor()
        callback = NormalizeGradients(POLICY, log_every=3)
        trainer, rows = self.logged(library, tmp_path, callback, monitor)
        norms = {int(row["step"]): float(row["grad/norm/net.0"]) for row in rows if row["grad/norm/net.0"]}
        rates = {int(row["step"]) for row in rows if row["lr-SGD"]}
        # The third, sixth and ninth.
        assert list(norms) == [2, 5, 8]
        assert norms.keys() <= rates
        assert norms[2] > 0.01
        assert not [name for name in trainer.progress_bar_metrics if "grad" in name]

    def test_only_when_a_step_was_taken(self, library: Any, tmp_path: Path) -> None:
        callback = NormalizeGradients(POLICY, log_every=1)
        _, rows = self.logged(library, tmp_path, callback, accumulate_grad_batches=4)
        assert len([row for row in rows if row["grad/total_norm"]]) == callback.normalizers[0].steps == 3

    def test_several_optimizers_have_names_of_their_own(self, library: Any, tmp_path: Path) -> None:
        callback = NormalizeGradients(POLICY, log_every=1)
        _, rows = self.logged(library, tmp_path, callback, module=a_gan(library))
        assert {name for name in rows[0] if "total_norm" in name} == {"grad/0/total_norm", "grad/1/total_norm"}


def test_settings_are_checked_when_it_is_made() -> None:
    with pytest.raises(SettingError, match="log_every"):
        NormalizeGradients(POLICY, log_every=0)
    with pytest.raises(SettingError, match="policy"):
        NormalizeGradients([POLICY, "clip"])
    with pytest.raises(TypeError, match="overides"):
        NormalizeGradients(POLICY, overides={})  # type: ignore[call-arg]
