"""The schema of `results.json`, the output of `tamegrad compare`, and functions to read and write it as strict JSON.

In the file, non-finite numbers are the strings "NaN", "Infinity" and "-Infinity". Losses are in nats per byte.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from tamegrad.study.compare import Comparison, recommend
from tamegrad.study.network import EMBEDDING, HIDDEN, STACKED
from tamegrad.study.settings import BATCH, DIVERGED_LOSS, LENGTH, UNIFORM_LOSS, strategy_of
from tamegrad.study.train import Run

__all__ = ["Results", "RunResults", "make_results", "read_results", "write_results"]

SCHEMA = 1
FILE_NAME = "results.json"
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class HeldOut(TypedDict):
    """The loss on held-out text; the lists have one entry per evaluation."""

    step: list[int]  # the number of steps done
    loss: list[float]


class RunResults(TypedDict):
    """One run; the lists have one entry per step, from step 1."""

    strategy: str
    means: str  # the strategy as tamegrad prints it
    threshold: float | None
    ended: Literal["completed", "non-finite", "interrupted"]
    diverged_at: int | None  # the first step with a training loss that is not finite or above settings.diverged_loss
    recovered: bool  # whether the run diverged, but ended under that limit
    first_loss: float | None  # on held-out text, before the first step
    final_loss: float | None  # on held-out text, the last one measured
    median_norm: float | None  # of the whole gradient before the strategy; a non-finite norm counts as the largest
    largest_norm: float | None
    clipped_share: float | None  # share of the steps in which the strategy shrank any group
    layer_clipped_share: dict[str, float]
    median_milliseconds: float | None
    train_loss: list[float]
    norm: list[float]
    layer_norms: dict[str, list[float]]
    layer_clipped: dict[str, list[int]]  # 0 or 1
    milliseconds: list[float]
    held_out: HeldOut


class Results(TypedDict):
    """All of `results.json`."""

    schema: int
    partial: bool  # whether Ctrl-C ended it early
    recommended: str | None
    recommendation: str
    settings: dict[str, Any]
    text: dict[str, Any]
    environment: dict[str, Any]
    runs: list[RunResults]


def make_results(comparison: Comparison, environment: dict[str, Any]) -> Results:
    """Converts a comparison to the schema of `results.json`.

    Args:
        comparison: The comparison.
        environment: Versions, platform and command line.

    Returns:
        The results; non-finite numbers are still floats.
    """
    settings, text = comparison.settings, comparison.text
    recommended, recommendation = recommend(comparison.runs)
    return {
        "schema": SCHEMA,
        "partial": comparison.partial,
        "recommended": recommended,
        "recommendation": recommendation,
        "settings": {
            "network": settings.network,
            "strategies": list(settings.strategies),
            "threshold": settings.threshold,
            "steps": settings.steps,
            "seed": settings.seed,
            "lr": settings.learning_rate,
            "optimizer": "SGD",
            "batch": BATCH,
            "length": LENGTH,
            "embedding": EMBEDDING,
            "hidden": HIDDEN,
            "stacked": STACKED,
            "uniform_loss": UNIFORM_LOSS,
            "diverged_loss": DIVERGED_LOSS,
        },
        "text": {
            "source": text.source,
            "files": text.files,
            "bytes": len(text.data),
            "held_out_bytes": len(text.data) - text.held_out_from,
        },
        "environment": environment,
        "runs": [_run_results(run) for run in comparison.runs],
    }


def write_results(results: Results, folder: Path) -> Path:
    """Writes `results.json` atomically.

    Args:
        results: The results.
        folder: The folder to write to.

    Returns:
        The path of the file.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path = folder / FILE_NAME
    write_whole(path, json.dumps(_encoded(results), allow_nan=False, ensure_ascii=False, indent=1) + "\n")
    return path


def write_whole(path: Path, content: str) -> None:
    """Writes a file atomically, so that no reader sees half of it.

    Args:
        path: The file.
        content: Its whole content.

    Raises:
        OSError: If the folder cannot be written to.
    """
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)


def read_results(path: Path) -> Results:
    """Reads `results.json` back.

    Args:
        path: The file.

    Returns:
        The results as `make_results` returned them.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    # Only these two parts hold numbers that may be non-finite; elsewhere, as in a path, "NaN" is plain text.
    for part in ("settings", "runs"):
        document[part] = _decoded(document[part])
    return cast("Results", document)


def _run_results(run: Run) -> RunResults:
    steps = run.steps
    norms = sorted((step.norm for step in steps), key=_nonfinite_last)
    columns = dict(enumerate(run.layers))
    clipped = {name: [int(step.layer_clipped[column]) for step in steps] for column, name in columns.items()}
    return {
        "strategy": run.strategy,
        "means": str(strategy_of(run.strategy, run.threshold)),
        "threshold": run.threshold,
        "ended": run.ended,
        "diverged_at": run.diverged_at,
        "recovered": run.recovered,
        "first_loss": run.held_out[0][1] if run.held_out else None,
        "final_loss": run.held_out[-1][1] if run.held_out else None,
        "median_norm": norms[len(norms) // 2] if norms else None,
        "largest_norm": norms[-1] if norms else None,
        "clipped_share": _share([any(step.layer_clipped) for step in steps]),
        "layer_clipped_share": {name: share for name, cut in clipped.items() if (share := _share(cut)) is not None},
        "median_milliseconds": statistics.median(step.milliseconds for step in steps) if steps else None,
        "train_loss": [step.loss for step in steps],
        "norm": [step.norm for step in steps],
        "layer_norms": {name: [step.layer_norms[column] for step in steps] for column, name in columns.items()},
        "layer_clipped": clipped,
        "milliseconds": [step.milliseconds for step in steps],
        "held_out": {"step": [number for number, _ in run.held_out], "loss": [loss for _, loss in run.held_out]},
    }


def _nonfinite_last(norm: float) -> tuple[bool, float]:
    return (True, math.inf) if math.isnan(norm) else (False, norm)


def _share(values: Sequence[bool | int]) -> float | None:
    return sum(values) / len(values) if values else None


def _encoded(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    return [_encoded(item) for item in value] if isinstance(value, list) else value


def _decoded(value: object) -> object:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
