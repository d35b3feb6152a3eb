"""Data-parallel training (DDP over gloo) in two processes gives what one process gives with the same batches."""

import subprocess
import sys
from pathlib import Path

import pytest

import support

SHARED = """
import warnings

warnings.simplefilter("ignore")
import torch
from support.ecosystem import POLICY, a_model
from support.trainers import STEPS, an_optimizer, batches, check_same, mean_loss, train_by_hand
"""
LIGHTNING = """
import lightning
from lightning.pytorch.loggers import CSVLogger
from tamegrad.integrations.lightning import NormalizeGradients


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = a_model()

    def configure_optimizers(self):
        return an_optimizer(self.net)

    def training_step(self, batch, _):
        return mean_loss(self.net, batch)


if __name__ == "__main__":
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, use_distributed_sampler=False,
        callbacks=[NormalizeGradients(POLICY, log_every=2)], logger=CSVLogger("logs", name="", version="run"),
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(batches(STEPS), batch_size=None))
    check_same(module.net, train_by_hand(a_model(), batches(STEPS)))
"""
TRANSFORMERS = """
from transformers import Trainer, TrainingArguments
from tamegrad.integrations.transformers import normalize_gradients


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = a_model()

    def forward(self, x):
        return {"loss": mean_loss(self.net, x)}


class SameOnBoth(Trainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=5)


model = Model()
arguments = TrainingArguments(
    "checkpoints", max_steps=STEPS, use_cpu=True, ddp_backend="gloo", lr_scheduler_type="constant", report_to=[],
    save_strategy="no", dataloader_pin_memory=False,
)
rows = [{"x": row} for batch in batches(STEPS) for row in batch]
trainer = SameOnBoth(model, arguments, train_dataset=rows, optimizers=(an_optimizer(model), None))
assert trainer.accelerator.num_processes == 2
callback = normalize_gradients(trainer, POLICY)
trainer.train()
check_same(model.net, train_by_hand(a_model(), batches(STEPS)))
assert callback.normalizer.steps == STEPS
"""


def run(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *launcher: str) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(support.__file__).parents[1]), prepend=":")
    (folder / "script.py").write_text(SHARED + script, encoding="utf-8")
    command = [sys.executable, *launcher, "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(LIGHTNING, tmp_path, monkeypatch)
    lines = (tmp_path / "logs" / "run" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert "grad/norm/net.0" in lines[0]
    assert len(lines) == 6  # every second step, once


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(TRANSFORMERS, tmp_path, monkeypatch, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
