"""The command `tamegrad compare`: its options, the checks before training, and the files it writes."""

import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tamegrad import __version__
from tamegrad.errors import SettingError
from tamegrad.streams import OutputError, ReaderGoneError, printable
from tamegrad.study.settings import LEARNING_RATES, NETWORKS, OUT, SEED, SEEDS, STEPS, STRATEGIES, THRESHOLDS, Settings
from tamegrad.study.text import read_text

if TYPE_CHECKING:
    from tamegrad.study.files import Files
    from tamegrad.study.results import Results

__all__ = ["compare"]

NumberT = TypeVar("NumberT")

_HELP = """Train one network under each strategy and compare them.

The same recurrent network is trained on the same text from the same seed, once under each of Deeplearning4j's six
gradient normalizations and once under PyTorch's global clip (torch-global). The command prints a table and what it
shows, and writes a folder with results.json and index.html (open it in a browser, no network needed).

One seed shows which strategies train. With several (--seeds 5) the command recommends one, if its lead is significant.

The defaults make training unstable on purpose: without normalization the rnn's loss is not finite after a few steps.
They take about a minute for each seed. Ctrl-C keeps the results so far.
"""

_EPILOG = """\b
Examples:
  tamegrad compare
  tamegrad compare --text my-corpus/ --network lstm
  tamegrad compare --text my-corpus/ --seeds 5
  tamegrad compare --strategy ClipL2PerLayer --strategy torch-global --threshold 0.5
  tamegrad compare --steps 1000 --lr 0.05 --out my-study
"""


def _reader(
    read: Callable[[str], NumberT], allowed: str
) -> Callable[[click.Context, click.Parameter, str | None], NumberT | None]:
    """Returns a click callback that reads an option's number, or raises a `SettingError`."""

    def read_option(_: click.Context, option: click.Parameter, written: str | None) -> NumberT | None:
        try:
            return None if written is None else read(written)
        except ValueError:
            advice = "run tamegrad compare --help to see the defaults"
            raise SettingError(option.opts[0], got=repr(written), allowed=allowed, advice=advice) from None

    return read_option


_number_option = partial(click.option, metavar="NUMBER", callback=_reader(float, "a number"))
# `type=str`: otherwise click takes the type from the default, and raises its own error first.
_whole_number_option = partial(
    click.option, type=str, metavar="N", callback=_reader(int, "a whole number"), show_default=True
)


def _per_name(values: dict[str, float]) -> str:
    return ", ".join(f"{value:g} for {name}" for name, value in values.items())


@click.command(help=_HELP, epilog=_EPILOG, short_help="Train one network under each strategy and compare them.")
@click.option(
    "--text",
    metavar="FILE_OR_FOLDER",
    help="Training text: a UTF-8 file, or a folder, whose text files are read recursively, except hidden ones; "
    "up to 2,000,000 bytes.  [default: the source of Python's standard library]",
)
@click.option(
    "--network",
    metavar="|".join(NETWORKS),
    default="rnn",
    show_default=True,
    help="Two stacked recurrent layers: ReLU or LSTM.",
)
@click.option(
    "--strategy",
    "strategies",
    metavar="NAME",
    multiple=True,
    help=f"Train only under this strategy; can be repeated. One of {', '.join(STRATEGIES)}.  [default: all]",
)
@_number_option(
    "--threshold",
    help=f"The threshold of every strategy that has one.  [default: {_per_name(THRESHOLDS)}]",
)
@_whole_number_option("--steps", default=STEPS, help="Training steps per run.")
@_whole_number_option("--seed", default=SEED, help="The same seed gives the same numbers on the same machine.")
@_whole_number_option(
    "--seeds", default=SEEDS, help="Repeat the comparison with this many seeds: the one given, and those after it."
)
@_number_option(
    "--lr",
    help=f"Learning rate of plain SGD, the same for every strategy.  [default: {_per_name(LEARNING_RATES)}]",
)
@click.option(
    "--out",
    metavar="FOLDER",
    default=OUT,
    show_default=True,
    help="Output folder. If it exists, a numbered folder beside it is used instead.",
)
def compare(
    *,
    text: str | None,
    network: str,
    strategies: tuple[str, ...],
    threshold: float | None,
    steps: int,
    seed: int,
    seeds: int,
    lr: float | None,
    out: str,
) -> None:
    """Checks the settings, trains, writes the files and prints the results."""
    settings = Settings(network, strategies, threshold, steps, seed, seeds, lr)
    if text == "":  # pathlib takes it for the current folder
        raise SettingError(
            "--text", got="''", allowed="a text file or a folder", advice="leave it out for Python's own source"
        )
    corpus = read_text(None if text is None else Path(text))
    # Imported late, because they load PyTorch and plotly: help and setting errors come at once.
    from tamegrad.study.compare import compare as train_all
    from tamegrad.study.files import new_folder, write_files
    from tamegrad.study.results import make_results
    from tamegrad.study.table import Bars

    with _results_kept():
        folder = new_folder(out)
        started, clock = datetime.now(UTC), time.perf_counter()
        with Bars(settings) as bars:
            comparison = train_all(settings, corpus, bars.after_step)
        results = make_results(comparison, _environment(started, time.perf_counter() - clock))
        files = write_files(results, folder)
        _show(results, files)
    if files.error is not None:
        raise files.error
    if comparison.partial:
        raise click.Abort


@contextmanager
def _results_kept() -> Iterator[None]:
    """Ignores Ctrl-C within a `with` block, except while `compare` trains: results are written and shown first."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.SIG_IGN or usual is None:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _show(results: "Results", files: "Files") -> None:
    from tamegrad.study.table import print_results

    try:
        print_results(results)
        if files.page is not None:
            click.echo(f"Page:    {printable(str(files.page))}\nNumbers: {printable(str(files.numbers))}")
        if results["partial"]:
            click.echo("Partial: interrupted; these are the results so far.")
        sys.stdout.flush()
    except OutputError as error:
        if files.page is None:
            raise
        advice = f"open {printable(str(files.page))}"
        raise OutputError(error.where, got=error.got, allowed=error.allowed, advice=advice) from error
    except ReaderGoneError:
        return  # the files have it all


def _environment(started: datetime, seconds: float) -> dict[str, Any]:
    """Returns the command line, time, versions and machine of the results."""
    packages = ("torch", "numpy", "plotly")
    return {
        "command": printable(shlex.join(["tamegrad", *sys.argv[1:]])),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "tamegrad": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
    }
