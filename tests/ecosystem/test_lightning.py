import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from support.ecosystem import POLICY, Recorder, a_batch, a_model, loss_of, step_by_hand
from tamegrad import SettingError
from tamegrad.torch import attach

# The same code is published twice, under two names: the classes differ.
TRAINERS = ["lightning.pytorch", "pytorch_lightning"]
FABRICS = ["lightning.fabric", "lightning_fabric"]


def trained(library: str, *, automatic: bool = True, closure: bool = False, **settings: Any) -> Any:
    """Trains for four batches; returns the module with its normalizer and recorder."""
    lightning: Any = importlib.import_module(library)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = a_model()
            self.automatic_optimization = automatic

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_start(self) -> None:
            wrapper: Any = self.optimizers()
            self.normalizer = attach(self, wrapper, POLICY)
            self.recorder = Recorder(self.named_parameters(), wrapper.optimizer)
            for optimizer in (wrapper, wrapper.optimizer):
                with pytest.raises(SettingError, match="has a normalizer already"):
                    attach(self, optimizer, POLICY)

        def on_before_optimizer_step(self, _: torch.optim.Optimizer) -> None:
            self.recorder.backward_is_done()

        def training_step(self, _: Tensor, __: int) -> Any:
            if automatic:
                return loss_of(self.net)
            optimizer: Any = self.optimizers()

            def evaluate() -> None:
                optimizer.zero_grad()
                self.manual_backward(loss_of(self.net))
                self.recorder.backward_is_done()

            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
            return None

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(a_batch()[:4])))
    return module


@pytest.mark.parametrize("library", TRAINERS)
def test_attaches_to_the_optimizer_inside(library: str) -> None:
    module = trained(library)
    module.recorder.check(steps=4)
    assert module.normalizer.steps == 4
    assert module.normalizer.report["net.0"].clipped


@pytest.mark.parametrize("library", TRAINERS)
def test_accumulated_gradients_are_normalized_once_a_step(library: str) -> None:
    module = trained(library, accumulate_grad_batches=2)
    module.recorder.check(steps=2)
    assert module.normalizer.steps == 2


@pytest.mark.parametrize("library", TRAINERS)
@pytest.mark.parametrize("closure", [False, True])
def test_attaches_under_manual_optimization(library: str, *, closure: bool) -> None:
    module = trained(library, automatic=False, closure=closure)
    module.recorder.check(steps=4)
    assert module.normalizer.steps == 4


@pytest.mark.parametrize("library", FABRICS)
@pytest.mark.parametrize("closure", [False, True])
def test_attaches_to_the_optimizer_inside_that_of_fabric(library: str, *, closure: bool) -> None:
    fabric = importlib.import_module(library).Fabric(accelerator="cpu", devices=1)
    plain = a_model()
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, outer = fabric.setup(plain, inner)
    normalizer = attach(model, outer, POLICY)
    for optimizer in (outer, inner):
        with pytest.raises(SettingError, match="has a normalizer already"):
            attach(model, optimizer, POLICY)
    recorder = Recorder(plain.named_parameters(), inner)
    for _ in range(3):
        step_by_hand(model, outer, recorder, closure=closure)
    recorder.check(steps=3)
    assert normalizer.steps == 3
    assert normalizer.report is not None
    assert normalizer.report["0"].clipped
