"""The scripts of docs/trainers.md run, and so do the examples of the integrations."""

import csv
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
SCRIPT = re.compile(r"^## (.+?)$.*?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = dict(SCRIPT.findall(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(autouse=True)
def somewhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(section: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(SECTIONS[section], f"{PAGE.name}: {section}", "exec"), names)  # noqa: S102
    return names


def test_every_section_is_tested() -> None:
    assert sorted(SECTIONS) == ["Accelerate", "Lightning", "TRL", "Transformers"]


def test_lightning() -> None:
    names = run("Lightning")
    assert names["accuracy"] > 0.8
    assert names["normalizing"].normalizers[0].steps == 300
    with Path(names["logger"].log_dir, "metrics.csv").open(encoding="utf-8") as file:
        norms = [row["grad/norm/rnn.l0/weight"] for row in csv.DictReader(file) if row["grad/norm/rnn.l0/weight"]]
    assert len(norms) == 30


def test_transformers() -> None:
    names = run("Transformers")
    history = names["trainer"].state.log_history
    assert history[0]["loss"] > 1.2 * history[-2]["loss"]
    blocks = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    assert names["normalizing"].normalizer.report.groups == blocks


def test_trl() -> None:
    names = run("TRL")
    assert names["normalizing"].normalizer.steps == 20
    assert len(names["normalizing"].normalizer.report) == 4


def test_accelerate() -> None:
    names = run("Accelerate")
    assert names["accuracy"] > 0.8
    assert names["normalizer"].steps == 300
    events = EventAccumulator("logs/digits")
    events.Reload()
    assert [event.step for event in events.Scalars("grad/norm/0")] == list(range(10, 301, 10))


@pytest.mark.parametrize("module", ["lightning", "transformers"])
def test_examples(module: str) -> None:
    tested = doctest.testmod(importlib.import_module(f"tamegrad.integrations.{module}"))
    assert tested.attempted
    assert not tested.failed
