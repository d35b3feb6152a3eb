"""Gives the same hostile gradients to torch, optax, Keras and tamegrad, and judges each outcome.

Run `python benchmarks/hostile.py`; with `--write FILE` it also writes the documentation page. torch is required; if
optax or Keras is not installed, its columns are left out, and the output says so.
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

# For each framework: the module and name of its tools, the packages it needs, and how to install them.
_FRAMEWORKS = (
    ("hostile_torch", "TORCH", ("torch",), "pip install torch"),
    ("hostile_optax", "OPTAX", ("optax", "jax"), "pip install optax jax"),
    ("hostile_keras", "KERAS", ("keras",), "pip install keras"),
    ("hostile_torch", "TAMEGRAD", ("tamegrad",), "pip install tamegrad"),
)


@dataclass(frozen=True)
class Column:
    """One tool and its verdict on every input, in the order of `INPUTS`."""

    tool: Tool
    verdicts: tuple[Verdict, ...]


def columns() -> tuple[list[Tool], list[str], list[str]]:
    """Finds the tools that are installed.

    Returns:
        The tools, the names and versions of their frameworks, and a line for each framework that is left out.
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
        One column per tool.
    """
    with _reproducibly():
        return [Column(tool, tuple(outcome(tool, row) for row in inputs)) for tool in tools]


@contextmanager
def _reproducibly() -> Iterator[None]:
    """Uses one thread, because the order of a sum affects the outcome, and hides warnings, which are not an outcome."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def table(judged: Sequence[Column], inputs: Sequence[Input] = INPUTS) -> str:
    """Returns the verdicts as a table.

    Args:
        judged: The columns.
        inputs: The inputs they were given.

    Returns:
        A Markdown table, one row per input.
    """
    rows = [
        ["input", *(column.tool.name for column in judged)],
        ["---"] * (len(judged) + 1),
        *([row.name, *(str(column.verdicts[index]) for column in judged)] for index, row in enumerate(inputs)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page(judged: Sequence[Column], versions: Sequence[str], left_out: Sequence[str]) -> str:
    """Returns the documentation page.

    Args:
        judged: The columns.
        versions: The names and versions of the frameworks.
        left_out: The frameworks that are left out, one line each.

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

How tools clip gradients that real training produces and that clipping often gets wrong: norms that overflow or
underflow, one NaN, a gradient that is sparse, shared or missing. Every tool got the same gradients, on the CPU.

Made by `python benchmarks/hostile.py --write docs/hostile-gradients.md` on {made}.
{left_out}
{table}

The thresholds of the last two rows are invalid; the right outcome there is an error.

## What the words mean

Each verdict is computed from the gradients before and after, in float64, by the same code for every tool.

{words}

If several apply, the worst is shown. Small percentages differ between machines.

## How the tools were called

- All inputs but the first two were chosen because they are hard; with ordinary gradients every tool is right.
- Each tool is called as its documentation says, with its defaults, and judged by its own kind of group: the model, a
  layer, a variable (Keras `clipnorm`) or each value. optax runs under `jax.jit`, with `jax.enable_x64` for
  float64 gradients; Keras runs SGD from zero with a learning rate of 1, with `floatx` set to float64 for them.
- Errors of up to {roundings} spacings of the dtype, 3% in bfloat16, count as right: they are rounding.
- A gradient that two parameters share may count once or twice, because frameworks differ in whether it is one tensor.
- Renormalization is not in the table, because only tamegrad has it.

## Where tamegrad is not right

{awkward}

Under its default `on_nonfinite="keep"` tamegrad leaves a group that holds NaN or infinity unchanged and reports it.
Under `Clip(per="model")` that group is the whole model, so nothing is clipped in such a step; under `ClipValue` it is
the layer, so its other values are not clipped either, while the other tools clip them and turn an infinity into the
threshold. `on_nonfinite="zero"`, `"skip"` or `"raise"` handles such a group.

## Groups that grow past their dtype

`Renormalize`, or a strategy of your own, can make a group larger, and under `torch.amp.GradScaler` a fused optimizer
leaves gradients multiplied by the loss scale. A float16 group of norm 1 under the default scale of 65,536 then has the
norm 65,536, while the largest float16 is 65,504.

- Elements decide, not norms: a group of which every element fits ends with its right norm.
- If an element would not fit, the group keeps its direction and ends with the largest norm that fits. The report shows
  it: `norm_after` is 0.9995 where one element has the whole norm of such a group. No element becomes infinite.
- The same goes for every dtype, every backend, sharded models and `tamegrad.normalize`.
- `Clip` and `ClipValue` never make anything larger, so no threshold is too large for a dtype.
"""


def _not_right(judged: Sequence[Column]) -> str:
    """Lists the inputs where tamegrad's outcome is not the right one."""
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
        arguments: The command-line arguments; None for those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description="Give the same hostile gradients to torch, optax, Keras and tamegrad.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="also write the documentation page")
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
