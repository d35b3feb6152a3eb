"""Compares steps inside backward with steps after it: memory, time, and the losses of a training run.

Run `make bench`, or `python benchmarks/in_backward.py`; with `--write FILE` it also draws the picture and replaces the
measurements on the documentation page, which are all that follows its heading `## Measured`.
"""

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from in_backward_measure import (
    AFTER,
    INSIDE,
    MIB,
    WIDTH,
    Memory,
    Time,
    Training,
    measure_memory,
    measure_time,
    measure_training,
)

__all__ = ["main", "tables"]

HEADING = "## Measured"
PICTURE = "step-in-backward.svg"
BLOCKS = (6, 24, 96)
# The last one has the width of GPT-2 124M.
TIMED = (*((blocks, WIDTH) for blocks in BLOCKS), (12, 768))
# What stepping inside backward may need: of the resident growth of the normal way, and of its time.
RESIDENT_AIM, TIME_AIM = 0.25, 1.1


def tables(memory: Sequence[Memory], times: Sequence[Time], training: Training) -> str:
    """Formats the measurements as Markdown.

    Args:
        memory: Of each number of blocks, after backward and then inside.
        times: The times of steps.
        training: A training run in both ways.

    Returns:
        Tables.
    """
    peaks: list[Sequence[str]] = [
        ("blocks", "parameters", "gradients, after", "inside", "resident growth, after", "inside", "targets met")
    ]
    for after, inside in zip(memory[::2], memory[1::2], strict=True):
        is_met = inside.live <= sum(inside.layers) and inside.resident <= RESIDENT_AIM * after.resident
        sizes = (inside.parameters, after.live, inside.live, after.resident, inside.resident)
        peaks.append((str(after.blocks), *(f"{size / MIB:.1f}" for size in sizes), _said(is_met)))
    steps: list[Sequence[str]] = [
        ("blocks", "width", "clipped", "after, s", "inside, s", "inside / after", "target met")
    ]
    for each in times:
        numbers = (f"{each.after:.3f}", f"{each.inside:.3f}", f"{each.ratio:.2f}")
        clipped = "everything" if each.clips else "nothing"
        steps.append((str(each.blocks), str(each.width), clipped, *numbers, _said(each.ratio <= TIME_AIM)))
    return f"""Peaks in MiB of a GPT of width {WIDTH} with AdamW and `Clip(0.1, per="layer")`. It is trained on
16 tokens, so that the memory is not of activations. Resident growth is over parameters and optimizer state. Targets:
gradients of at most the two largest layers, and {RESIDENT_AIM:.0%} of the resident growth.

{_table(peaks)}

CPU time of a whole training step on one thread, forward pass included, with 512 tokens. Target: at most
{TIME_AIM - 1:.0%} more. An optimizer and a decision a layer cost a fixed time, which shows where layers are small.

{_table(steps)}

A GPT of four blocks, trained for {training.steps} steps on the source of Python's standard library, goes from a loss of
{training.first:.3f} to {training.after!r} after backward and to {training.inside!r} inside it. All losses and all
parameters are equal to the last bit: {_said(training.is_equal)}."""


def _said(is_met: object) -> str:
    return "yes" if is_met else "**no**"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["--:"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables, and writes page and picture if asked to.

    Args:
        arguments: The command-line arguments; None for those of the process.

    Returns:
        The exit code: 1 if the two ways of training do not give the same bits.
    """
    parser = argparse.ArgumentParser(description="Compare steps inside backward with steps after it.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="also replace the measurements on this page")
    parser.add_argument("--quick", action="store_true", help="tiny models; the numbers mean nothing")
    options = parser.parse_args(arguments)
    if options.write is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--write draws a picture, which needs matplotlib: pip install matplotlib")
    memory = []
    for blocks in (1, 2) if options.quick else BLOCKS:
        print(f"measuring memory with {blocks} blocks", file=sys.stderr)
        memory += [measure_memory(blocks, way, quick=options.quick) for way in (AFTER, INSIDE)]
    times = []
    for blocks, width in ((1, WIDTH),) if options.quick else TIMED:
        print(f"timing steps with {blocks} blocks of width {width}", file=sys.stderr)
        times += [measure_time(blocks, width, clips=clips, quick=options.quick) for clips in (False, True)]
    print("training in both ways", file=sys.stderr)
    training = measure_training(quick=options.quick)
    text = tables(memory, times, training)
    print(text)
    if options.write is not None:
        # Only this needs matplotlib.
        from in_backward_picture import draw  # noqa: PLC0415

        draw(options.write.parent / "pictures" / PICTURE, memory)
        written = options.write.read_text(encoding="utf-8").partition(HEADING)[0]
        made = (
            f"`python benchmarks/in_backward.py` on {platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, torch {version('torch')}, load average {os.getloadavg()[0]:.0f}."
        )
        options.write.write_text(f"{written}{HEADING}\n\n{made}\n\n{text}\n", encoding="utf-8")
    return 0 if training.is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
