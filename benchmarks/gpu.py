"""Checks and times tamegrad on one GPU, and writes `docs/speed-gpu.md`.

    make gpu                                            # or, where nothing but the repository, PyTorch and Triton is:
    python benchmarks/gpu.py --write docs/speed-gpu.md
    python benchmarks/gpu.py --only correct,graph --budget 120
    python benchmarks/gpu.py --dry-run                  # tiny sizes on the CPU, Triton interpreted; under two minutes

Every section runs in a process of its own with a time limit: one that crashes, hangs or loses the GPU loses nothing but
itself. What it found so far is on disk, one line of JSON each, in `--out`. A short table is printed last. Without a GPU
it says so, does the dry run, and writes no page.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu_names import BACKENDS, DTYPES, TITLES  # noqa: E402
from gpu_page import page, table  # noqa: E402  scripts, in no package

Record: TypeAlias = dict[str, Any]

# With less time left than this no section is started.
LEAST_SECONDS = 12.0


@dataclass(frozen=True)
class Section:
    """One part of the run.

    Args:
        name: What `gpu_section.py` runs, with its arguments after colons.
        seconds: How long it may take.
        beside: Whether others may run beside it: nothing is timed.
    """

    name: str
    seconds: float
    beside: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a section ended.

    Args:
        section: Its name.
        ended: "ok", or how it died.
        records: What it found until then.
        log: The end of what it printed, if it died.
    """

    section: str
    ended: str
    records: Sequence[Record] = ()
    log: str = ""


def sections(only: str, *, dry: bool) -> list[Section]:
    """Lists the sections: first what is right or wrong, then what is timed.

    Args:
        only: The beginnings of names, with commas between them; all without.
        dry: Whether it is a dry run, of fewer.
    """
    dtypes = DTYPES[1:2] if dry else DTYPES
    listed = [Section("env", 45)]
    listed += [Section(f"correct:{backend}:{dtype}", 110, beside=True) for backend in BACKENDS for dtype in dtypes]
    topics = ("hazard", "fsdp") if dry else ("graph", "hazard", "fsdp")
    listed += [Section(f"{topic}:{backend}", 80, beside=True) for topic in topics for backend in BACKENDS]
    listed += [Section(f"launches:{backend}", 45) for backend in BACKENDS]
    listed += [Section(f"time:{model}", 50) for model in (["gpt2"] if dry else TITLES)] + [Section("train", 50)]
    wanted = [name for name in only.split(",") if name]
    return [s for s in listed if not wanted or any(f"{s.name}:".startswith(f"{name}:") for name in wanted)]


def run_section(section: Section, seconds: float, out: Path, *, dry: bool) -> Outcome:
    """Runs one section in a process of its own.

    Args:
        section: The section.
        seconds: The time that it gets.
        out: Where its records and what it prints go.
        dry: Whether to run it on the CPU.
    """
    path = out / f"{section.name.replace(':', '_')}.jsonl"
    path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "gpu_section.py"), section.name, str(path), str(seconds), "--dry-run" * dry]
    settings = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(HERE.parent / "src")}
    if dry:
        settings["TRITON_INTERPRET"] = "1"
    log, began = path.with_suffix(".log"), time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(  # noqa: S603  our own scripts
            list(filter(None, command)), stdout=output, stderr=subprocess.STDOUT, env=settings
        )
        try:
            code = process.wait(timeout=seconds + 5)
            ended = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = "time limit"
    text = log.read_text(errors="replace")[-1500:]
    print(f"[{time.monotonic() - began:5.1f} s] {section.name}: {ended}", flush=True)
    return Outcome(section.name, ended, read_records(path), "" if ended == "ok" else text)


def read_records(path: Path) -> list[Record]:
    """Reads the records of a section; the last line of one that died may not be whole."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def run_all(listed: Sequence[Section], budget: float, out: Path, *, dry: bool, workers: int) -> list[Outcome]:
    """Runs sections, those that allow it beside each other, as long as there is time.

    Args:
        listed: The sections.
        budget: Seconds for all.
        out: As in `run_section`.
        dry: As in `run_section`.
        workers: How many run beside each other.
    """
    ends = time.monotonic() + budget

    def one(section: Section) -> Outcome:
        left = ends - time.monotonic() - 6
        if left < LEAST_SECONDS:
            print(f"[  -    ] {section.name}: left out, no time", flush=True)
            return Outcome(section.name, "left out, no time")
        return run_section(section, min(section.seconds, left), out, dry=dry)

    outcomes = [one(section) for section in listed if section.name == "env"]
    with ThreadPoolExecutor(workers) as pool:
        outcomes += pool.map(one, [section for section in listed if section.beside])
    return outcomes + [one(section) for section in listed if not section.beside and section.name != "env"]


def has_gpu() -> bool:
    """Returns whether there is a GPU; asked in another process, so that this one does not hold it."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, Triton interpreted")
    parser.add_argument("--only", default="", help="sections, by the beginnings of their names: correct:gpu,time:gpt2")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for everything (default: 460)")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="the folder of the records")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also write the documentation page")
    given = parser.parse_args(arguments)
    dry = given.dry_run
    if not dry and not has_gpu():
        print("No GPU was found: torch.cuda.is_available() is False. This is a dry run, on the CPU.\n", flush=True)
        dry = True
    out = Path(given.out or tempfile.mkdtemp(prefix="tamegrad_gpu_"))
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(sections(given.only, dry=dry), given.budget, out, dry=dry, workers=2 if dry else 6)
    (out / "gpu.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    print(f"\n{table(outcomes)}\n\nrecords: {out / 'gpu.json'}")
    if given.write and not dry:
        given.write.write_text(page(outcomes))
    elif given.write:
        print(f"{given.write} was not written: there is nothing to say about GPUs.")
    return 0 if all(outcome.ended == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
