"""Trains under one strategy after the other, from one seed after the other."""

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tamegrad.study.settings import Settings
from tamegrad.study.text import Text
from tamegrad.study.train import Run, new_run, train

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of one comparison.

    Args:
        settings: Its settings.
        text: The text that the networks were trained on.
        runs: One per seed and strategy, as far as they got.
        partial: Whether Ctrl-C ended it early.
    """

    settings: Settings
    text: Text
    runs: tuple[Run, ...]
    partial: bool


def compare(settings: Settings, text: Text, after_step: Callable[[Run], None]) -> Comparison:
    """Trains the same network on the same excerpts from the same seed, once under each strategy; then the next seed.

    Ctrl-C ends the comparison after the current step, a second Ctrl-C at once; both keep the results so far.

    Args:
        settings: How to train, and under which strategies.
        text: The text to train on.
        after_step: Called with the run after every step, to show progress.

    Returns:
        The comparison, with one run per seed and strategy.
    """
    runs: list[Run] = []
    threads = torch.get_num_threads()
    # For networks this small one thread is as fast, and the numbers do not depend on the number of cores.
    torch.set_num_threads(1)
    partial = False
    try:
        with _interrupted_between_steps(after_step) as after_step_or_interrupt:
            # All strategies of one seed before the next seed, so that what Ctrl-C leaves can be compared.
            for seed, strategy in itertools.product(settings.every_seed, settings.strategies):
                runs.append(new_run(settings, strategy, seed))
                train(settings, text, runs[-1], after_step_or_interrupt)
    except KeyboardInterrupt:
        partial = True
    finally:
        torch.set_num_threads(threads)
    return Comparison(settings, text, tuple(runs), partial)


@contextmanager
def _interrupted_between_steps(after_step: Callable[[Run], None]) -> Iterator[Callable[[Run], None]]:
    """Delays Ctrl-C until the current step is done; a second Ctrl-C raises at once.

    Within a step some code swallows an interrupt (callbacks, finalizers), and after an interrupt in other code (`exec`
    of a string, under `python -m`) Python kills the process with the signal even if the interrupt was handled.
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.SIG_IGN or usual is None:  # ignored, or a handler that is not Python's and cannot be restored
        yield after_step
        return

    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def after_step_or_interrupt(run: Run) -> None:
        after_step(run)
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield after_step_or_interrupt
    finally:
        signal.signal(signal.SIGINT, usual)
