"""The command `tamegrad compare`: options, what is checked before training, and what is written."""

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

_HELP = """Train one network under each strategy and say which to use.

The same recurrent network is trained on the same text from the same seed, once under each of Deeplearning4j's six
gradient normalizations and once under PyTorch's global clip (torch-global). A table, a line that says which strategy
to use, and a folder with index.html (open it in a browser, no network needed) and results.json come out.

The defaults are chosen to show trouble: without normalization the loss of the rnn stops being finite after a few steps.
They take about a minute. Ctrl-C keeps what was measured so far.
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
    """Returns what reads the number that was written for an option; refuses others in the words of all our errors."""

    def read_option(_: click.Context, option: click.Parameter, written: str | None) -> NumberT | None:
        try:
            return None if written is None else read(written)
        except ValueError:
            advice = "tamegrad compare --help shows the defaults"
            raise SettingError(option.opts[0], got=repr(written), allowed=allowed, advice=advice) from None

    return read_option


_number_option = partial(click.option, metavar="NUMBER", callback=_reader(float, "a number"))
# As text, because click reads what has a default by itself, and refuses it in other words.
_whole_number_option = partial(
    click.option, type=str, metavar="N", callback=_reader(int, "a whole number"), show_default=True
)


def _per_name(values: dict[str, float]) -> str:
    return ", ".join(f"{value:g} for {name}" for name, value in values.items())


@click.command(help=_HELP, epilog=_EPILOG, short_help="Train one network under each strategy and say which to use.")
@click.option(
    "--text",
    metavar="FILE_OR_FOLDER",
    help="What to learn: a file of UTF-8 text, or a folder, of which all text files count, those in folders below too, "
    "but for hidden ones; up to 2,000,000 bytes.  [default: the source of Python's standard library]",
)
@click.option(
    "--network",
    metavar="|".join(NETWORKS),
    default="rnn",
    show_default=True,
    help="Two stacked recurrent layers: ReLU, or LSTM.",
)
@click.option(
    "--strategy",
    "strategies",
    metavar="NAME",
    multiple=True,
    help=f"Train under this one only; can be repeated. One of {', '.join(STRATEGIES)}.  [default: all]",
)
@_number_option(
    "--threshold",
    help=f"The threshold of every strategy that has one.  [default: {_per_name(THRESHOLDS)}]",
)
@_whole_number_option("--steps", default=STEPS, help="Training steps of each run.")
@_whole_number_option("--seed", default=SEED, help="The same seed gives the same numbers on one machine.")
@_number_option(
    "--lr",
    help=f"Learning rate of plain SGD, the same for every strategy.  [default: {_per_name(LEARNING_RATES)}]",
)
@click.option(
    "--out",
    metavar="FOLDER",
    default=OUT,
    show_default=True,
    help="Where to write. If it is there already, a new one beside it is taken.",
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
    """Checks everything, trains, writes and prints."""
    settings = Settings(network, strategies, threshold, steps, seed, lr)
    corpus = read_text(None if text is None else Path(text))
    # These load PyTorch and plotly: nobody waits for them to read a message about a setting, or the help.
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
        # Made from what was written, so that the page shows nothing that the file does not hold.
        page = write_page(read_results(numbers), folder)
    except OSError as error:
        raise _not_writable(str(folder), error) from error
    print_results(results)
    click.echo(f"Page:    {page}\nNumbers: {numbers}")
    if comparison.partial:
        click.echo("Partial: interrupted, this is what was measured until then.")
        raise click.Abort


def _new_folder(out: str) -> Path:
    """Makes the folder, or where something is already there, one beside it with the next number."""
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
        got=f"a place that cannot be written to ({error.strerror})",
        allowed="a folder that can be made and written to",
        advice="pass --out with another place",
    )


def _environment(started: datetime, seconds: float) -> dict[str, Any]:
    """Returns where the results are from."""
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
