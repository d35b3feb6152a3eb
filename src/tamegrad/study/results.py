"""The schema of `results.json`, the output of `tamegrad compare`, and functions to read and write it as strict JSON.

In the file, non-finite numbers are the strings "NaN", "Infinity" and "-Infinity". Losses are in nats per byte.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from tamegrad.study.compare import Comparison
from tamegrad.study.network import EMBEDDING, HIDDEN, STACKED
from tamegrad.study.settings import BATCH, DIVERGED_LOSS, LENGTH, UNIFORM_LOSS, strategy_of
from tamegrad.study.train import Run
from tamegrad.study.verdict import judge

__all__ = ["Results", "RunResults", "Spread", "StrategyResults", "make_results", "read_results", "write_results"]

SCHEMA = 2
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
    seed: int
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


class Spread(TypedDict):
    """One number of several runs; a non-finite one counts as the highest."""

    mean: float
    lowest: float
    highest: float


class StrategyResults(TypedDict):
    """All runs of one strategy that were not interrupted; if there is none, the one that was."""

    strategy: str
    means: str
    threshold: float | None
    seeds: list[int]
    interrupted: bool  # whether no run of it was completed
    diverged_at: list[int | None]  # one entry per seed, as in the run
    recovered: list[bool]
    first_loss: Spread | None
    final_loss: Spread | None
    median_norm: float | None  # the median of those of the runs
    largest_norm: float | None  # of all runs
    clipped_share: float | None  # of all steps of all runs
    layer_clipped_share: dict[str, float]
    median_milliseconds: float | None


class Results(TypedDict):
    """All of `results.json`."""

    schema: int
    partial: bool  # whether Ctrl-C ended it early
    recommended: str | None  # the one strategy that ended lowest; None if the seeds cannot tell
    together: list[str]  # the strategies that ended lowest and are too close to rank
    recommendation: str
    settings: dict[str, Any]
    text: dict[str, Any]
    environment: dict[str, Any]
    strategies: list[StrategyResults]
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
    verdict = judge(comparison.runs)
    runs = [_run_results(run) for run in comparison.runs]
    return {
        "schema": SCHEMA,
        "partial": comparison.partial,
        "recommended": verdict.recommended,
        "together": list(verdict.together),
        "recommendation": verdict.sentence,
        "settings": {
            "network": settings.network,
            "strategies": list(settings.strategies),
            "threshold": settings.threshold,
            "steps": settings.steps,
            "seed": settings.seed,
            "seeds": settings.seeds,
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
        "strategies": _strategies(runs),
        "runs": runs,
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
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_results(path: Path) -> Results:
    """Reads `results.json` back.

    Args:
        path: The file; one of schema 1, which had one seed, is converted.

    Returns:
        The results as `make_results` returned them.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    # Only these parts hold numbers that may be non-finite; elsewhere, as in a path, "NaN" is plain text.
    for part in {"settings", "strategies", "runs"} & document.keys():
        document[part] = _decoded(document[part])
    if document["schema"] == 1:
        document["settings"]["seeds"] = 1
        document["runs"] = [{**run, "seed": document["settings"]["seed"]} for run in document["runs"]]
        together = [document["recommended"]] if document["recommended"] else []
        document |= {"schema": SCHEMA, "together": together, "strategies": _strategies(document["runs"])}
    return cast("Results", document)


def _run_results(run: Run) -> RunResults:
    steps = run.steps
    norms = _ordered(step.norm for step in steps)
    columns = dict(enumerate(run.layers))
    clipped = {name: [int(step.layer_clipped[column]) for step in steps] for column, name in columns.items()}
    return {
        "strategy": run.strategy,
        "means": str(strategy_of(run.strategy, run.threshold)),
        "threshold": run.threshold,
        "seed": run.seed,
        "ended": run.ended,
        "diverged_at": run.diverged_at,
        "recovered": run.recovered,
        "first_loss": run.held_out[0][1] if run.held_out else None,
        "final_loss": run.final_loss if run.held_out else None,
        "median_norm": norms[len(norms) // 2] if norms else None,
        "largest_norm": norms[-1] if norms else None,
        "clipped_share": _share([any(step.layer_clipped) for step in steps]),
        "layer_clipped_share": _shares(clipped),
        "median_milliseconds": statistics.median(step.milliseconds for step in steps) if steps else None,
        "train_loss": [step.loss for step in steps],
        "norm": [step.norm for step in steps],
        "layer_norms": {name: [step.layer_norms[column] for step in steps] for column, name in columns.items()},
        "layer_clipped": clipped,
        "milliseconds": [step.milliseconds for step in steps],
        "held_out": {"step": [number for number, _ in run.held_out], "loss": [loss for _, loss in run.held_out]},
    }


def _strategies(runs: Sequence[RunResults]) -> list[StrategyResults]:
    by_strategy: dict[str, list[RunResults]] = {}
    for run in runs:
        by_strategy.setdefault(run["strategy"], []).append(run)
    return [_strategy_results(of_strategy) for of_strategy in by_strategy.values()]


def _strategy_results(runs: Sequence[RunResults]) -> StrategyResults:
    ended = [run for run in runs if run["ended"] != "interrupted"]
    counted = ended or runs
    median_norms = _ordered(run["median_norm"] for run in counted)
    largest_norms = _ordered(run["largest_norm"] for run in counted)
    milliseconds = _ordered(run["median_milliseconds"] for run in counted)
    clipped = {
        layer: [cut for run in counted for cut in run["layer_clipped"][layer]] for layer in counted[0]["layer_clipped"]
    }
    return {
        "strategy": counted[0]["strategy"],
        "means": counted[0]["means"],
        "threshold": counted[0]["threshold"],
        "seeds": [run["seed"] for run in counted],
        "interrupted": not ended,
        "diverged_at": [run["diverged_at"] for run in counted],
        "recovered": [run["recovered"] for run in counted],
        "first_loss": _spread(run["first_loss"] for run in counted),
        "final_loss": _spread(run["final_loss"] for run in counted),
        "median_norm": median_norms[len(median_norms) // 2] if median_norms else None,
        "largest_norm": largest_norms[-1] if largest_norms else None,
        "clipped_share": _share([any(cuts) for cuts in zip(*clipped.values(), strict=True)]),
        "layer_clipped_share": _shares(clipped),
        "median_milliseconds": statistics.median(milliseconds) if milliseconds else None,
    }


def _ordered(values: Iterable[float | None]) -> list[float]:
    """Returns the numbers there are in ascending order, with NaN last."""
    return sorted((value for value in values if value is not None), key=lambda value: (math.isnan(value), value))


def _spread(values: Iterable[float | None]) -> Spread | None:
    ordered = _ordered(values)
    if not ordered:
        return None
    return {"mean": statistics.fmean(ordered), "lowest": ordered[0], "highest": ordered[-1]}


def _share(values: Sequence[bool | int]) -> float | None:
    return sum(values) / len(values) if values else None


def _shares(clipped: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {layer: share for layer, cuts in clipped.items() if (share := _share(cuts)) is not None}


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
