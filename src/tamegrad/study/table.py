"""The terminal's output: progress bars during training, and the table at the end."""

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tamegrad.streams import written_if_possible
from tamegrad.study.columns import columns_of, rules
from tamegrad.study.results import Results, StrategyResults
from tamegrad.study.settings import Settings
from tamegrad.study.train import Run
from tamegrad.terminal import Row, Title, output, print_table

__all__ = ["Bars", "print_results"]


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
    console, (name, *numbers) = output(), columns_of(results)
    titles = [Title(name.title, numbers=False), *(Title(column.title, numbers=True) for column in numbers)]
    rows = [
        Row([column.cell(strategy) for column in (name, *numbers)], _style(strategy, results))
        for strategy in results["strategies"]
    ]
    print_table(console, titles, rows)
    for rule in rules(results):
        console.print(rule, style="dim", highlight=False)
    console.print(results["recommendation"], style="bold", highlight=False, soft_wrap=True)


def _style(strategy: StrategyResults, results: Results) -> str:
    if strategy["strategy"] in results["together"]:
        return "bold green"
    if all(step is None for step in strategy["diverged_at"]):
        return ""
    recovered = all(one for one, step in zip(strategy["recovered"], strategy["diverged_at"], strict=True) if step)
    return "yellow" if recovered else "red"
