"""The benchmark times what it claims to, shows where tamegrad is slower, and reports nothing if the contract fails."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, in no package
speed = importlib.import_module("speed")
models = importlib.import_module("speed_models")
timing = importlib.import_module("speed_measure")
timed = importlib.import_module("speed_tools")
pages = importlib.import_module("speed_page")
sharded = importlib.import_module("speed_sharded")
start = importlib.import_module("speed_start")


@pytest.mark.parametrize(
    ("make", "tensors", "layers", "parameters"),
    [
        (models.gpt2, 148, 75, 124_439_808),
        (models.resnet50, 161, 107, 25_557_032),
        (lambda: models.linears(1000), 2000, 1000, 4_160_000),
        (models.lstm, 8, 2, 16_793_600),
    ],
    ids=["GPT-2 124M", "ResNet-50", "small layers", "LSTM"],
)
def test_models_have_their_real_sizes(make: Any, tensors: int, layers: int, parameters: int) -> None:
    model = make()
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert (len(sizes), sum(sizes)) == (tensors, parameters)
    assert len(models._layers(model)) == layers


@pytest.fixture(scope="module")
def case() -> Any:
    return timing.measure_case(models.cases(quick=True)[0], 0.0)


@pytest.mark.parametrize(("threshold", "clips"), [(timed.HUGE, False), (timed.TINY, True)])
def test_every_tool_clips_everything_or_nothing(threshold: float, *, clips: bool) -> None:
    subject = models.Subject(models.linears(3, 4))
    # optax returns new arrays, and the floor has its own values.
    tools = timed.tools(subject, threshold, without=["optax"])
    for tool in (tool for tool in tools if not tool.name.startswith("floor")):
        for _ in range(3):
            tool.refill()
            tool.run()
            for parameter, before in zip(subject.parameters, subject.views, strict=True):
                assert (not parameter.grad.equal(before)) == clips, tool.name


@pytest.mark.skipif(bool({"optax", "jax"} & set(timed.left_out())), reason="optax is not installed")
def test_optax_clips_too() -> None:
    subject = models.Subject(models.linears(3, 4))
    for threshold, clips in ((timed.HUGE, False), (timed.TINY, True)):
        (tool,) = [tool for tool in timed.tools(subject, threshold) if tool.name.startswith("optax")]
        for _ in range(2):
            tool.refill()
            values = np.concatenate([np.ravel(array) for array in tool.run()])
            before = np.concatenate([view.numpy().ravel() for view in subject.views])
            assert np.array_equal(values, before) != clips
            assert np.linalg.norm(values) == pytest.approx(timed.TINY if clips else np.linalg.norm(before))


def test_the_quick_run_shows_every_tool_on_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "CONTRACT", _contract(tmp_path, passes=True))
    assert speed.main(["--quick"]) == 0
    out = capsys.readouterr().out
    sections = out.split("\n## ")
    names = [tool.name for tool in timed.tools(models.Subject(models.linears(1, 2)), timed.HUGE)]
    assert len(names) >= 10
    for model in models.cases(quick=True):
        (section,) = [text for text in sections if text.startswith(f"{model.name}: ")]
        rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
        assert [row[0].strip() for row in rows[2:]] == names
        for row in rows[2:]:
            ours = row[0].strip().startswith(("tamegrad", "floor"))
            assert all(cell.strip() for cell in row[:3] + row[4:6])
            assert bool(row[3].strip()) != ours
    (section,) = [text for text in sections if text.startswith("Sharded models")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    for mesh in sharded.MESHES:
        counts = {row[2]: [other[3] for other in rows if other[:1] + other[2:3] == [mesh, row[2]]] for row in rows[2:8]}
        dimensions = sharded.MESHES[mesh]
        assert counts[timed.PER_LAYER] == ["1", "1"]
        assert counts[timed.LOOP] == [str(dimensions), str(2 * dimensions)]
        assert counts[timed.WHOLE] == ([str(dimensions)] * 2 if "plain" not in mesh else ["", ""])
    assert "raises RuntimeError" in section
    assert "torch 2" in out
    assert "commit" in out


def test_a_failing_contract_is_reported_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "CONTRACT", _contract(tmp_path, passes=False))
    # It stops before it draws, so matplotlib only has to look installed.
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda _: True)
    page = tmp_path / "speed.md"
    assert speed.main(["--quick", "--write", str(page)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "The contract suite fails: nothing is reported." in captured.err
    assert not page.exists()


def _contract(folder: Path, *, passes: bool) -> Path:
    file = folder / "test_contract.py"
    file.write_text(f"def test_contract():\n    assert {passes}\n", encoding="utf-8")
    return file


def test_where_tamegrad_is_slower_is_shown(case: Any) -> None:
    # tamegrad takes 4 seconds in every round, everything else 1.
    tools = case.nothing.tools
    seconds = np.array([[4.0 if tool.name.startswith("tamegrad") else 1.0 for tool in tools]] * 3)
    times = timing.Times(tools, seconds)
    slow = timing.Measured("GPT-2 124M", "any size", times, times)
    rows = [
        sharded.Sharded("2-D mesh", 100, timed.WHOLE, 2, 1.0, 0.5, 0.5),
        sharded.Sharded("2-D mesh", 100, timed.LOOP, 200, 1.0, 14.0, 14.0),
    ]
    few = timing.Growth({10: times})
    first_calls, first_steps = (
        [sharded.FirstCall(2000, timed.PER_LAYER, 1.5)],
        [start.FirstStep("a step", is_cold=True, seconds=9.0)],
    )
    shown = pages.tables(pages.Results([slow], few, [], rows, first_calls, first_steps))
    rivals = sum(tool.rival is not None for tool in tools)
    assert shown.count("takes 0.25x the time of tamegrad") == shown.count("**0.25**") == 2 * rivals
    assert shown.count("takes 0.50x the time of tamegrad") == shown.count("**0.50**") == 1
    assert shown.count("**no**") == 11
    assert "| yes |" not in shown


def test_ratios_compare_the_same_round_and_ignore_tools_that_sat_out(case: Any) -> None:
    first, second = case.nothing.tools[:2]
    times = timing.Times((first, second), np.array([[1.0, 2.0], [10.0, 30.0], [3.0, np.nan]]))
    assert times.ratio(second.name, first.name) == 2.5
    assert times.median(second.name) == 16.0
    assert times.ratio_of_fastest(second.name, first.name) == 2.0
    assert first.name in times
    assert "nothing" not in times


def test_tools_take_turns_and_slow_ones_sit_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOW_SECONDS", 0.0)
    turns: list[str] = []
    tools = [
        timed.Tool(name, lambda name=name: turns.append(name), lambda name=name: turns.append(f"refill {name}"))
        for name in "AB"
    ]
    times = timing.time_tools(tools, 1e-9)
    # Once to warm up and once in the first round; then both are too slow.
    assert turns == ["refill A", "A", "refill B", "B"] * 2
    assert times.seconds.shape == (3, 2)
    assert np.isnan(times.seconds[1:]).all()


def test_pictures(case: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures = importlib.import_module("speed_pictures")
    growth = timing.Growth({1: case.nothing, 10: case.nothing})
    rows = [sharded.Sharded(mesh, 24, timed.PER_LAYER, 1, 0.1, 1.0, 1.0) for mesh in sharded.MESHES]
    drawn = pictures.draw(tmp_path / "pictures", [case] * 4, growth, rows)
    assert [name for name, _ in drawn] == [
        "speed-nothing-clipped.svg",
        "speed-everything-clipped.svg",
        "speed-growth.svg",
        "speed-sharded.svg",
    ]
    assert all("<svg" in (tmp_path / "pictures" / name).read_text(encoding="utf-8") for name, _ in drawn)
