"""Times tools in interleaved rounds, each in another order: what disturbs one tool disturbs all."""

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
# A tool that takes longer than this is timed in the first round alone.
SLOW_SECONDS = 1.0
# With more layers than this, optax takes minutes to compile and smartclip seconds a step.
MANY = 100


@dataclass(frozen=True)
class Times:
    """The seconds of each tool in each round.

    Args:
        tools: The tools.
        seconds: `(R, T)`, NaN where a tool sat out.
    """

    tools: tuple[Tool, ...]
    seconds: NDArray[np.float64]

    def _column(self, name: str) -> NDArray[np.float64]:
        return self.seconds[:, [tool.name for tool in self.tools].index(name)]

    def __contains__(self, name: str) -> bool:
        """Says whether a tool was timed."""
        return any(tool.name == name for tool in self.tools)

    def median(self, name: str) -> float:
        """Returns the median time of a tool, in seconds."""
        return float(np.nanmedian(self._column(name)))

    def ratio(self, name: str, to: str) -> float:
        """Returns how many times as long a tool takes as another: the median of the ratios within each round."""
        return float(np.nanmedian(self._column(name) / self._column(to)))

    def ratio_of_fastest(self, name: str, to: str) -> float:
        """Returns the same of the fastest round of each, which a busy machine disturbs least."""
        return float(np.nanmin(self._column(name)) / np.nanmin(self._column(to)))


@dataclass(frozen=True)
class Measured:
    """What was measured on one model.

    Args:
        name: The model's name.
        size: How large it is.
        nothing: With a threshold that nothing passes.
        everything: With one that everything does.
    """

    name: str
    size: str
    nothing: Times
    everything: Times

    def both(self) -> tuple[tuple[str, Times, str], ...]:
        """Returns the two measurements, what each is called, and its floor."""
        return ("nothing clipped", self.nothing, READ), ("everything clipped", self.everything, WRITE)


@dataclass(frozen=True)
class Growth:
    """Times with growing numbers of layers, nothing clipped.

    Args:
        times: By the number of layers.
    """

    times: dict[int, Times]


def time_tools(listed: Sequence[Tool], seconds: float) -> Times:
    """Times tools in interleaved rounds, after one run of each that does not count.

    Args:
        listed: The tools.
        seconds: After how long to begin no more rounds; three are always done, or one if there is no time at all.

    Returns:
        The times.
    """
    for tool in listed:
        _time(tool)
    end = time.perf_counter() + seconds
    rounds: list[NDArray[np.float64]] = []
    # In a fixed order every tool would always find the caches as the same other tool left them.
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
        seconds: About how long to take for each of the two.

    Returns:
        What was measured.
    """
    subject = Subject(case.make())
    nothing, everything = (time_tools(tools(subject, threshold), seconds) for threshold in (HUGE, TINY))
    return Measured(case.name, subject.size, nothing, everything)


def measure_growth(counts: Sequence[int], seconds: float, known: dict[int, Times]) -> Growth:
    """Times the tools on more and more small layers, with nothing clipped.

    Args:
        counts: Numbers of layers.
        seconds: About how long to take for each.
        known: What was measured already.

    Returns:
        What was measured. optax and smartclip are left out beyond `MANY` layers, unless it is known already.
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
