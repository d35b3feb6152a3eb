"""Gives the same hostile gradients to torch, optax, Keras and tamegrad, and says what became of them.

Run `python benchmarks/hostile.py`; with `--write FILE` it writes the page of the documentation. torch must be there;
optax and Keras are left out, and the output says so, where they are not installed.
"""

import argparse
import datetime as dt
import importlib
import importlib.util
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hostile_inputs import INPUTS, Input
from hostile_judge import MEANINGS, ROUNDINGS, Tool, Verdict, Word, outcome

__all__ = ["Column", "columns", "judge_all", "main", "page", "table"]

# The file of a framework's tools, what must be there for it, and how to install that.
_FRAMEWORKS = (
    ("hostile_torch", "TORCH", ("torch",), "pip install torch"),
    ("hostile_optax", "OPTAX", ("optax", "jax"), "pip install optax jax"),
    ("hostile_keras", "KERAS", ("keras",), "pip install keras"),
    ("hostile_torch", "TAMEGRAD", ("tamegrad",), "pip install tamegrad"),
)


@dataclass(frozen=True)
class Column:
    """One tool and what became of every input under it, in the order of `INPUTS`."""

    tool: Tool
    verdicts: tuple[Verdict, ...]


def columns() -> tuple[list[Tool], list[str], list[str]]:
    """Finds the tools that are installed.

    Returns:
        The tools, what they are and their versions, and a line for each framework that is left out.
    """
    tools: list[Tool] = []
    versions: list[str] = []
    left_out: list[str] = []
    for file, name, needed, advice in _FRAMEWORKS:
        if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
            left_out.append(f"{' and '.join(missing)} not installed, its columns are left out: {advice}")
            continue
        module = importlib.import_module(file)
        tools += getattr(module, name)
        versions.append(module.versions())
    return tools, list(dict.fromkeys(versions)), left_out


def judge_all(tools: Sequence[Tool], inputs: Sequence[Input] = INPUTS) -> list[Column]:
    """Gives every input to every tool.

    Args:
        tools: The tools.
        inputs: The inputs.

    Returns:
        One column a tool.
    """
    with _reproducibly():
        return [Column(tool, tuple(outcome(tool, row) for row in inputs)) for tool in tools]


@contextmanager
def _reproducibly() -> Iterator[None]:
    """One thread, for the order of a sum is part of what is measured; and no warnings, which are no outcome."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def table(judged: Sequence[Column], inputs: Sequence[Input] = INPUTS) -> str:
    """Lays the verdicts out.

    Args:
        judged: The columns.
        inputs: The inputs they were given.

    Returns:
        A Markdown table, one row an input.
    """
    rows = [
        ["input", *(column.tool.name for column in judged)],
        ["---"] * (len(judged) + 1),
        *([row.name, *(str(column.verdicts[index]) for column in judged)] for index, row in enumerate(inputs)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(judged: Sequence[Column], versions: Sequence[str], left_out: Sequence[str]) -> str:
    """Writes the page of the documentation.

    Args:
        judged: The columns.
        versions: What was compared.
        left_out: What was not, one line each.

    Returns:
        Markdown.
    """
    words = "\n".join(f"- **{word}**: {meaning}." for word, meaning in MEANINGS.items())
    today = dt.datetime.now(tz=dt.UTC).date()
    made = f"{today}, {', '.join(versions)}, {_platform()}, one thread"
    return _PAGE.format(
        made=made,
        left_out="".join(f"\n{line}.\n" for line in left_out),
        words=words,
        table=table(judged),
        roundings=ROUNDINGS,
        awkward=_not_right(judged),
    )


def _platform() -> str:
    return f"numpy {np.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}, CPU"


_PAGE = """\
# Hostile gradients

What becomes of gradients that real training produces and that clipping gets wrong: norms that overflow or underflow,
one NaN, a gradient that is sparse, shared or missing. The same gradients were given to every tool, on the CPU.

Made by `python benchmarks/hostile.py --write docs/hostile-gradients.md` on {made}.
{left_out}
{table}

The last two rows are no thresholds; the right outcome there is to raise.

## What the words mean

Each is computed from the gradients before and after, in float64, by the same few lines for every tool.

{words}

If several hold, the worst is shown. Small percentages differ between machines.

## How the tools were called

- The inputs below the first two were chosen because they are hard; with ordinary gradients every tool is right.
- Each tool is called as its documentation says, with its defaults, and judged by its own kind of group: the model, a
  layer, a variable (Keras `clipnorm`) or each value. optax runs under `jax.jit`, with `jax.enable_x64` where there is
  float64; Keras runs SGD from zero with a learning rate of 1, with `floatx` set to float64 where there is float64.
- {roundings} spacings of the dtype are allowed, which is 3% in bfloat16: rounding on the way is no fault.
- A gradient that two parameters share may count once or twice, for frameworks differ in whether it is one.
- Renormalizing is not in the table, for only tamegrad has it.

## Where tamegrad is not right

{awkward}

Under its default `on_nonfinite="keep"` tamegrad leaves a group that holds NaN or infinity exactly as it is, and its
report says so. Under `Clip(per="model")` that group is the whole model, so nothing is clipped in such a step; under
`ClipValue` it is the layer, so the layer's other values are not cut either, where the other tools cut them and make
the threshold of an infinity. `on_nonfinite="zero"`, `"skip"` or `"raise"` do something about such a group.
"""


def _not_right(judged: Sequence[Column]) -> str:
    """Lists where tamegrad left gradients other than right, or refused what it should do."""
    lines = [
        f"- {column.tool.name}, {row.name}: {verdict}."
        for column in judged
        for row, verdict in zip(INPUTS, column.verdicts, strict=True)
        if column.tool.name.startswith("tamegrad")
        and verdict.word != (Word.RIGHT if row.threshold > 0 else Word.RAISED)
    ]
    return "\n".join(lines) or "Nowhere in this table."


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or writes the page.

    Args:
        arguments: The command line; None for that of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description="Give the same hostile gradients to torch, optax, Keras and tamegrad.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="also write the page of the documentation")
    options = parser.parse_args(arguments)
    tools, versions, left_out = columns()
    print("\n".join([*versions, _platform(), *left_out]), end="\n\n")
    judged = judge_all(tools)
    print(table(judged))
    if options.write is not None:
        options.write.write_text(page(judged, versions, left_out), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
