"""`JsonLinesSink`: one JSON object a line."""

import json
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tamegrad.integrations.files import append_line
from tamegrad.report import Report

__all__ = ["JsonLinesSink"]


class JsonLinesSink:
    """Appends the norms of a step to a file, as a line of JSON: the step, and what `Report.as_scalars` returns.

    What is not finite is left out, so every line is JSON by the standard.

    Args:
        path: The file; it is made with the first line, and appended to if there is one.
        prefix: As in `Report.as_scalars`.

    Example:
        >>> import numpy as np, tempfile
        >>> from tamegrad import Clip, normalize
        >>> path = Path(tempfile.mkdtemp(), "norms.jsonl")
        >>> _, report = normalize({"out": {"weight": np.array([3.0, 4.0])}}, Clip(1.0))
        >>> JsonLinesSink(path, prefix="").write(50, report)
        >>> print(path.read_text(), end="")
        {"step": 50, "total_norm": 5.0, "clipped": 1, "nonfinite": 0, "skipped": 0, "norm/out": 5.0, "scale/out": 0.2}
    """

    def __init__(self, path: str | os.PathLike[str], *, prefix: str = "grad") -> None:
        self._path = Path(path)
        self._prefix = prefix

    def write(self, step: int, report: Report[NDArray[Any]]) -> None:
        """Appends one line.

        Raises:
            OSError: If it cannot be written.
        """
        append_line(self._path, json.dumps({"step": step, **report.as_scalars(self._prefix)}, allow_nan=False))

    def __repr__(self) -> str:
        return f"JsonLinesSink({str(self._path)!r})"
