"""`tamegrad dl4j FILE`: the table, the Python code, and one line for an error."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from support.dl4j_files import MODELS
from support.processes import run_python
from tamegrad import Policy, cli
from tamegrad.dl4j import read_policy, table


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["dl4j", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_prints_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(MODELS / "wrapped.zip")) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(" ")]
    assert [row for row in rows if row] == [
        ["layer", "class", "in", "out", "strategy", "threshold"],
        ["─" * 73],
        ["layer0", "LSTM", "4", "5", "ClipElementWiseAbsoluteValue", "0.07"],
        ["last", "LSTM", "5", "5", "ClipL2PerLayer", "0.9"],
        ["dense", "DenseLayer", "5", "6", "ClipL2PerParamType", "0.6"],
        ["layer3", "ActivationLayer", "–", "–", "no", "parameters", "–"],
        ["layer4", "OutputLayer", "6", "3", "RenormalizeL2PerLayer", "–"],
    ]
    assert lines[-1] == "A MultiLayerNetwork. Pass --python for the policy that does the same in PyTorch."


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.zip")), ids=lambda path: path.name)
def test_the_python_it_prints_builds_the_policy(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(file), "--python") == 0
    namespace: dict[str, Policy] = {}
    exec(capsys.readouterr().out, namespace)  # noqa: S102  this is the code under test
    assert namespace["policy"] == read_policy(file)


def test_a_name_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = {"@class": "org.deeplearning4j.nn.conf.layers.DenseLayer", "layerName": "[red]\x1b[2J", "nin": 4, "nout": 8}
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps({"confs": [{"layer": dense}]}))
    assert run(str(file)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"'[red]\x1b[2J'" in out


def test_a_narrow_terminal_gets_a_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "output", lambda: Console(width=30))
    assert run(str(MODELS / "wrapped.zip")) == 0
    assert capsys.readouterr().out.startswith("layer0\n  class: LSTM\n  in: 4\n  out: 5\n  strategy:")


@pytest.mark.parametrize(
    "arguments", [("",), ("missing.zip",), ("missing.zip", "--python"), (), ("a", "b"), ("a", "--pyton")]
)
def test_an_error_is_one_line_and_exit_code_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tamegrad")
    assert captured.err.count("\n") == 1
    assert all(part in captured.err for part in ("got", "allowed", "next"))


def test_loads_no_framework() -> None:
    code = (
        "import sys\nfrom tamegrad.cli import main\n"
        f"try:\n    main(['dl4j', {str(MODELS / 'lstm.zip')!r}])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'jax', 'plotly'} & set(sys.modules)\n"
    )
    run_python(code)
