"""Tests every word of the judge, the known faults in the table, and the page against the script."""

import importlib
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "hostile-gradients.md"
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not in a package
hostile = importlib.import_module("hostile")
judging = importlib.import_module("hostile_judge")
tools = importlib.import_module("hostile_torch")
inputs = importlib.import_module("hostile_inputs")
Word: Any = judging.Word


def layers(**values: list[float]) -> dict[str, dict[str, Tensor]]:
    return {layer: {"weight": torch.tensor(numbers)} for layer, numbers in values.items()}


# The group that shares a norm, the threshold, before, after, and the expected verdict.
CASES = [
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[0.6, 0.8]), "right"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[0.6000002, 0.8]), "right"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[0.600001, 0.8]), "wrong direction"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[0.8, 0.6]), "wrong direction"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[-0.6, -0.8]), "wrong direction"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[0.3, 0.4]), "wrong norm (-50%)"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[3.0, 4.0]), "untouched"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[0.0, 0.0]), "zeroed"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[math.nan, 0.8]), "NaN"),
    ("layer", 1.0, layers(a=[3.0, 4.0]), layers(a=[math.inf, 0.8]), "inf"),
    ("layer", 5.0, layers(a=[3.0, 4.0]), layers(a=[3.0, 4.0]), "right"),
    ("layer", 5.0, layers(a=[3.0, 4.0]), layers(a=[2.9999998, 4.0]), "changed (-2.9e-06%)"),
    ("layer", 5.0, layers(a=[3.0, 4.0]), layers(a=[0.0, 0.0]), "zeroed"),
    # Two layers: each has its own norm, or both share one.
    ("layer", 1.0, layers(a=[3.0], b=[4.0]), layers(a=[1.0], b=[1.0]), "right"),
    ("model", 1.0, layers(a=[3.0], b=[4.0]), layers(a=[0.6], b=[0.8]), "right"),
    ("model", 1.0, layers(a=[3.0], b=[4.0]), layers(a=[1.0], b=[1.0]), "wrong direction"),
    ("layer", 1.0, layers(a=[3.0], b=[4.0]), layers(a=[0.0], b=[4.0]), "zeroed"),
    # A bad layer and a good one: the good one must come out as if it were alone, the bad one unchanged.
    ("model", 1.0, layers(a=[math.nan, 2.0], b=[4.0]), layers(a=[math.nan, 2.0], b=[1.0]), "right"),
    ("model", 1.0, layers(a=[math.nan, 2.0], b=[4.0]), layers(a=[math.nan, 2.0], b=[4.0]), "untouched"),
    (
        "model",
        1.0,
        layers(a=[math.nan, 2.0], b=[4.0]),
        layers(a=[math.nan] * 2, b=[math.nan]),
        "neighbour changed (NaN)",
    ),
    (
        "model",
        1.0,
        layers(a=[math.inf, 2.0], b=[4.0]),
        layers(a=[math.nan, 0.0], b=[0.0]),
        "neighbour changed (zeroed)",
    ),
    ("layer", 1.0, layers(a=[math.nan, 2.0], b=[4.0]), layers(a=[math.nan] * 2, b=[1.0]), "NaN"),
    ("layer", 1.0, layers(a=[math.inf, 2.0], b=[4.0]), layers(a=[0.0, 0.0], b=[1.0]), "zeroed"),
    ("layer", 1.0, layers(a=[math.inf, 2.0], b=[4.0]), layers(a=[math.inf, 1.0], b=[1.0]), "changed"),
    # Value by value; non-finite ones are not judged.
    ("value", 1.0, layers(a=[3.0, -0.5]), layers(a=[1.0, -0.5]), "right"),
    ("value", 1.0, layers(a=[3.0, -0.5]), layers(a=[0.6, -0.1]), "wrong direction"),
    ("value", 1.0, layers(a=[math.inf, 3.0]), layers(a=[1.0, 1.0]), "right"),
    ("value", 1.0, layers(a=[math.nan, 3.0]), layers(a=[math.nan, 3.0]), "untouched"),
    # An invalid threshold: only raising is right.
    ("layer", -1.0, layers(a=[3.0, 4.0]), layers(a=[-0.6, -0.8]), "wrong direction"),
    ("layer", math.nan, layers(a=[3.0, 4.0]), layers(a=[3.0, 4.0]), "untouched"),
    ("layer", math.nan, layers(a=[3.0, 4.0]), layers(a=[0.6, 0.8]), "changed (-80%)"),
]


@pytest.mark.parametrize(("per", "threshold", "before", "after", "verdict"), CASES)
def test_the_judge_names_the_outcome(per: str, threshold: float, before: Any, after: Any, verdict: str) -> None:
    assert str(judging.judge(per, threshold, before, after)) == verdict


def test_every_word_is_tested_and_explained() -> None:
    judged = {verdict.split(" (")[0] for *_, verdict in CASES}
    assert judged | {Word.RAISED, Word.NOT_APPLICABLE} == set(Word)
    assert set(judging.MEANINGS) == set(Word)


def test_the_oracle_neither_overflows_nor_underflows() -> None:
    for size in (1e300, 1e-300):
        before = {"a": {"weight": torch.tensor([3.0, 4.0], dtype=torch.float64) * size}}
        after = {"a": {"weight": torch.tensor([0.6, 0.8], dtype=torch.float64) * 1e-305}}
        assert judging.judge("layer", 1e-305, before, after).word == Word.RIGHT


def test_a_shared_gradient_may_count_once_or_twice() -> None:
    gradient = torch.tensor([3.0, 4.0])
    before = {"a": {"weight": gradient}, "b": {"weight": gradient}}
    for norm in (5.0, 5.0 * math.sqrt(2.0)):
        after = {layer: {"weight": gradient / norm} for layer in before}
        assert judging.judge("model", 1.0, before, after).word == Word.RIGHT
    after = {layer: {"weight": gradient / 50.0} for layer in before}
    assert str(judging.judge("model", 1.0, before, after)) == "wrong norm (-90%)"


def test_raising_is_an_outcome_that_reports_earlier_changes() -> None:
    def refuse(_gradients: Any, _threshold: float) -> Any:
        raise NotImplementedError

    def refuse_late(gradients: Any, _threshold: float) -> Any:
        gradients["a"]["weight"].zero_()
        raise ValueError

    def fail(_gradients: Any, _threshold: float) -> Any:
        raise TypeError

    row = inputs.Input("made up", 1.0, lambda: layers(a=[3.0, 4.0]))
    assert str(judging.outcome(judging.Tool("", "layer", refuse), row)) == "raised (NotImplementedError)"
    late = judging.outcome(judging.Tool("", "layer", refuse_late), row)
    assert str(late) == "raised (ValueError, some already changed)"
    with pytest.raises(TypeError):
        judging.outcome(judging.Tool("", "layer", fail), row)


def test_a_tool_does_not_get_inputs_that_its_framework_lacks() -> None:
    tool = judging.Tool("", "layer", lambda gradients, _: gradients, frozenset({"sparse"}))
    row = inputs.Input("made up", 1.0, lambda: layers(a=[3.0, 4.0]), needs="sparse")
    assert judging.outcome(tool, row).word == Word.NOT_APPLICABLE


@pytest.fixture(scope="module")
def judged() -> list[Any]:
    columns: list[Any] = hostile.judge_all(tools.TORCH + tools.TAMEGRAD)
    return columns


@pytest.fixture(scope="module")
def cells(judged: list[Any]) -> dict[tuple[str, str], str]:
    return read_table(hostile.table(judged))


def read_table(text: str) -> dict[tuple[str, str], str]:
    """Reads the first table of a page: input and tool to verdict, without percentages."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    tools_there = rows[0][1:]
    return {
        (row[0], tool): re.sub(r" \([-+].*%\)", "", cell)
        for row in rows[2:]
        for tool, cell in zip(tools_there, row[1:], strict=True)
    }


# A group that holds NaN or infinity has no norm, so tamegrad leaves it unchanged: with `per="model"` that is the whole
# model, under `ClipValue` the layer.
KEPT = {
    (row, tool)
    for row in ("one NaN in one of two layers", "one +inf in one of two layers")
    for tool in ('tamegrad `Clip(per="model")`', "tamegrad `ClipValue`")
}


def test_tamegrad_is_right_wherever_it_should_be(cells: dict[tuple[str, str], str]) -> None:
    refused = {row.name for row in hostile.INPUTS if not row.threshold > 0}
    ours = {place: verdict for place, verdict in cells.items() if place[1].startswith("tamegrad")}
    assert len(ours) == 3 * len(hostile.INPUTS)
    for (row, tool), verdict in ours.items():
        expected = "raised (SettingError)" if row in refused else "untouched" if (row, tool) in KEPT else "right"
        assert verdict == expected, (row, tool)


# Measured before this table was made, by independent code.
@pytest.mark.parametrize(
    ("row", "tool", "verdict"),
    [
        ("float32, values of 1e25, over threshold 1", "torch `clip_grad_norm_`", "zeroed"),
        ("float16, 200,000 values of 300, over threshold 1", "torch `clip_grad_norm_`", "zeroed"),
        ("norm 5e-7, under threshold 1e-6", "torch `clip_grad_norm_`", "changed"),
        ("norm 2e-6, over threshold 1e-6", "torch `clip_grad_norm_`", "wrong norm"),
        ("one NaN in one of two layers", "torch `clip_grad_norm_`", "neighbour changed (NaN)"),
        ("one +inf in one of two layers", "torch `clip_grad_norm_`", "neighbour changed (zeroed)"),
        ("two parameters share one gradient tensor", "torch `clip_grad_norm_`", "wrong norm"),
        ("threshold -1", "torch `clip_grad_norm_`", "wrong direction"),
        ("threshold NaN", "torch `clip_grad_norm_`", "NaN"),
        ("sparse gradient of an embedding", "torch, a loop of it per layer", "raised (NotImplementedError)"),
        ("expanded gradient (stride 0)", "torch, a loop of it per layer", "raised (RuntimeError)"),
        ("complex gradient", "torch `clip_grad_value_`", "raised (NotImplementedError)"),
        ("no gradient at all", "torch `clip_grad_value_`", "raised (RuntimeError)"),
    ],
)
def test_the_table_shows_the_known_faults(cells: dict[tuple[str, str], str], row: str, tool: str, verdict: str) -> None:
    assert cells[row, tool] == verdict


def test_ordinary_gradients_are_right_under_every_tool(cells: dict[tuple[str, str], str]) -> None:
    ordinary = [verdict for (row, _), verdict in cells.items() if row.startswith("ordinary")]
    assert len(ordinary) == 2 * 6
    assert set(ordinary) == {"right"}


def test_the_page_matches_the_script(cells: dict[tuple[str, str], str], judged: list[Any]) -> None:
    written = PAGE.read_text(encoding="utf-8")
    there = read_table(written)
    tools_here = {tool for _, tool in cells}
    assert {place: verdict for place, verdict in there.items() if place[1] in tools_here} == cells
    assert {row for row, _ in there} == {row.name for row in hostile.INPUTS}
    assert {tool.split(maxsplit=1)[0].rstrip(",") for _, tool in there} == {"torch", "optax", "Keras", "tamegrad"}
    # The text around the table, without the line with versions and date.
    today = hostile.page(judged, ["torch"], [])
    kept = [[line for line in page.splitlines() if not line.startswith(("|", "Made by"))] for page in (written, today)]
    assert kept[0] == kept[1]


def test_the_command_writes_the_page_with_torch_alone(
    judged: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    absent = {"optax", "jax", "keras"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    given: list[Any] = []

    def judge_all(found: list[Any]) -> list[Any]:
        given.extend(found)
        return judged

    monkeypatch.setattr(hostile, "judge_all", judge_all)
    assert hostile.main(["--write", str(tmp_path / "page.md")]) == 0
    assert given == [*tools.TORCH, *tools.TAMEGRAD]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for text in (printed, page):
        assert "optax and jax not installed, its columns are left out: pip install optax jax" in text
        assert hostile.table(judged) in text
