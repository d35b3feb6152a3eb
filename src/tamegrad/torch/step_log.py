"""Writes reports to sinks: every N steps of a normalizer, read off the device at once, on rank 0 only."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from tamegrad.errors import SettingError, warn
from tamegrad.report import Report

__all__ = ["Sink", "StepLog"]


@runtime_checkable
class Sink(Protocol):
    """Where reports go; `tamegrad.integrations` has some, and any object with this method is one."""

    def write(self, step: int, report: Report[NDArray[Any]]) -> None:
        """Writes one report.

        Args:
            step: The number of the step, from 1; it goes on after `load_state_dict`.
            report: What that step did, in NumPy arrays: reading it costs nothing.
        """


class StepLog:
    """Passes the report of every Nth step on to sinks.

    A sink that raises `OSError` (disk full, share gone) is left out from then on, with one warning: training goes on.
    Any other error is a mistake in the sink, and is raised.

    Args:
        sinks: The sinks.
        every: The number of steps from one report to the next.

    Raises:
        SettingError: If one of them is something else.
    """

    def __init__(self, sinks: Sequence[Sink] = (), every: int = 50) -> None:
        _check(sinks, every)
        self._sinks = list(sinks)
        self._every = every
        self._last = 0

    def after_step(self, step: int, report: Report[Tensor] | None) -> None:
        """Looks at a step that was taken; most of the time there is nothing to do.

        Args:
            step: Its number, from 1; the same number again is the same step.
            report: What it did.
        """
        if not self._sinks or report is None or step % self._every or step in {0, self._last}:
            return
        self._last = step
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            return
        on_host = report.on_host()
        for sink in list(self._sinks):
            try:
                sink.write(step, on_host)
            except OSError as error:
                self._sinks.remove(sink)
                warn(f"{sink} could not write step {step} and is left out from now on; training goes on: {error}")

    def __reduce__(self) -> tuple[object, ...]:
        # A copy would write its steps between those of the original.
        return StepLog, ((), self._every)


def _check(sinks: object, every: object) -> None:
    are_listed = isinstance(sinks, list | tuple)
    listed: list[Any] = list(sinks) if isinstance(sinks, list | tuple) else [sinks]
    wrong = [one for one in listed if not are_listed or not isinstance(one, Sink) or isinstance(one, type)]
    if wrong:
        raise SettingError(
            "sinks",
            got=repr(wrong[0]),
            allowed="a list of objects with a method write(step, report)",
            advice='pass for example sinks=[CsvSink("norms.csv")], from tamegrad.integrations',
        )
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise SettingError(
            "log_every", got=repr(every), allowed="a whole number of steps from 1", advice="pass for example 50"
        )
