"""The terminal's output: progress bars during training, and the table at the end."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tamegrad.study.columns import COLUMNS, cells, diverged_rule
from tamegrad.study.results import Results, RunResults
from tamegrad.study.settings import Settings
from tamegrad.study.train import Run
from tamegrad.terminal import output, plain_table

__all__ = ["Bars", "print_results"]


class Bars:
    """One progress bar per strategy, on stderr; a context manager.

    Args:
        settings: The settings of the comparison.
    """

    def __init__(self, settings: Settings) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {
            name: self._progress.add_task(name, total=settings.steps, start=False, loss="")
            for name in settings.strategies
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def after_step(self, run: Run) -> None:
        """Advances the bar of a run by one step.

        Args:
            run: The run that took the step.
        """
        task = self._tasks[run.strategy]
        if len(run.steps) == 1:
            self._progress.start_task(task)
        self._progress.update(task, completed=len(run.steps), loss=f"loss {run.steps[-1].loss:.3g}")
        if run.ended != "interrupted":
            self._progress.stop_task(task)


def print_results(results: Results) -> None:
    """Prints the table and the recommendation.

    Args:
        results: The results of the comparison.
    """
    console, table = output(), plain_table()
    for number, column in enumerate(COLUMNS):
        # Narrow headings leave room for the names in a terminal of the usual width.
        heading = column.title.replace(" ", "\n", 1)
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for run in results["runs"]:
        table.add_row(*cells(run), style=_style(run, results["recommended"]))
    console.print(table)
    console.print(diverged_rule(results), style="dim", highlight=False)
    console.print(results["recommendation"], style="bold", highlight=False, soft_wrap=True)


def _style(run: RunResults, recommended: str | None) -> str:
    if run["strategy"] == recommended:
        return "bold green"
    return "" if run["diverged_at"] is None else "yellow" if run["recovered"] else "red"
