"""What one step did: norms before, scales, norms after, and the non-finite groups.

`G` is the number of groups.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tamegrad.errors import UnknownGroupError, closest, quoted

__all__ = ["GroupReport", "Report", "as_table"]


class _Array(Protocol):
    """The part of an array that a report needs; NumPy, PyTorch and JAX all have it."""

    def __getitem__(self, index: int, /) -> Any: ...  # noqa: ANN401  a 0-dim array of the same framework
    def tolist(self) -> Any: ...  # noqa: ANN401  nested lists of Python numbers


ArrayT = TypeVar("ArrayT", bound=_Array)


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group of a report, as Python numbers.

    Args:
        name: The group's name.
        norm: Its norm before; NaN or infinite if one of its gradients is.
        scale: The factor that was applied: 1 where nothing changed, 0 for a group that was zeroed.
        norm_after: Its norm after.
        clipped: Whether the strategy made it smaller.
        nonfinite: How many of its values are NaN or infinite.
    """

    name: str
    norm: float
    scale: float
    norm_after: float
    clipped: bool
    nonfinite: int


@dataclass(frozen=True)
class Report(Generic[ArrayT]):
    """A snapshot of one step. Its arrays have one entry a group, and stay on their device until they are read.

    Args:
        groups: The names of the groups.
        norms: `(G,)` float64, before; NaN or infinite where a gradient of the group is, 0 where there is none.
        scales: `(G,)` float64, the factors that were applied: 1 where nothing changed, 0 for a group that was zeroed;
            for `ClipValue` it is `norms_after / norms`. NaN if a strategy of your own returned an unusable target on a
            device: that group was left as it is.
        norms_after: `(G,)` float64, after, up to rounding to the gradients' dtype.
        clipped: `(G,)` bool, whether the strategy made the group smaller; for `ClipValue`, cut an element.
        nonfinite: `(G,)` int64, how many values are NaN or infinite.
        total_norm: 0-dim float64, the norm of all that was measured, before.
        skipped: Whether the step was skipped because of a non-finite gradient. Then nothing was changed, every scale is
            1.

    Example:
        >>> import numpy as np
        >>> from tamegrad import Clip, normalize
        >>> _, report = normalize({"out": {"weight": np.array([3.0, 4.0])}}, Clip(1.0))
        >>> report["out"]
        GroupReport(name='out', norm=5.0, scale=0.2, norm_after=1.0, clipped=True, nonfinite=0)
        >>> print(report)
        1 group, total norm 5, 1 clipped, 0 non-finite
        group  norm  scale  norm after  clipped  non-finite
        out    5     0.2    1           yes
        >>> [row.name for row in report], len(report), "out" in report
        (['out'], 1, True)
    """

    groups: tuple[str, ...]
    norms: ArrayT
    scales: ArrayT
    norms_after: ArrayT
    clipped: ArrayT
    nonfinite: ArrayT
    total_norm: ArrayT
    skipped: bool = False

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.groups)}

    def __getitem__(self, name: str) -> GroupReport:
        """Returns one group's row as Python numbers; this reads the device.

        Args:
            name: The group's name, one of `groups`.

        Returns:
            The row.

        Raises:
            UnknownGroupError: If there is no such group, which is a `KeyError` too; the message names the closest.
        """
        if name not in self:
            raise self._unknown(name)
        index = self._positions[name]
        columns = (self.norms, self.scales, self.norms_after, self.clipped, self.nonfinite)
        return GroupReport(name, *(column[index].item() for column in columns))

    def rows(self) -> list[GroupReport]:
        """Returns all rows as Python numbers, in the order of `groups`; this reads the device.

        Returns:
            One row a group.
        """
        *columns, _ = self._read()
        return [
            GroupReport(name, norm, scale, after, bool(clipped), int(nonfinite))
            for name, norm, scale, after, clipped, nonfinite in zip(self.groups, *columns, strict=True)
        ]

    def on_host(self) -> "Report[NDArray[Any]]":
        """Returns the same report with NumPy arrays; this reads the device once, for everything in it."""
        norms, scales, norms_after, clipped, nonfinite, (total,) = self._read()
        return Report(
            self.groups,
            np.array(norms, dtype=np.float64),
            np.array(scales, dtype=np.float64),
            np.array(norms_after, dtype=np.float64),
            np.array(clipped, dtype=np.bool_),
            np.array(nonfinite, dtype=np.int64),
            np.array(total, dtype=np.float64),
            self.skipped,
        )

    def as_scalars(self, prefix: str = "grad") -> dict[str, float]:
        """Returns a flat dictionary of Python numbers for TensorBoard, W&B, MLflow, CSV or JSON; this reads the device.

        `{prefix}/norm/{group}` and `{prefix}/scale/{group}` for every group, and of the step `{prefix}/total_norm`, the
        numbers of groups that were `clipped` and that were `nonfinite`, and whether it was `skipped` (1 or 0). What is
        NaN or infinite is left out, which every one of these shows as a gap: so a group without a norm was not finite.

        In the names of groups only letters, digits, `_`, `-`, `.` and `/` are left: `(root)` is `root`, and another
        group of that name `root_2`.

        Args:
            prefix: What the names begin with; if empty, there is no slash either.

        Returns:
            Floats and ints by name.

        Example:
            >>> from tamegrad import Clip, normalize
            >>> _, report = normalize({"out": {"weight": np.array([3.0, 4.0])}}, Clip(1.0))
            >>> report.as_scalars("grad")
            {'grad/total_norm': 5.0, 'grad/clipped': 1, 'grad/nonfinite': 0, 'grad/skipped': 0, 'grad/norm/out': 5.0,
             'grad/scale/out': 0.2}
        """
        norms, scales, _, clipped, nonfinite, (total,) = self._read()
        scalars: dict[str, float] = {
            "total_norm": total,
            "clipped": sum(map(int, clipped)),
            "nonfinite": sum(count > 0 for count in nonfinite),
            "skipped": int(self.skipped),
        }
        names = _scalar_names(self.groups)
        scalars |= {f"norm/{name}": norm for name, norm in zip(names, norms, strict=True)}
        scalars |= {f"scale/{name}": scale for name, scale in zip(names, scales, strict=True)}
        start = f"{prefix}/" if prefix else ""
        return {f"{start}{name}": value for name, value in scalars.items() if math.isfinite(value)}

    def _read(self) -> list[list[Any]]:
        """Returns the columns, and a column of the total norm alone, as lists of Python numbers."""
        columns = (self.norms, self.scales, self.norms_after, self.clipped, self.nonfinite)
        return [*(column.tolist() for column in columns), [self.total_norm.tolist()]]

    def __iter__(self) -> Iterator[GroupReport]:
        """Iterates over `rows()`."""
        return iter(self.rows())

    def __len__(self) -> int:
        """Returns the number of groups."""
        return len(self.groups)

    def __contains__(self, name: object) -> bool:
        """Returns whether there is a group of this name."""
        return isinstance(name, str) and name in self._positions

    def _unknown(self, name: object) -> UnknownGroupError:
        if not isinstance(name, str):
            return UnknownGroupError(
                f"report[{name!r}]",
                got=f"a key of type {type(name).__name__}",
                allowed=f"the name of one of its {len(self)} groups: {quoted(self.groups[:3])}",
                advice="for a row by its position, index report.rows()",
            )
        return UnknownGroupError(
            "report[name]",
            got=repr(name),
            allowed=f"one of its {len(self)} groups; closest: {quoted(closest(name, self.groups))}",
            advice="report.groups lists them",
        )

    def __str__(self) -> str:
        host = self.on_host()
        rows = host.rows()
        clipped, nonfinite = sum(row.clipped for row in rows), sum(row.nonfinite > 0 for row in rows)
        head = f"{len(rows)} group{'' if len(rows) == 1 else 's'}, total norm {host.total_norm:.4g}"
        lines = [f"{head}, {clipped} clipped, {nonfinite} non-finite{', step skipped' if self.skipped else ''}"]
        table: list[tuple[str, ...]] = [("group", "norm", "scale", "norm after", "clipped", "non-finite")]
        for row in rows:
            numbers = (f"{number:.4g}" for number in (row.norm, row.scale, row.norm_after))
            table.append((row.name, *numbers, "yes" if row.clipped else "", str(row.nonfinite or "")))
        return "\n".join([*lines, *as_table(table)])


def as_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows of cells as lines of text, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@lru_cache(maxsize=8)
def _scalar_names(groups: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of groups with the characters that every tracker takes, each name once."""
    names: dict[str, None] = {}
    for group in groups:
        name = "/".join(map(_plain, group.split("/")))
        number = 1
        while (unique := name if number == 1 else f"{name}_{number}") in names:
            number += 1
        names[unique] = None
    return tuple(names)


def _plain(part: str) -> str:
    """Returns one part of a path without other characters; it is not empty, and no `.` or `..`, which move in paths."""
    kept = [word for word in re.split(r"[^\w.-]+", part) if word]
    return "_".join(kept) if any(word.strip(".") for word in kept) else "all"
