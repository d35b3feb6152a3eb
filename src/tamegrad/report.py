"""What one step did: norms before, scales, norms after, and the non-finite groups.

`G` is the number of groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

from tamegrad.errors import UnknownGroupError, closest, quoted

__all__ = ["GroupReport", "Report"]


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
        """Returns all rows as Python numbers, in the order of `groups`; this reads the device once a column.

        Returns:
            One row a group.
        """
        columns = (self.norms, self.scales, self.norms_after, self.clipped, self.nonfinite)
        return [GroupReport(*row) for row in zip(self.groups, *(column.tolist() for column in columns), strict=True)]

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
        rows = self.rows()
        clipped, nonfinite = sum(row.clipped for row in rows), sum(row.nonfinite > 0 for row in rows)
        head = f"{len(rows)} group{'' if len(rows) == 1 else 's'}, total norm {self.total_norm.tolist():.4g}"
        lines = [f"{head}, {clipped} clipped, {nonfinite} non-finite{', step skipped' if self.skipped else ''}"]
        table: list[tuple[str, ...]] = [("group", "norm", "scale", "norm after", "clipped", "non-finite")]
        for row in rows:
            numbers = (f"{number:.4g}" for number in (row.norm, row.scale, row.norm_after))
            table.append((row.name, *numbers, "yes" if row.clipped else "", str(row.nonfinite or "")))
        widths = [max(len(row[column]) for row in table) for column in range(6)]
        lines += [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join(lines)
