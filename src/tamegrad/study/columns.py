"""The table's columns, number formats and rules, shared by the terminal and the page."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tamegrad.study.results import Results, Spread, StrategyResults
from tamegrad.study.verdict import MARGIN

__all__ = ["Column", "columns_of", "number", "rules"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table.

    Args:
        title: Its heading.
        meaning: What it shows, in one sentence.
        cell: Returns the text of a strategy's cell.
    """

    title: str
    meaning: str
    cell: Callable[[StrategyResults], str]


def columns_of(results: Results) -> tuple[Column, ...]:
    """Returns the columns of the table.

    Args:
        results: The results of the comparison.

    Returns:
        The columns; those of the losses are others with several seeds.
    """
    losses: tuple[Column, ...]
    if results["settings"]["seeds"] == 1:
        losses = (
            Column("first loss", "On held-out text, before the first step.", _first_loss),
            Column("final loss", "On held-out text, after the last step.", _final_loss),
            Column("diverged at step", "The first step at which the run diverged, if any.", _diverged_at),
        )
    else:
        losses = (
            Column("mean loss", "On held-out text, after the last step; the mean over the seeds.", _final_loss),
            Column("lowest to highest", "The range of that loss over the seeds.", _range),
            Column("diverged", "How many of the runs diverged.", _diverged_of),
        )
    return (
        Column("strategy", "Deeplearning4j's name, or torch-global for torch.nn.utils.clip_grad_norm_.", _name),
        Column("threshold", "The limit that was set; renormalization has none.", _threshold),
        *losses,
        Column("median norm", "Of the whole gradient, before the strategy.", _median_norm),
        Column("largest norm", "Of the whole gradient, before the strategy.", _largest_norm),
        Column("clipped", "Share of steps in which the strategy shrank any part of the gradient.", _clipped),
        Column("ms per step", "Median time of forward, backward, strategy and optimizer.", _milliseconds),
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


def rules(results: Results) -> list[str]:
    """Returns the legend of the table: what counts as diverged, and how large a lead has to be to rank strategies.

    Args:
        results: The results of the comparison.

    Returns:
        Sentences for people to read, one string per rule.
    """
    settings = results["settings"]
    diverged = (
        f"Diverged: a training loss that is not finite or above {settings['diverged_loss']:.2f}, twice the loss of "
        f"uniform guessing ({settings['uniform_loss']:.2f} nats per byte). * recovered: the run ended under that limit."
    )
    one_seed = (
        f"With one seed, strategies are ranked if their final losses differ by more than {MARGIN}: with the "
        "defaults, that is twice the standard deviation of such a difference over ten seeds."
    )
    several_seeds = (
        "Strategies are ranked if the mean of their differences in final loss, seed by seed, is larger than its "
        "95% uncertainty (a paired t-test: with the same seed, both see the same excerpts in the same order)."
    )
    if len(results["strategies"]) == 1:
        return [diverged]
    return [diverged, one_seed if settings["seeds"] == 1 else several_seeds]


def _name(strategy: StrategyResults) -> str:
    return strategy["strategy"]


def _threshold(strategy: StrategyResults) -> str:
    return number(strategy["threshold"])


def _first_loss(strategy: StrategyResults) -> str:
    return _mean(strategy["first_loss"])


def _final_loss(strategy: StrategyResults) -> str:
    return _mean(strategy["final_loss"]) + (" (partial)" if strategy["interrupted"] else "")


def _mean(spread: Spread | None) -> str:
    return number(None if spread is None else spread["mean"], ".3f")


def _range(strategy: StrategyResults) -> str:
    spread = strategy["final_loss"]
    if spread is None:
        return number(None)
    lowest, highest = number(spread["lowest"], ".3f"), number(spread["highest"], ".3f")
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _diverged_at(strategy: StrategyResults) -> str:
    (step,) = strategy["diverged_at"]
    return ("–" if step is None else str(step)) + ("*" if any(strategy["recovered"]) else "")


def _diverged_of(strategy: StrategyResults) -> str:
    diverged = [step is not None for step in strategy["diverged_at"]]
    all_recovered = any(diverged) and diverged == strategy["recovered"]
    return f"{sum(diverged)}{'*' if all_recovered else ''} of {len(diverged)}"


def _median_norm(strategy: StrategyResults) -> str:
    return number(strategy["median_norm"], ".3g")


def _largest_norm(strategy: StrategyResults) -> str:
    return number(strategy["largest_norm"], ".3g")


def _clipped(strategy: StrategyResults) -> str:
    return number(strategy["clipped_share"], ".0%")


def _milliseconds(strategy: StrategyResults) -> str:
    return number(strategy["median_milliseconds"], ".1f")
