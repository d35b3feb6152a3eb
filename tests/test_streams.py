"""Standard streams that are full, closed, read by nobody, or of an encoding that lacks characters; and early Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.dl4j_files import MODELS

# Fast: it imports neither PyTorch nor plotly.
TABLE = ("dl4j", str(MODELS / "wrapped.zip"))
MAIN = "from tamegrad_command import main\nmain()"

needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full device")


def run(
    *arguments: str, first: str = "", stdout: Any = subprocess.PIPE, **options: Any
) -> "subprocess.CompletedProcess[bytes]":
    """Runs the command in a process of its own, after some Python."""
    return subprocess.run(
        [sys.executable, "-c", f"{first}\n{MAIN}", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
        timeout=120,
        **options,
    )


@pytest.fixture
def study(tmp_path: Path) -> tuple[str, ...]:
    """A short comparison in an empty folder."""
    (tmp_path / "song.txt").write_text("ninety-nine bottles of beer on the wall\n" * 400)
    folder = str(tmp_path / "study")
    return ("compare", "--text", str(tmp_path / "song.txt"), "--steps", "1", "--strategy", "None", "--out", folder)


@needs_full_device
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("compare", "--help"), TABLE, (*TABLE, "--python")])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_device_is_one_line(arguments: tuple[str, ...], encoding: str, unbuffered: str) -> None:
    with Path("/dev/full").open("wb") as device:
        done = run(
            *arguments, stdout=device, env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered}
        )
    assert done.returncode == 2
    assert done.stderr.decode() == (
        "tamegrad: standard output: got a place that cannot be written to (No space left on device); allowed: a "
        "terminal, a pipe or a file with space left; next: free some space, or send the output elsewhere\n"
    )


@needs_full_device
def test_a_full_device_after_training_names_the_results(study: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as device:
        done = run(*study, stdout=device)
    assert done.returncode == 2
    assert done.stderr.decode().endswith(f"next: open {tmp_path}/study/index.html\n")
    assert (tmp_path / "study" / "index.html").is_file()
    assert (tmp_path / "study" / "results.json").is_file()


@needs_full_device
def test_without_a_reader_and_without_space_for_the_progress_the_files_are_written(
    study: tuple[str, ...], tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(*study, stdout=writer, first="import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)")
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "study" / "index.html").is_file()


@needs_full_device
def test_an_error_that_cannot_be_shown_keeps_its_exit_code() -> None:
    done = run("dl4j", "missing.zip", first="import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)")
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("arguments", [("--help",), TABLE])
def test_a_pipe_that_nobody_reads_is_no_error(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(*arguments, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(("arguments", "code"), [(TABLE, 0), (("--help",), 0), (("dl4j", "missing.zip"), 2)])
def test_a_closed_stream_is_no_error(stream: str, arguments: tuple[str, ...], code: int) -> None:
    done = run(*arguments, first=f"import sys; sys.{stream}.close(); sys.{stream} = None")
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_will_do(encoding: str) -> None:
    done = run(*TABLE, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    (row,) = [line for line in done.stdout.decode(encoding).splitlines() if "no parameters" in line]
    assert ("–" if encoding == "utf-8" else "-") in row


def test_ctrl_c_while_modules_are_imported_is_one_line() -> None:
    # What NumPy does when its import is interrupted: it raises an ImportError instead.
    first = (
        "import builtins, signal\n"
        "usual = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'numpy':\n"
        "        try:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "        except KeyboardInterrupt:\n"
        "            raise ImportError('broken') from None\n"
        "    return usual(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
    )
    done = run(*TABLE, first=first)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"tamegrad: interrupted\n")


def test_ctrl_c_at_any_time_is_one_line_at_most() -> None:
    # Says when the command has begun; what Python does before, nobody can change.
    first = (
        "import os, signal\n"
        "usual = signal.signal\n"
        "def begun(*given):\n"
        "    usual(*given)\n"
        "    os.write(1, b'x')\n"
        "signal.signal = begun\n"
    )
    for milliseconds in range(0, 400, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", f"{first}{MAIN}", *TABLE],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) in {(130, b"tamegrad: interrupted\n"), (0, b""), (130, b"")}


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    first = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.raise_signal(signal.SIGINT)"
    assert run(*TABLE, first=first).returncode == 0
