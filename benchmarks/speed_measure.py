"""Times tools in interleaved rounds, each in a different order, so that a disturbance hits all tools alike."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from speed_models import Case, Subject, linears
from speed_tools import HUGE, READ, TINY, WRITE, Tool, tools

__all__ = ["Growth", "Measured", "Times", "measure_case", "measure_growth", "time_tools"]

MOST_ROUNDS, LEAST_ROUNDS = 25, 3
# A tool that takes longer than this is timed in the first round only.
SLOW_SECONDS = 1.0
# With more layers than this, optax takes minutes to compile and smartclip seconds a step.
MANY = 100


@dataclass(frozen=True)
class Times:
    """The times of each tool in each round.

    Args:
        tools: The tools.
        seconds: `(R, T)`, NaN where a tool sat out a round.
    """

    tools: tuple[Tool, ...]
    seconds: NDArray[np.float64]

    def _column(self, name: str) -> NDArray[np.float64]:
        return self.seconds[:, [tool.name for tool in self.tools].index(name)]

    def __contains__(self, name: str) -> bool:
        """Returns whether a tool was timed."""
        return any(tool.name == name for tool in self.tools)

    def median(self, name: str) -> float:
        """Returns the median time of a tool, in seconds."""
        return float(np.nanmedian(self._column(name)))

    def ratio(self, name: str, to: str) -> float:
        """Returns the time of a tool divided by that of another: the median of the ratios within each round."""
        return float(np.nanmedian(self._column(name) / self._column(to)))

    def ratio_of_fastest(self, name: str, to: str) -> float:
        """Returns the same ratio between the fastest round of each, which a busy machine affects least."""
        return float(np.nanmin(self._column(name)) / np.nanmin(self._column(to)))


@dataclass(frozen=True)
class Measured:
    """The times on one model.

    Args:
        name: The model's name.
        size: Its size, in words.
        nothing: The times with nothing clipped.
        everything: The times with everything clipped.
    """

    name: str
    size: str
    nothing: Times
    everything: Times

    def both(self) -> tuple[tuple[str, Times, str], ...]:
        """Returns the name of each of the two measurements, its times and its floor."""
        return ("nothing clipped", self.nothing, READ), ("everything clipped", self.everything, WRITE)


@dataclass(frozen=True)
class Growth:
    """Times with growing numbers of layers, nothing clipped.

    Args:
        times: The times, by the number of layers.
    """

    times: dict[int, Times]


def time_tools(listed: Sequence[Tool], seconds: float) -> Times:
    """Times tools in interleaved rounds, after one warm-up run of each.

    Args:
        listed: The tools.
        seconds: When to stop starting new rounds; there are always at least three, or one if this is 0.

    Returns:
        The times.
    """
    for tool in listed:
        _time(tool)
    end = time.perf_counter() + seconds
    rounds: list[NDArray[np.float64]] = []
    # In a fixed order, every tool would always find the CPU caches as the same other tool left them.
    order = np.random.default_rng(0)
    gc.collect()
    gc.disable()
    try:
        least = LEAST_ROUNDS if seconds > 0 else 1
        while len(rounds) < least or (len(rounds) < MOST_ROUNDS and time.perf_counter() < end):
            taken = np.full(len(listed), np.nan)
            for index in order.permutation(len(listed)):
                if not rounds or rounds[0][index] <= SLOW_SECONDS:
                    taken[index] = _time(listed[index])
            rounds.append(taken)
    finally:
        gc.enable()
    return Times(tuple(listed), np.array(rounds))


def _time(tool: Tool) -> float:
    tool.refill()
    start = time.perf_counter()
    tool.run()
    return time.perf_counter() - start


def measure_case(case: Case, seconds: float) -> Measured:
    """Times all tools on one model, with nothing clipped and with everything clipped.

    Args:
        case: The model.
        seconds: The approximate time for each of the two.

    Returns:
        The times.
    """
    subject = Subject(case.make())
    nothing, everything = (time_tools(tools(subject, threshold), seconds) for threshold in (HUGE, TINY))
    return Measured(case.name, subject.size, nothing, everything)


def measure_growth(counts: Sequence[int], seconds: float, known: dict[int, Times]) -> Growth:
    """Times the tools on growing numbers of small layers, with nothing clipped.

    Args:
        counts: Numbers of layers.
        seconds: The approximate time for each.
        known: Times that were already measured.

    Returns:
        The times. Beyond `MANY` layers, optax and smartclip are left out of all but `known` times.
    """
    times = {}
    for count in counts:
        if count in known:
            times[count] = known[count]
            continue
        subject = Subject(linears(count))
        without = ("optax", "smartclip") if count > MANY else ()
        times[count] = time_tools(tools(subject, HUGE, without=without), seconds)
    return Growth(times)
