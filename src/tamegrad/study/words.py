"""The table's columns and how its numbers are written: one wording for the terminal and the page."""

import math
from dataclasses import dataclass

from tamegrad.study.results import Results, RunResults

__all__ = ["COLUMNS", "Column", "cells", "diverged_rule", "number"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Args:
        title: Its heading.
        meaning: What it says, in one sentence.
    """

    title: str
    meaning: str


COLUMNS = (
    Column("strategy", "Deeplearning4j's name, or torch-global for torch.nn.utils.clip_grad_norm_."),
    Column("threshold", "The limit that was set; renormalization has none."),
    Column("first loss", "On held-out text, before the first step."),
    Column("final loss", "On held-out text, after the last step."),
    Column("diverged at step", "The first step at which the run was in trouble, if there was one."),
    Column("median norm", "Of the whole gradient, before the strategy."),
    Column("largest norm", "Of the whole gradient, before the strategy."),
    Column("clipped", "Share of steps in which the strategy made any part of the gradient smaller."),
    Column("ms a step", "Median time of forward, backward, strategy and optimizer."),
)


def cells(run: RunResults) -> tuple[str, ...]:
    """Returns the row of a run, one entry a column.

    Args:
        run: The run.

    Returns:
        What stands in the cells.
    """
    return (
        run["strategy"],
        number(run["threshold"]),
        number(run["first_loss"], ".3f"),
        number(run["final_loss"], ".3f") + ("" if run["ended"] != "interrupted" else " (partial)"),
        ("–" if run["diverged_at"] is None else str(run["diverged_at"])) + ("*" if run["recovered"] else ""),
        number(run["median_norm"], ".3g"),
        number(run["largest_norm"], ".3g"),
        number(run["clipped_share"], ".0%"),
        number(run["median_milliseconds"], ".1f"),
    )


def number(value: float | None, form: str = "g") -> str:
    """Returns a number as people read it.

    Args:
        value: The number; None where there is none.
        form: A format for finite numbers.

    Returns:
        The text.

    Example:
        >>> number(0.934, ".0%"), number(float("nan"), ".3f"), number(float("inf")), number(None)
        ('93%', 'NaN', '∞', '–')
    """
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    return format(value, form) if math.isfinite(value) else "∞" if value > 0 else "-∞"


def diverged_rule(results: Results) -> str:
    """Returns what "diverged" means, in one sentence.

    Args:
        results: What was measured, with the limit.

    Returns:
        The sentence.
    """
    settings = results["settings"]
    return (
        f"Diverged: the training loss was not finite or above {settings['diverged_loss']:.2f}, "
        f"twice that of uniform guessing ({settings['uniform_loss']:.2f} nats a byte); the step is the first of these. "
        "* recovered: at its end the run was back under that limit."
    )
