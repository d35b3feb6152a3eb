"""`LoggingSink`: one line of Python's logging a step."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tamegrad.report import Report

__all__ = ["LoggingSink"]


class LoggingSink:
    """Logs one line a step: the total norm, what was clipped and not finite, and the largest group.

    Args:
        logger: The logger, or its name.
        level: The level, as in `logging`.

    Example:
        >>> import sys
        >>> from tamegrad import Clip, normalize
        >>> logger = logging.getLogger("example")
        >>> logger.addHandler(logging.StreamHandler(sys.stdout))
        >>> _, report = normalize({"out": {"weight": np.array([3.0, 4.0])}}, Clip(1.0))
        >>> LoggingSink(logger, level=logging.WARNING).write(50, report)
        step 50: total norm 5, 1 of 1 groups clipped, 0 not finite; largest norm 5 (out)
    """

    def __init__(self, logger: logging.Logger | str = "tamegrad", *, level: int = logging.INFO) -> None:
        self._logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self._level = level

    def write(self, step: int, report: Report[NDArray[Any]]) -> None:
        """Logs one line."""
        bad = report.nonfinite > 0
        largest = int(np.where(bad, -1.0, report.norms).argmax())
        self._logger.log(
            self._level,
            "step %d: total norm %.4g, %d of %d groups clipped, %d not finite; largest norm %.4g (%s)%s",
            step,
            report.total_norm,
            report.clipped.sum(),
            len(report),
            bad.sum(),
            report.norms[largest],
            report.groups[largest],
            "; step skipped" if report.skipped else "",
        )

    def __repr__(self) -> str:
        return f"LoggingSink({self._logger.name!r})"
