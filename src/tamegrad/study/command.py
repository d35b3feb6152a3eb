"""The command `tamegrad compare`: its options, the checks before training, and the files it writes."""

import itertools
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click

from tamegrad import __version__
from tamegrad.errors import SettingError
from tamegrad.study.settings import LEARNING_RATES, NETWORKS, SEED, STEPS, STRATEGIES, THRESHOLDS, Settings
from tamegrad.study.text import read_text

__all__ = ["compare"]

OUT = "tamegrad-compare"

NumberT = TypeVar("NumberT")

_HELP = """Train one network under each strategy and recommend one.

The same recurrent network is trained on the same text from the same seed, once under each of Deeplearning4j's six
gradient normalizations and once under PyTorch's global clip (torch-global). The command prints a table and a
recommendation, and writes a folder with results.json and index.html (open it in a browser, no network needed).

The defaults make training unstable on purpose: without normalization the rnn's loss is not finite after a few steps.
They take about a minute. Ctrl-C keeps the results so far.
"""

_EPILOG = """\b
Examples:
  tamegrad compare
  tamegrad compare --text my-corpus/ --network lstm
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


@click.command(help=_HELP, epilog=_EPILOG, short_help="Train one network under each strategy and recommend one.")
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
    lr: float | None,
    out: str,
) -> None:
    """Checks the settings, trains, writes the files and prints the results."""
    settings = Settings(network, strategies, threshold, steps, seed, lr)
    corpus = read_text(None if text is None else Path(text))
    # Imported late, because they load PyTorch and plotly: help and setting errors come at once.
    from tamegrad.study.compare import compare as train_all
    from tamegrad.study.page import write_page
    from tamegrad.study.results import make_results, read_results, write_results
    from tamegrad.study.table import Bars, print_results

    folder = _new_folder(out)
    started, clock = datetime.now(UTC), time.perf_counter()
    with Bars(settings) as bars:
        comparison = train_all(settings, corpus, bars.after_step)
    results = make_results(comparison, _environment(started, time.perf_counter() - clock))
    try:
        numbers = write_results(results, folder)
        # Made from the written file, so that the page shows only what the file holds.
        page = write_page(read_results(numbers), folder)
    except OSError as error:
        raise _not_writable(str(folder), error) from error
    print_results(results)
    click.echo(f"Page:    {page}\nNumbers: {numbers}")
    if comparison.partial:
        click.echo("Partial: interrupted; these are the results so far.")
        raise click.Abort


def _new_folder(out: str) -> Path:
    """Makes the folder or, if that path exists, one beside it with the next free number."""
    wanted = Path(out)
    if not out or not wanted.resolve().name:
        raise SettingError("--out", got=repr(out), allowed="the path of a folder", advice=f"leave it out for {OUT}")
    # The name of "." or ".." is only known once resolved.
    base = wanted if wanted.name not in {"", ".."} else wanted.resolve()
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _not_writable(out, error) from error
        return folder
    raise AssertionError  # count never ends


def _not_writable(out: str, error: OSError) -> SettingError:
    return SettingError(
        f"--out {out}",
        got=f"a path that cannot be written to ({error.strerror})",
        allowed="a folder that can be made and written to",
        advice="pass another folder to --out",
    )


def _environment(started: datetime, seconds: float) -> dict[str, Any]:
    """Returns the command line, time, versions and machine of the results."""
    packages = ("torch", "numpy", "plotly")
    return {
        "command": shlex.join(["tamegrad", *sys.argv[1:]]),
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
