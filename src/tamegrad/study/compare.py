"""Runs one strategy after the other, and recommends one."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tamegrad.study.settings import Settings
from tamegrad.study.text import Text
from tamegrad.study.train import Run, new_run, train

__all__ = ["Comparison", "compare", "recommend"]

AS_GOOD = 0.02  # nats per byte: within this, another seed may reverse the order


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of one comparison.

    Args:
        settings: Its settings.
        text: The text that the networks were trained on.
        runs: One per strategy, as far as they got.
        partial: Whether Ctrl-C ended it early.
    """

    settings: Settings
    text: Text
    runs: tuple[Run, ...]
    partial: bool


def compare(settings: Settings, text: Text, after_step: Callable[[Run], None]) -> Comparison:
    """Trains the same network on the same excerpts from the same seed, once under each strategy.

    Ctrl-C ends the comparison after the current step, a second Ctrl-C at once; both keep the results so far.

    Args:
        settings: How to train, and under which strategies.
        text: The text to train on.
        after_step: Called with the run after every step, to show progress.

    Returns:
        The comparison, with one run per strategy.
    """
    runs: list[Run] = []
    threads = torch.get_num_threads()
    # For networks this small one thread is as fast, and the numbers do not depend on the number of cores.
    torch.set_num_threads(1)
    partial = False
    try:
        with _interrupted_between_steps(after_step) as after_step_or_interrupt:
            for strategy in settings.strategies:
                runs.append(new_run(settings, strategy))
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
    if usual is not signal.default_int_handler:  # leaves an ignored Ctrl-C, or a handler of the caller's, alone
        yield after_step
        return

    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, usual)

    def after_step_or_interrupt(run: Run) -> None:
        after_step(run)
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield after_step_or_interrupt
    finally:
        signal.signal(signal.SIGINT, usual)


def recommend(runs: Sequence[Run]) -> tuple[str | None, str]:
    """Recommends the strategy with the lowest final held-out loss of the runs that did not diverge.

    Args:
        runs: The runs to choose from.

    Returns:
        The strategy's name, or None if no run learned without diverging, and the reason in one line.
    """
    completed = [run for run in runs if run.ended != "interrupted"]
    stable = [run for run in completed if run.diverged_at is None and _final(run) < run.held_out[0][1]]
    if not stable:
        advice = " Try a smaller --lr or --threshold." if len(completed) == len(runs) else ""
        return None, f"No strategy can be recommended: no completed run learned without diverging.{advice}"
    best = min(stable, key=_final)
    setting = "" if best.threshold is None else f" (threshold {best.threshold:g})"
    sentence = (
        f"Use {best.strategy}{setting}: held-out loss {_final(best):.3f}, the lowest of the runs that did not diverge."
    )
    close = [run.strategy for run in stable if run is not best and _final(run) - _final(best) <= AS_GOOD]
    if close:
        sentence += f" As good (within {AS_GOOD}): {', '.join(close)}."
    lower = [run for run in completed if run.recovered and _final(run) < _final(best)]
    if lower:
        sentence += " Lower, but diverged along the way: "
        sentence += ", ".join(f"{run.strategy} ({_final(run):.3f}, at step {run.diverged_at})" for run in lower) + "."
    return best.strategy, sentence


def _final(run: Run) -> float:
    return run.held_out[-1][1]
