"""The table's columns and number formats, shared by the terminal and the page."""

import math
from dataclasses import dataclass

from tamegrad.study.results import Results, RunResults

__all__ = ["COLUMNS", "Column", "cells", "diverged_rule", "number"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Args:
        title: Its heading.
        meaning: What it shows, in one sentence.
    """

    title: str
    meaning: str


COLUMNS = (
    Column("strategy", "Deeplearning4j's name, or torch-global for torch.nn.utils.clip_grad_norm_."),
    Column("threshold", "The limit that was set; renormalization has none."),
    Column("first loss", "On held-out text, before the first step."),
    Column("final loss", "On held-out text, after the last step."),
    Column("diverged at step", "The first step at which the run diverged, if any."),
    Column("median norm", "Of the whole gradient, before the strategy."),
    Column("largest norm", "Of the whole gradient, before the strategy."),
    Column("clipped", "Share of steps in which the strategy shrank any part of the gradient."),
    Column("ms per step", "Median time of forward, backward, strategy and optimizer."),
)


def cells(run: RunResults) -> tuple[str, ...]:
    """Returns the row of a run, one cell per column.

    Args:
        run: The run.

    Returns:
        The text of the cells.
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
    """Formats a number for people to read.

    Args:
        value: The number; None if there is none.
        form: The format of finite numbers.

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
    """Returns the definition of "diverged" that the table uses.

    Args:
        results: The results, which hold the limit.

    Returns:
        The definition, for people to read.
    """
    settings = results["settings"]
    return (
        "Diverged at step: the first step with a training loss that is not finite or above "
        f"{settings['diverged_loss']:.2f}, twice the loss of uniform guessing ({settings['uniform_loss']:.2f} nats per "
        "byte). * recovered: the run ended under that limit."
    )
