"""Times tamegrad and the clipping of other libraries, in one run, on the shapes of real models.

Run `make bench`, or `python benchmarks/speed.py`; with `--write FILE` it also writes the documentation page and its
pictures. It first runs the contract suite and reports nothing if that fails: wrong results need not be fast. If optax
or smartclip is not installed, it is left out, and the output says so.
"""

import argparse
import datetime as dt
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from speed_measure import measure_case, measure_growth
from speed_models import cases
from speed_page import Results, page, tables
from speed_sharded import measure_first_calls, measure_sharded
from speed_start import measure_first_steps
from speed_steps import measure_shares
from speed_tools import left_out, versions

__all__ = ["CONTRACT", "main", "measure"]

ROOT = Path(__file__).parents[1]
# This must pass before anything is reported.
CONTRACT = ROOT / "tests" / "contract"
GROWTH = (10, 100, 1000, 10_000)
CASE_SECONDS, GROWTH_SECONDS = 10.0, 3.0


def measure(*, quick: bool) -> Results:
    """Takes all measurements.

    Args:
        quick: Whether to use tiny models and one round: a smoke test, whose numbers mean nothing.

    Returns:
        The measurements.
    """
    measured = []
    for case in cases(quick=quick):
        print(f"timing {case.name}", file=sys.stderr)
        measured.append(measure_case(case, 0.0 if quick else CASE_SECONDS))
    print("timing growing numbers of layers, and training steps", file=sys.stderr)
    known = {} if quick else {1000: measured[2].nothing}
    growth = measure_growth((1, 2) if quick else GROWTH, 0.0 if quick else GROWTH_SECONDS, known)
    shares = measure_shares(quick=quick)
    print("timing sharded models", file=sys.stderr)
    on_ranks = measure_sharded(quick=quick), measure_first_calls(quick=quick)
    return Results(measured, growth, shares, *on_ranks, measure_first_steps(quick=quick))


def contract_passes() -> bool:
    """Returns whether the contract suite passes; runs it in its own process."""
    print("running the contract suite, which takes a minute or two", file=sys.stderr)
    command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", str(CONTRACT)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)  # noqa: S603  our own tests
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
    return done.returncode == 0


def provenance() -> str:
    """Returns when, on what machine and with which versions this runs."""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    today = dt.datetime.now(tz=dt.UTC).date()
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return f"{today}, commit {_commit()}, on the CPU ({_processor()}, {threads}), {versions()}, {system}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)  # noqa: S603  no input
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables, and writes the page if asked to.

    Args:
        arguments: The command-line arguments; None for those of the process.

    Returns:
        The exit code: 1 if the contract suite fails.
    """
    parser = argparse.ArgumentParser(description="Time tamegrad and the clipping of other libraries.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="also write the documentation page")
    parser.add_argument("--quick", action="store_true", help="tiny models and one round; the numbers mean nothing")
    options = parser.parse_args(arguments)
    if options.write is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--write draws pictures, which needs matplotlib: pip install matplotlib")
    if not contract_passes():
        print("The contract suite fails: nothing is reported. Fix its failures, then run this again.", file=sys.stderr)
        return 1
    started, load = provenance(), os.getloadavg()[0]
    results = measure(quick=options.quick)
    load = max(load, os.getloadavg()[0])
    made = f"{started}, load average {load:.1f}"
    missing = [f"{name} is left out, because it is not installed: pip install {name}" for name in left_out()]
    print("\n".join([made, *missing]), end="\n\n")
    laid_out = tables(results)
    print(laid_out)
    if options.write is not None:
        # Only this needs matplotlib.
        from speed_pictures import draw  # noqa: PLC0415

        pictures = draw(options.write.parent / "pictures", results.measured, results.growth, results.sharded)
        options.write.write_text(page(laid_out, made, missing, pictures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
