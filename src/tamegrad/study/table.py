"""The terminal's output: progress bars during training, and the table at the end."""

import sys
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tamegrad.streams import written_if_possible
from tamegrad.study.columns import Column, columns_of, rules
from tamegrad.study.results import Results, StrategyResults
from tamegrad.study.settings import Settings
from tamegrad.study.train import Run
from tamegrad.terminal import output, plain_table

__all__ = ["Bars", "print_results"]

NARROWEST_NAME = 7
GAP = 2  # columns of the terminal between two of the table


class Bars:
    """One progress bar per strategy, on stderr; a context manager. Without a working stderr it shows nothing.

    Args:
        settings: The settings of the comparison.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {
            name: self._progress.add_task(name, total=settings.steps * settings.seeds, start=False, state="")
            for name in settings.strategies
        }

    def __enter__(self) -> Self:
        with written_if_possible(sys.stderr):
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with written_if_possible(sys.stderr):
            self._progress.stop()

    def after_step(self, run: Run) -> None:
        """Advances the bar of a strategy by one step.

        Args:
            run: The run that took the step.
        """
        task, done = self._tasks[run.strategy], len(run.steps)
        earlier = self._settings.every_seed.index(run.seed)
        last = earlier == self._settings.seeds - 1
        if done == 1 and earlier == 0:
            self._progress.start_task(task)
        if run.ended != "interrupted" and not last:
            done = self._settings.steps  # of a run that was stopped, too
        state = f"loss {run.steps[-1].loss:.3g}"
        if self._settings.seeds > 1:
            state = f"seed {earlier + 1} of {self._settings.seeds}, {state}"
        with written_if_possible(sys.stderr):
            self._progress.update(task, completed=earlier * self._settings.steps + done, state=state)
            if run.ended != "interrupted" and last:
                self._progress.stop_task(task)


def print_results(results: Results) -> None:
    """Prints the table, the rules that it uses and the recommendation.

    Args:
        results: The results of the comparison.
    """
    console, columns = output(), columns_of(results)
    rows = [[column.cell(strategy) for column in columns] for strategy in results["strategies"]]
    styles = [_style(strategy, results) for strategy in results["strategies"]]
    # Narrow headings leave room for the names in a terminal of the usual width.
    headings = [column.title.replace(" ", "\n", 1) for column in columns]
    widths = [max(map(len, [*heading.split("\n"), *cells])) for heading, *cells in zip(headings, *rows, strict=True)]
    if sum(widths[1:]) + NARROWEST_NAME + GAP * len(columns) <= console.width:
        console.print(_table(headings, widths, rows, styles))
    else:
        for row, style in zip(rows, styles, strict=True):
            console.print(_block(columns, row), style=style, highlight=False)
    for rule in rules(results):
        console.print(rule, style="dim", highlight=False)
    console.print(results["recommendation"], style="bold", highlight=False, soft_wrap=True)


def _table(
    headings: Sequence[str], widths: Sequence[int], rows: Sequence[Sequence[str]], styles: Sequence[str]
) -> Table:
    table = plain_table()
    table.add_column(headings[0], overflow="fold")
    for heading, width in list(zip(headings, widths, strict=True))[1:]:
        # Never cut, as names are: a part of a number looks like another number.
        table.add_column(heading, min_width=width, justify="right")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*row, style=style)
    return table


def _block(columns: Sequence[Column], row: Sequence[str]) -> str:
    """Returns a row as lines, for a terminal that is too narrow for the table."""
    cells = [f"  {column.title}: {cell}" for column, cell in list(zip(columns, row, strict=True))[1:]]
    return "\n".join([row[0], *cells])


def _style(strategy: StrategyResults, results: Results) -> str:
    if strategy["strategy"] in results["together"]:
        return "bold green"
    if all(step is None for step in strategy["diverged_at"]):
        return ""
    recovered = all(one for one, step in zip(strategy["recovered"], strategy["diverged_at"], strict=True) if step)
    return "yellow" if recovered else "red"
