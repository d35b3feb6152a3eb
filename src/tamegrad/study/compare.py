"""All runs, one strategy after the other, and which strategy to use."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tamegrad.study.settings import Settings
from tamegrad.study.text import Text
from tamegrad.study.train import Run, new_run, train

__all__ = ["Comparison", "compare", "recommend"]

AS_GOOD = 0.02  # nats a byte: closer than that, another seed may turn the order around


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was measured.

    Args:
        settings: What was asked for.
        text: What was trained on.
        runs: One a strategy, as far as they went.
        partial: Whether Ctrl-C ended it early.
    """

    settings: Settings
    text: Text
    runs: tuple[Run, ...]
    partial: bool


def compare(settings: Settings, text: Text, after_step: Callable[[Run], None]) -> Comparison:
    """Trains the same network on the same excerpts from the same seed, once under each strategy.

    Ctrl-C ends the comparison after the step at hand, pressed twice at once, and keeps what was measured.

    Args:
        settings: How to train, and under which strategies.
        text: What to train on.
        after_step: Called with the run after every step, to show progress.

    Returns:
        What was measured.
    """
    runs: list[Run] = []
    threads = torch.get_num_threads()
    # One thread is as fast for networks this small, and the numbers do not depend on how many cores there are.
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
    """Makes Ctrl-C raise once the step at hand is done; a second one raises at once.

    Within a step there is code that swallows an interrupt (callbacks, finalizers) and code after which Python ends the
    process by the signal, whoever handled it (text that is executed, under `python -m`).
    """
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler:  # who ignores Ctrl-C, or handles it otherwise, goes on to do so
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
    """Returns which strategy to use, and why in one line: the lowest final held-out loss of those that did not diverge.

    Args:
        runs: What was measured.

    Returns:
        The strategy's name, or None if no run held; and the sentence.
    """
    completed = [run for run in runs if run.ended != "interrupted"]
    held = [run for run in completed if run.diverged_at is None and _final(run) < run.held_out[0][1]]
    if not held:
        advice = " Try a smaller --lr or --threshold." if len(completed) == len(runs) else ""
        return None, f"No strategy can be recommended: no completed run both held and learned.{advice}"
    best = min(held, key=_final)
    setting = "" if best.threshold is None else f" (threshold {best.threshold:g})"
    sentence = (
        f"Use {best.strategy}{setting}: held-out loss {_final(best):.3f}, the lowest of those that did not diverge."
    )
    close = [run.strategy for run in held if run is not best and _final(run) - _final(best) <= AS_GOOD]
    if close:
        sentence += f" As good, within {AS_GOOD}: {', '.join(close)}."
    lower = [run for run in completed if run.recovered and _final(run) < _final(best)]
    if lower:
        sentence += " Lower, but diverged on the way: "
        sentence += ", ".join(f"{run.strategy} ({_final(run):.3f}, at step {run.diverged_at})" for run in lower) + "."
    return best.strategy, sentence


def _final(run: Run) -> float:
    return run.held_out[-1][1]
