"""`tamegrad compare`: its options, its files, bad input, full disks and Ctrl-C."""

import itertools
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from support.command import OPTIONS, Run
from tamegrad import __version__
from tamegrad.errors import quoted
from tamegrad.study import command
from tamegrad.study.network import ByteNetwork
from tamegrad.study.results import write_results
from tamegrad.study.settings import STRATEGIES
from tamegrad.study.table import Bars

QUICK = ("--steps", "1", "--strategy", "None")
LINE = re.compile(r"tamegrad.+: got .+; allowed: .+; next: .+\n")


@pytest.fixture(scope="session")
def song(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "song.txt"
    file.write_text("ninety-nine bottles of beer on the wall\n" * 400)
    return str(file)


def numbers(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document


def timeless(document: dict[str, Any]) -> object:
    parts = {
        part: [{k: v for k, v in one.items() if "milliseconds" not in k} for one in document[part]]
        for part in ("strategies", "runs")
    }
    return {**document, **parts, "environment": None}


# Comparisons


def test_compares_and_names_the_output(run: Run, song: str, tmp_path: Path) -> None:
    code, out, err = run("compare", "--text", song, "--steps", "2", "--seed", "3", "--out", "here/there")
    assert code == 0
    assert "Page:    here/there/index.html" in out
    assert "Pass --seeds 5 to compare over five seeds." in out
    assert all(name in out and name in err for name in STRATEGIES)
    document = numbers(tmp_path / "here" / "there")
    assert document["schema"] == 2
    assert not document["partial"]
    assert [one["strategy"] for one in document["runs"]] == list(STRATEGIES)
    assert all(len(one["train_loss"]) == 2 for one in document["runs"])
    assert document["settings"]["seed"] == 3
    assert document["environment"]["tamegrad"] == __version__
    assert sorted(path.name for path in (tmp_path / "here" / "there").iterdir()) == ["index.html", "results.json"]


def test_the_options_choose_what_is_trained(run: Run, song: str, tmp_path: Path) -> None:
    given = ("--strategy", "torch-global", "--strategy", "None", "--network", "lstm", "--threshold", "0.1", "--lr", "1")
    code, _, _ = run("compare", "--text", song, "--steps", "1", *given)
    assert code == 0
    document = numbers(tmp_path / "tamegrad-compare")
    assert [(one["strategy"], one["threshold"]) for one in document["runs"]] == [("torch-global", 0.1), ("None", None)]
    assert (document["settings"]["network"], document["settings"]["lr"]) == ("lstm", 1.0)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(run: Run, song: str, tmp_path: Path) -> None:
    for seed, out in (("1", "a"), ("1", "b"), ("2", "c")):
        run("compare", "--text", song, "--steps", "2", "--strategy", "ClipL2PerLayer", "--seed", seed, "--out", out)
    first, again, other = (timeless(numbers(tmp_path / out)) for out in "abc")
    assert first == again
    assert first != other


def test_several_seeds_have_a_range_and_show_progress(run: Run, song: str, tmp_path: Path) -> None:
    given = ("--strategy", "None", "--strategy", "ClipL2PerLayer")
    code, out, err = run("compare", "--text", song, "--steps", "2", "--seeds", "3", "--seed", "4", *given)
    assert code == 0
    assert "to highest" in out
    # Printed once, at the end: stderr is no terminal here.
    assert err.count("6/6 seed 3 of 3") == 2
    document = numbers(tmp_path / "tamegrad-compare")
    assert [(one["seed"], one["strategy"]) for one in document["runs"]] == [
        (seed, strategy) for seed in (4, 5, 6) for strategy in ("None", "ClipL2PerLayer")
    ]
    for strategy in document["strategies"]:
        losses = [one["final_loss"] for one in document["runs"] if one["strategy"] == strategy["strategy"]]
        assert strategy["final_loss"] == {
            "mean": statistics.fmean(losses),
            "lowest": min(losses),
            "highest": max(losses),
        }
        assert f"{min(losses):.3f} to {max(losses):.3f}" in out


def test_existing_files_and_folders_are_left_alone(run: Run, song: str, tmp_path: Path) -> None:
    (tmp_path / "study").write_text("a file of that name")
    (tmp_path / "study-2").mkdir()
    given = ("compare", "--text", song, "--steps", "1", "--strategy", "None", "--out", "study")
    assert "Page:    study-3/index.html" in run(*given)[1]
    assert "Page:    study-4/index.html" in run(*given)[1]
    assert (tmp_path / "study").read_text() == "a file of that name"
    assert list((tmp_path / "study-2").iterdir()) == []


def test_a_dot_as_output_folder_means_beside_the_current_folder(
    run: Run, song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert run("compare", "--text", song, "--steps", "1", "--strategy", "None", "--out", ".")[0] == 0
    assert (tmp_path / "inside-2" / "results.json").is_file()


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--text", "missing.txt"),
            "--text missing.txt: got a path that does not exist; allowed: a text file or a folder",
        ),
        (("--text", "empty.txt"), "--text empty.txt: got an empty file; allowed: at least 10,000 bytes of text"),
        (("--text", "short.txt"), "--text short.txt: got 5 bytes; allowed: at least 10,000 bytes of text"),
        (("--text", "binary"), "--text binary: got a binary file; allowed: text: UTF-8 without NUL"),
        (("--text", "folder"), "--text folder: got a folder without any text; allowed: a folder with text files"),
        (("--text",), "tamegrad --text: got option '--text' requires an argument; allowed: the usage in its help"),
        (
            ("--strategy", "ClipL2PerLayr"),
            f"--strategy: got 'ClipL2PerLayr'; allowed: {quoted(STRATEGIES)}; closest: 'ClipL2PerLayer'; next: leave",
        ),
        (("--network", "gru"), "--network: got 'gru'; allowed: 'rnn', 'lstm'; closest: 'rnn'; next: "),
        (("--threshold", "0"), "--threshold: got 0.0; allowed: a number above 0, or inf to measure only; next: "),
        (("--threshold", "-1"), "--threshold: got -1.0; allowed: a number above 0"),
        (("--threshold", "nan"), "--threshold: got nan; allowed: a number above 0"),
        (("--threshold", "much"), "--threshold: got 'much'; allowed: a number; next: run tamegrad compare --help"),
        (
            ("--text", ""),
            "--text: got ''; allowed: a text file or a folder; next: leave it out for Python's own source",
        ),
        (
            ("--text", "x" * 5000),
            f"--text {'x' * 143}...{'x' * 150}: got a path that cannot be read (File name too long)",
        ),
        (("--text", "\x1b[2J"), r"--text \x1b[2J: got a path that does not exist"),
        (("--text", "two\nlines"), r"--text two\nlines: got a path that does not exist"),
        (("--text", "caf\udce9"), r"--text caf\xe9: got a path that does not exist"),
        (
            ("--steps", "0"),
            "--steps: got 0; allowed: a whole number from 1 to 1,000,000,000; next: leave it out for 300",
        ),
        (("--steps", "-3"), "--steps: got -3; allowed: a whole number from 1"),
        (("--steps", "9" * 400), f"--steps: got {'9' * 150}...{'9' * 150}; allowed: a whole number from 1"),
        (("--steps", "9" * 5000), f"--steps: got '{'9' * 149}...{'9' * 149}'; allowed: a whole number"),
        (("--seeds", "0"), "--seeds: got 0; allowed: a whole number from 1 to 1,000; next: leave it out for 1"),
        (("--seeds", "2.5"), "--seeds: got '2.5'; allowed: a whole number; next: "),
        (("--steps", "1.5"), "--steps: got '1.5'; allowed: a whole number; next: "),
        (("--seed", "-1"), "--seed: got -1; allowed: a whole number from 0 to 2**63 - 1"),
        (("--lr", "0"), "--lr: got 0.0; allowed: a number from 1.2e-38 to 3.4e+38; next: leave it out for 0.25"),
        (("--lr", "nan"), "--lr: got nan; allowed: a number from"),
        (("--lr", "1e308"), "--lr: got 1e+308; allowed: a number from"),
        (("--lr", "9" * 400), "--lr: got inf; allowed: a number from"),
        (("--out", "x" * 300), "--out xxx"),
        (("--out", ""), "--out: got ''; allowed: the path of a folder; next: leave it out for tamegrad-compare"),
        (("--out", "/"), "--out: got '/'; allowed: the path of a folder"),
        (
            ("--out", "short.txt/below"),
            "--out short.txt/below: got a path that cannot be written to (Not a directory)",
        ),
        (
            ("--treshold", "1"),
            f"tamegrad compare: got unknown option '--treshold'; allowed: {', '.join(OPTIONS)}, --help; closest: '--t",
        ),
        (
            ("corpus.txt",),
            "tamegrad compare: got unexpected extra argument (corpus.txt); allowed: the usage in its help",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "binary").write_bytes(b"text\0" * 4000)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("compare", *arguments)
    assert (code, out) == (2, "")
    assert err.removeprefix("tamegrad: ").startswith(message)
    assert LINE.fullmatch(err)
    assert sorted(tmp_path.rglob("*")) == before


# Paths and disks


def test_an_unwritable_folder_is_refused_before_training(run: Run, song: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = run("compare", "--text", song)
    assert code == 2
    assert err == (
        "tamegrad: --out tamegrad-compare: got a path that cannot be written to (Permission denied); "
        "allowed: a folder that can be made and written to, with space for some megabytes; "
        "next: pass another folder to --out\n"
    )


def test_a_full_disk_is_refused_before_training(run: Run, song: str, tmp_path: Path) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))
    try:
        code, out, err = run("compare", "--text", song)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert (code, out) == (2, "")
    assert err.startswith("tamegrad: --out tamegrad-compare: got a path that cannot be written to (File too large); ")
    assert LINE.fullmatch(err)
    assert list(tmp_path.iterdir()) == []


def full(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Lets nothing more be written to these folders, as if their disks were full."""
    write_text = Path.write_text

    def refuse(path: Path, *given: Any, **options: Any) -> int:
        if path.parent.resolve() in folders:
            raise OSError(28, "No space left on device")
        return write_text(path, *given, **options)

    monkeypatch.setattr(Path, "write_text", refuse)


def test_a_disk_that_is_full_after_training_loses_nothing(
    run: Run, song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full(monkeypatch, tmp_path / "study")
    code, out, err = run("compare", "--text", song, "--steps", "1", "--strategy", "None", "--out", "study")
    assert code == 2
    (elsewhere,) = tmp_path.glob("tamegrad-compare-*")
    assert numbers(elsewhere)["runs"][0]["strategy"] == "None"
    assert f"Page:    {elsewhere}/index.html" in out
    assert err.splitlines()[-1] == (
        "tamegrad: --out study: got a path that cannot be written to (No space left on device); allowed: a folder that "
        f"can be made and written to, with space for some megabytes; next: find the results in {elsewhere}"
    )


def test_with_every_disk_full_the_numbers_are_still_shown(
    run: Run, song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    full(monkeypatch, tmp_path / "study")
    code, out, err = run("compare", "--text", song, "--steps", "1", "--strategy", "None", "--out", "study")
    assert code == 2
    assert " None " in out
    assert "Page:" not in out
    assert "(No space left on device)" in err.splitlines()[-1]


def test_paths_that_are_not_utf8_lose_nothing(
    run: Run, song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caf\udce9.txt").write_text(Path(song).read_text())
    given = ("compare", *QUICK, "--text", "caf\udce9.txt", "--out", "out\udce9")
    monkeypatch.setattr(sys, "argv", ["tamegrad", *given])
    code, out, _ = run(*given)
    assert code == 0
    document = numbers(tmp_path / "out\udce9")
    assert document["text"]["source"] == r"caf\xe9.txt"
    assert document["environment"]["command"].endswith(r"--text 'caf\xe9.txt' --out 'out\xe9'")
    assert r"Page:    out\xe9/index.html" in out


def test_control_characters_in_a_path_do_not_reach_the_terminal(run: Run, song: str) -> None:
    code, out, _ = run("compare", *QUICK, "--text", song, "--out", "\x1b[2J")
    assert (code, "\x1b" in out) == (0, False)
    assert r"Page:    \x1b[2J/index.html" in out


# Ctrl-C


def test_an_interrupt_keeps_the_results_so_far(
    run: Run, song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Bars, record: Any) -> None:
        if record.strategy == "RenormalizeL2PerLayer" and len(record.steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "after_step", interrupt)
    code, out, _ = run("compare", "--text", song, "--steps", "3")
    assert code == 130
    assert "Partial: interrupted" in out
    document = numbers(tmp_path / "tamegrad-compare")
    assert document["partial"] is True
    assert [(one["strategy"], one["ended"], len(one["train_loss"])) for one in document["runs"]] == [
        ("None", "completed", 3),
        ("RenormalizeL2PerLayer", "interrupted", 2),
    ]
    assert "This comparison was interrupted" in (tmp_path / "tamegrad-compare" / "index.html").read_text()


def interrupting(presses: int) -> Callable[[ByteNetwork, Tensor], Tensor]:
    """The network's loss, with Ctrl-C pressed during the fourth call, which is in step 2."""
    loss, calls = ByteNetwork.loss, itertools.count(1)

    def interrupted(network: ByteNetwork, batch: Tensor) -> Tensor:
        for _ in range(presses if next(calls) == 4 else 0):
            signal.raise_signal(signal.SIGINT)
        return loss(network, batch)

    return interrupted


@pytest.mark.parametrize(("presses", "steps"), [(1, 2), (2, 1)])
def test_an_interrupt_within_a_step_waits_for_its_end_unless_pressed_again(
    presses: int, steps: int, run: Run, song: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteNetwork, "loss", interrupting(presses))
    code, out, _ = run("compare", "--text", song, "--steps", "3", "--strategy", "ClipL2PerLayer")
    assert (code, "Partial: interrupted" in out) == (130, True)
    (trained,) = numbers(Path("tamegrad-compare"))["runs"]
    assert (trained["ended"], len(trained["train_loss"])) == ("interrupted", steps)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored(run: Run, song: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteNetwork, "loss", interrupting(2))
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, out, _ = run("compare", "--text", song, "--steps", "3", "--strategy", "ClipL2PerLayer")
    finally:
        signal.signal(signal.SIGINT, usual)
    assert (code, "Partial" in out) == (0, False)


@pytest.fixture
def long_run(song: str, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    arguments = ["compare", "--text", song, "--steps", "1000000", "--strategy", "ClipL2PerLayer"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tamegrad", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    yield process
    process.kill()
    process.communicate()


def test_a_real_interrupt_keeps_the_results_so_far(long_run: "subprocess.Popen[str]", tmp_path: Path) -> None:
    folder = tmp_path / "tamegrad-compare"
    deadline = time.monotonic() + 60
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    long_run.send_signal(signal.SIGINT)
    out, err = long_run.communicate(timeout=60)
    assert (long_run.returncode, "Traceback" in err, "Partial: interrupted" in out) == (130, False, True), err
    assert numbers(folder)["partial"] is True
    assert (folder / "index.html").is_file()


def test_an_interrupt_before_training_ends_quietly(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "read_text", interrupt)
    code, _, err = run("compare")
    assert (code, err.strip()) == (130, "tamegrad: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_the_files_are_written_does_not_lose_them(
    run: Run, song: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Path:
        signal.raise_signal(signal.SIGINT)
        return write_results(*given)

    monkeypatch.setattr("tamegrad.study.files.write_results", interrupted)
    code, out, _ = run("compare", "--text", song, *QUICK)
    assert (code, "Page:" in out, "Partial" in out) == (0, True, False)
    assert sorted(path.name for path in (tmp_path / "tamegrad-compare").iterdir()) == ["index.html", "results.json"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
