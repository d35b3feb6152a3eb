"""`Summary`: counts over many steps, kept on the device until they are read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamegrad.errors import SettingError, UnknownGroupError, closest, quoted
from tamegrad.report import Report, as_table

__all__ = ["GroupSummary", "Summary"]

# Norms are counted in bins whose edges are 1/8 of a power of two apart, so the middle of a bin is within 4.5 % of all
# norms in it. Norms below the first bin count as 0, those past the last one as its middle.
_BINS_AN_OCTAVE = 8
_LOWEST, _HIGHEST = -64, 64
_BINS = (_HIGHEST - _LOWEST) * _BINS_AN_OCTAVE
# The columns of counts, before the bins.
_STEPS, _CLIPPED, _NONFINITE, _FIRST_BIN = range(4)


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """One group over all steps that were counted, as Python numbers.

    Args:
        name: The group's name.
        steps: In how many steps it was part of the plan.
        clipped: The share of these steps in which the strategy made it smaller, from 0 to 1.
        largest: Its largest norm before; NaN if it never was finite.
        median: The median of its norms before, within 4.5 % (0 below 5e-20); NaN if it never was finite.
        nonfinite_steps: In how many steps it held NaN or infinity; these count for neither norm.
    """

    name: str
    steps: int
    clipped: float
    largest: float
    median: float
    nonfinite_steps: int


class Summary:
    """Counts over many steps: how often each group was clipped or not finite, its largest and its median norm.

    `update` never reads the device; reading the summary reads it once. It takes 4 KiB for each group, however many
    steps there are. Groups are identified by name, so it continues when the plan changes.

    Attributes:
        steps: How many reports were counted.
        skipped_steps: How many of these steps were skipped because of a non-finite gradient.

    Example:
        >>> from tamegrad import Clip
        >>> from tamegrad.torch import GradientNormalizer
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> normalizer, summary = GradientNormalizer(model, Clip(1.0)), Summary()
        >>> for norm in (0.5, 2.0, 4.0, 8.0):
        ...     model.weight.grad = torch.tensor([[norm, 0.0]])
        ...     summary.update(normalizer.normalize_())
        >>> summary["(root)"].clipped, summary["(root)"].largest
        (0.75, 8.0)
        >>> print(summary)
        4 steps, 0 skipped
        group   steps  clipped  largest norm  median norm  non-finite steps
        (root)  4      75%      8             2.09         0
    """

    def __init__(self) -> None:
        self.steps = 0
        self.skipped_steps = 0
        # The place of each group in the tables.
        self._places: dict[str, int] = {}
        self._counts = torch.zeros(0, _FIRST_BIN + _BINS, dtype=torch.int32, device="cpu")
        self._largest = torch.zeros(0, dtype=torch.float64, device="cpu")
        # The groups of the last report, and where they are in the tables.
        self._groups: tuple[str, ...] = ()
        self._rows = torch.zeros(0, dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def update(self, report: Report[Tensor]) -> None:
        """Counts one step; does not read the device.

        Args:
            report: The report of the step, as `normalizer.report` has it.
        """
        norms = report.norms
        if report.groups != self._groups or norms.device != self._rows.device:
            self._follow(report.groups, norms.device)
        finite = report.nonfinite == 0
        bins = ((norms.log2() - _LOWEST) * _BINS_AN_OCTAVE).nan_to_num(0.0).clamp(0, _BINS - 1).to(torch.int64)
        rows = self._rows
        self._counts[:, _STEPS].index_add_(0, rows, torch.ones_like(finite, dtype=torch.int32))
        self._counts[:, _CLIPPED].index_add_(0, rows, report.clipped.to(torch.int32))
        self._counts[:, _NONFINITE].index_add_(0, rows, (~finite).to(torch.int32))
        places = rows * self._counts.shape[1] + _FIRST_BIN + bins
        self._counts.view(-1).index_add_(0, places, finite.to(torch.int32))
        # Norms are at least 0, so that no finite one leaves a group at -1.
        self._largest[rows] = self._largest[rows].maximum(norms.where(finite, -1.0))
        self.steps += 1
        self.skipped_steps += report.skipped

    def rows(self) -> list[GroupSummary]:
        """Returns all groups as Python numbers, in the order in which they came; this reads the device once."""
        bins = self._counts[:, _FIRST_BIN:].cumsum(1)
        finite = bins[:, -1:]
        # The bin in which half of the finite steps are reached.
        middle = (2 * bins < finite).sum(1, keepdim=True)
        columns = torch.cat([self._counts[:, :_FIRST_BIN], finite, middle], 1).to(torch.float64)
        read = torch.cat([columns, self._largest[:, None]], 1).tolist()
        return [_row(name, values) for name, values in zip(self._places, read, strict=True)]

    def __getitem__(self, name: str) -> GroupSummary:
        """Returns one group as Python numbers; this reads the device.

        Raises:
            UnknownGroupError: If there was no such group, which is a `KeyError` too; the message names the closest.
        """
        if name not in self._places:
            raise UnknownGroupError(
                "summary[name]",
                got=repr(name),
                allowed=f"one of its {len(self)} groups; closest: {quoted(closest(str(name), self._places))}",
                advice="print the summary to see all of them",
            )
        return self.rows()[self._places[name]]

    def __iter__(self) -> Iterator[GroupSummary]:
        """Iterates over `rows()`."""
        return iter(self.rows())

    def __len__(self) -> int:
        """Returns the number of groups that there were so far."""
        return len(self._places)

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("group", "steps", "clipped", "largest norm", "median norm", "non-finite steps"),
        ]
        for row in self.rows():
            norms = f"{row.largest:.3g}", f"{row.median:.3g}"
            table.append((row.name, str(row.steps), f"{row.clipped:.0%}", *norms, str(row.nonfinite_steps)))
        return "\n".join([f"{self.steps} steps, {self.skipped_steps} skipped", *as_table(table)])

    def state_dict(self) -> dict[str, Any]:
        """Returns all counts, for a checkpoint; `torch.load(..., weights_only=True)` loads it. Reads the device."""
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "groups": list(self._places),
            "counts": self._counts.cpu().clone(),
            "largest": self._largest.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues what a checkpoint counted.

        Args:
            state: What `state_dict` returned.

        Raises:
            SettingError: If it is something else; then nothing changes.
        """
        match state:
            case {
                "steps": int(steps),
                "skipped_steps": int(skipped),
                "groups": list(groups),
                "counts": Tensor() as counts,
                "largest": Tensor() as largest,
            } if counts.shape == (len(groups), _FIRST_BIN + _BINS) and largest.shape == (len(groups),):
                self.steps, self.skipped_steps = steps, skipped
                self._places = {name: place for place, name in enumerate(groups)}
                self._counts, self._largest = counts.clone(), largest.clone()
                self._groups, self._rows = (), torch.zeros(0, dtype=torch.int64, device="cpu")
            case _:
                raise SettingError(
                    "load_state_dict(state)",
                    got=f"a {type(state).__name__} that is not the state of a summary",
                    allowed="what state_dict() of a summary returned",
                    advice="pass the entry of the checkpoint in which you saved it",
                )

    def _follow(self, groups: tuple[str, ...], device: torch.device) -> None:
        """Makes place for new groups, and moves to another device."""
        for name in groups:
            self._places.setdefault(name, len(self._places))
        new = len(self._places) - len(self._largest)
        counts, largest = self._counts.to(device), self._largest.to(device)
        self._counts = torch.cat([counts, counts.new_zeros(new, counts.shape[1])])
        self._largest = torch.cat([largest, largest.new_full((new,), -1.0)])
        self._rows = torch.tensor([self._places[name] for name in groups], device=device)
        self._groups = groups


def _row(name: str, values: list[float]) -> GroupSummary:
    steps, clipped, nonfinite, finite, middle, largest = values
    if not finite:
        return GroupSummary(name, int(steps), clipped / steps, math.nan, math.nan, int(nonfinite))
    median = 0.0 if middle == 0 else 2.0 ** (_LOWEST + (middle + 0.5) / _BINS_AN_OCTAVE)
    return GroupSummary(name, int(steps), clipped / steps, largest, min(median, largest), int(nonfinite))
