"""The order in which units are finished: that of their gradients, and on sharded models the same on every rank."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import distributed as dist

from tamegrad.errors import SettingError
from tamegrad.torch.backward.units import Unit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Turns"]


class Turns:
    """Says which units are to be finished when another one is complete.

    Where norms are summed over ranks, a rank that finished units in another order than the others would sum norms of
    different layers. So the order of the first backward pass is kept: a unit waits until all before it are complete.

    Args:
        units: The units, in the order of the plan.
        group: The ranks that norms are summed over; None if there is one.
    """

    def __init__(self, units: Sequence[Unit], group: "ProcessGroup | None") -> None:
        self._units = units
        self._group = group
        self._order: list[Unit] = list(units)
        self._is_settled = False
        self._next = 0
        self._waiting = set[Unit]()

    def begin(self) -> None:
        """Begins a backward pass."""
        self._next = 0
        self._waiting.clear()

    def finishable_with(self, unit: Unit) -> Iterator[Unit]:
        """Yields the units to finish now that one more is complete."""
        if not self._is_settled:
            yield unit
            return
        self._waiting.add(unit)
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._next += 1
            yield self._order[self._next - 1]

    def in_order(self, units: Sequence[Unit]) -> list[Unit]:
        """Returns units in the order in which they are to be finished."""
        wanted = set(units)
        return [unit for unit in self._order if unit in wanted]

    def settle(self, finished: Sequence[Unit]) -> None:
        """Keeps the order of the first backward pass.

        Args:
            finished: All units, in the order in which they were finished.

        Raises:
            SettingError: If it was another one on another rank.
        """
        if self._group is None or self._is_settled:
            return
        own = [unit.name for unit in finished]
        everyone: list[list[str]] = [[]] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, own, group=self._group)
        if any(other != own for other in everyone):
            raise SettingError(
                "loss.backward() with StepInBackward",
                got="gradients that arrived in different orders on the ranks of a sharded model, in the first backward "
                "pass: the norms of different layers were added up",
                allowed="the same order on every rank",
                advice="run the layers in the same order on every rank, or step after backward() with attach()",
            )
        self._order, self._is_settled = list(finished), True
