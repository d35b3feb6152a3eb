"""The benchmark of steps inside backward measures both ways, and writes its page."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, in no package
command = importlib.import_module("in_backward")
measure = importlib.import_module("in_backward_measure")


def test_gradients_inside_backward_are_those_of_one_layer() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the resident size is read where Linux has it")
    inside = measure.measure_memory(2, measure.INSIDE, quick=True)
    assert 0 < inside.live == inside.layers[0] < inside.parameters / 3
    assert inside.resident >= 0


def test_the_page_has_every_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mib = 2**20
    memory = {
        measure.AFTER: measure.Memory(6, measure.AFTER, 9 * mib, (mib, mib), 9 * mib, 10 * mib),
        measure.INSIDE: measure.Memory(6, measure.INSIDE, 9 * mib, (mib, mib), mib, 3 * mib),
    }
    monkeypatch.setattr(command, "measure_memory", lambda _, way, **__: memory[way])
    monkeypatch.setattr(
        command, "measure_time", lambda *size, **_: measure.Time(*size, clips=True, after=1.0, inside=1.2, ratio=1.2)
    )
    training = measure.Training(200, 5.5, 2.5, 2.5, is_equal=True)
    monkeypatch.setattr(command, "measure_training", lambda **_: training)
    page = tmp_path / "page.md"
    page.write_text("before\n\n## Measured\n\nold\n", encoding="utf-8")
    arguments: list[Any] = ["--quick"]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--write", str(page)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 6 | 9.0 | 9.0 | 1.0 | 10.0 | 3.0 | **no** |" in printed
    assert "| 1 | 256 | everything | 1.000 | 1.200 | 1.20 | **no** |" in printed
    assert "equal to the last bit: yes" in printed
    if len(arguments) > 1:
        written = page.read_text(encoding="utf-8")
        assert written.startswith("before\n\n## Measured\n\n")
        assert "old" not in written
        assert (tmp_path / "pictures" / "step-in-backward.svg").exists()


def test_two_ways_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = measure.Memory(1, measure.AFTER, 1, (1, 1), 1, 1)
    monkeypatch.setattr(command, "measure_memory", lambda *_, **__: memory)
    monkeypatch.setattr(
        command, "measure_time", lambda *_, **__: measure.Time(1, 1, clips=True, after=1.0, inside=1.0, ratio=1.0)
    )
    training = measure.Training(200, 5.5, 2.5, 2.6, is_equal=False)
    monkeypatch.setattr(command, "measure_training", lambda **_: training)
    assert command.main([]) == 1
