"""`CsvSink`: one row a step, one column a number."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tamegrad.integrations.files import append_line
from tamegrad.report import Report

__all__ = ["CsvSink"]


class CsvSink:
    """Appends the norms of a step to a file, as a row: the step, and what `Report.as_scalars` returns.

    What is not finite is an empty cell. If a number appears that has no column yet, because the plan changed or a group
    was not finite before, the file is written anew with more columns; it is replaced at once, so that no row is lost.

    Args:
        path: The file; it is made with the first row, and appended to if there is one.
        prefix: As in `Report.as_scalars`.

    Example:
        >>> import numpy as np, tempfile
        >>> from tamegrad import Clip, normalize
        >>> path = Path(tempfile.mkdtemp(), "norms.csv")
        >>> _, report = normalize({"out": {"weight": np.array([3.0, 4.0])}}, Clip(1.0))
        >>> CsvSink(path, prefix="").write(50, report)
        >>> print(path.read_text(), end="")
        step,total_norm,clipped,nonfinite,skipped,norm/out,scale/out
        50,5.0,1,0,0,5.0,0.2
    """

    def __init__(self, path: str | os.PathLike[str], *, prefix: str = "grad") -> None:
        self._path = Path(path)
        self._prefix = prefix

    def write(self, step: int, report: Report[NDArray[Any]]) -> None:
        """Appends one row.

        Raises:
            OSError: If it cannot be written.
        """
        row = {"step": step, **report.as_scalars(self._prefix)}
        columns = self._columns()
        if not columns:
            columns = list(row)
            append_line(self._path, _line(columns))
        elif missing := [name for name in row if name not in columns]:
            columns += missing
            self._widen(columns)
        append_line(self._path, _line(row.get(name, "") for name in columns))

    def _columns(self) -> list[str]:
        """Returns the columns of the file that there is."""
        if not self._path.exists():
            return []
        with self._path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _widen(self, columns: list[str]) -> None:
        """Gives the file more columns, at the end."""
        with self._path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        beside = self._path.with_name(f"{self._path.name}.new")
        with beside.open("w", encoding="utf-8", newline="") as file:
            lines = [columns, *(row + [""] * (len(columns) - len(row)) for row in rows)]
            csv.writer(file, lineterminator="\n").writerows(lines)
        beside.replace(self._path)

    def __repr__(self) -> str:
        return f"CsvSink({str(self._path)!r})"


def _line(cells: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
