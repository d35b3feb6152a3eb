"""The reduction between measuring and deciding when several processes train one model: one sum over all ranks.

Every rank measures its own shards; replicas are counted once. The plan fixes the layout of the table of sums,
whichever gradients are present, so that no rank waits for another that has nothing to add. A rank whose model changed
says so in the same sum, before it plans anew.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist

from tamegrad.decide import COLUMNS, may_overflow
from tamegrad.errors import SettingError, TamegradError, UnmatchedError
from tamegrad.groups import Plan
from tamegrad.torch.sharded.agreement import describe_plan, describe_strategy, difference, gathered
from tamegrad.torch.sharded.sharding import first_rank, is_counted, is_sharded, mesh_of, ranks_together

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Reduction", "check_process_groups"]


@dataclass(frozen=True, slots=True)
class _Card:
    """What each rank sends the others when it makes its plan.

    Args:
        problem: The error that left it without a plan, if any.
        firsts: The first rank of each of its meshes.
    """

    problem: str | None
    firsts: tuple[int, ...]


class Reduction:
    """Sums the measurements over ranks; does nothing if the model is not sharded.

    Args:
        parameters: The parameters in the order of the plan.
        process_groups: Further process groups that sums over the whole model include: those of a pipeline, each with
            one rank of every stage.
    """

    def __init__(self, parameters: Sequence[Tensor], process_groups: Sequence["ProcessGroup"]) -> None:
        self._stages = [_Stages(group, _device_for(group, parameters)) for group in process_groups]
        self._meshes: list[DeviceMesh] = []
        self._group: ProcessGroup | None = None
        if is_sharded(parameters):
            meshes = dict.fromkeys(mesh_of(parameter) for parameter in parameters)
            self._meshes = [mesh for mesh in meshes if mesh is not None]
            self._group = _group_of(ranks_together(self._meshes, dist.get_rank()), self._meshes)
            self._ranks = dist.get_process_group_ranks(self._group)
            self._device = _device_for(self._group, parameters)
        self.counted: tuple[bool, ...] = (True,) * len(parameters)

    def agree(
        self, parameters: Sequence[Tensor], make: Callable[[], tuple[Plan, Mapping[str, UnmatchedError]]]
    ) -> Plan:
        """Makes this rank's plan and compares it with those of the others, in a few collectives.

        Args:
            parameters: The parameters that this was made for; it does not keep them alive.
            make: Returns the plan, and an error for each override that matches nothing here; in a pipeline, another
                stage may have a match.

        Returns:
            The plan.

        Raises:
            TamegradError: What `make` raised.
            UnmatchedError: If an override matches nothing in any stage.
            SettingError: If another rank has no plan or a different one; then every rank raises.
        """
        plan, problem = None, None
        unmatched: Mapping[str, UnmatchedError] = {}
        try:
            plan, unmatched = make()
        except TamegradError as error:
            problem = error
        if not self._stages:
            problem = problem or next(iter(unmatched.values()), None)
        # No rank raises before the last collective, which the others would wait for.
        if self._group is not None:
            found = self._compare(self._group, parameters, plan, problem)
            problem = problem or found
        for stages in self._stages:
            found = stages.compare(plan, problem, unmatched)
            problem = problem or found
        if problem is not None:
            raise problem
        assert plan is not None
        return plan

    def agree_on_settings(self, on_nonfinite: str, others: Sequence[str]) -> None:
        """Compares the settings of the ranks, once their plans are equal; every rank must call it.

        Args:
            on_nonfinite: What the stages of a pipeline have to agree on, too.
            others: The other settings, as lines.

        Raises:
            SettingError: If another rank has other settings; then every rank raises.
        """
        line = f"on_nonfinite: {on_nonfinite}"
        problem = None
        if self._group is not None:
            problem = difference([line, *others], self._group, "settings")
        for stages in self._stages:
            # No rank raises before the last collective, which the others would wait for.
            found = stages.difference([line])
            problem = problem or found
        if problem is not None:
            raise problem

    @property
    def group(self) -> "ProcessGroup | None":
        """The ranks that sums go over; None if the model is not sharded."""
        return self._group

    def part(self, parameters: slice) -> "Reduction":
        """Returns the sums for some of the parameters: over the same ranks, without another collective.

        Args:
            parameters: Their positions.

        Returns:
            The reduction of their plan, which all ranks must have agreed on as a part of the whole.
        """
        part = copy.copy(self)
        part.counted = self.counted[parameters]
        return part

    def reduce(self, table: Tensor, *, looks: bool) -> tuple[Tensor, Tensor | None]:
        """Sums the tables of the ranks; every rank must call it, or `announce_change`.

        Args:
            table: `(G, COLUMNS)` float64 sums of what this rank counts.
            looks: Whether the host may wait to see if a rank announced a change instead. If not, all groups are NaN.

        Returns:
            The sums over all ranks, the same bits on each; and for a pipeline the `(COLUMNS,)` sums over all groups of
            all stages, else None.

        Raises:
            SettingError: If the model of another rank changed, and it looks.
        """
        if self._group is None and not self._stages:
            return table, None
        table, total, changed = self._reduce(table, table.new_zeros(1, COLUMNS))
        if looks and changed.any():
            raise _change_error(changed, "not on this one")
        return table, total

    def announce_change(self, groups: int) -> None:
        """Tells the other ranks, in place of the sum of a step, that this rank is to plan anew.

        Args:
            groups: The number of groups of the plan so far.

        Raises:
            SettingError: If the models of other ranks did not change.
        """
        if self._group is None and not self._stages:
            return
        mine = torch.zeros(1, COLUMNS, dtype=torch.float64, device="cpu")
        mine[0, 0], mine[0, 1] = 1.0, dist.get_rank()
        table = torch.full((groups, COLUMNS), math.nan, dtype=torch.float64, device="cpu")
        _, _, changed = self._reduce(table, mine)
        everyone = 1 if self._group is None else dist.get_world_size(self._group)
        for stages in self._stages:
            everyone *= stages.size
        if int(changed[0]) < everyone:
            raise _change_error(changed, "this one among them" if changed[0] > 1 else "this one alone")

    def _reduce(self, table: Tensor, changed: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sums tables and, in the same collectives, a row of how many ranks changed and the sum of their numbers."""
        if self._group is not None:
            packed = _sum(torch.cat([table, changed]), self._group, self._device)
            table, changed = packed[:-1], packed[-1:]
        if not self._stages:
            return table, None, changed[0]
        total = table.sum(0)
        for stages in self._stages:
            table, total, changed = stages.reduce(table, total, changed)
        return table, total, changed[0]

    @property
    def has_stages(self) -> bool:
        """Whether the model is one stage of a pipeline."""
        return bool(self._stages)

    @property
    def grows_to(self) -> float:
        """As in `Rules`, over the groups that the stages of a pipeline share."""
        return max((stages.grows_to for stages in self._stages), default=0.0)

    def reduce_peaks(self, peaks: Tensor, *, scaled: bool) -> Tensor:
        """Returns the largest of all ranks' peaks; every rank must call it.

        Args:
            peaks: `(G,)` float64, of what this rank counts.
            scaled: Whether gradients are multiplied by a loss scale.
        """
        if self._group is not None:
            peaks = _reduce(peaks, self._group, self._device, dist.ReduceOp.MAX)
        for stages in self._stages:
            if may_overflow(stages.grows_to, scaled=scaled):
                peaks = stages.reduce_peaks(peaks)
        return peaks

    def reduce_counts(self, counts: Tensor) -> Tensor:
        """Sums `(P, N)` counts, one row a parameter, over the ranks; every rank must call it."""
        if self._group is None:
            return counts
        return _sum(counts * torch.tensor(self.counted, device=counts.device)[:, None], self._group, self._device)

    def _compare(
        self, group: "ProcessGroup", parameters: Sequence[Tensor], plan: Plan | None, problem: TamegradError | None
    ) -> TamegradError | None:
        """Compares plans and settles which rank counts which shard; returns an error if the ranks cannot go on."""
        sizes = tuple(stages.size for stages in self._stages)
        lines = [f"sizes of process_groups: {sizes}"]
        lines += describe_plan(plan, parameters) if plan is not None else []
        firsts = tuple(map(first_rank, self._meshes))
        cards: list[_Card] = gathered(_Card(None if problem is None else str(problem), firsts), group)
        failed = {rank: card.problem for rank, card in zip(self._ranks, cards, strict=True) if card.problem is not None}
        if failed:
            rank, message = next(iter(failed.items()))
            return SettingError(
                f"the plan of rank {rank}",
                got=f"an error: {message}",
                allowed="the same model and the same settings on every rank",
                advice=f"fix the error on rank {rank}",
            )
        found = difference(lines, group, "plans")
        if found is not None:
            return found
        slices = {}
        for mesh, first, *all_firsts in zip(self._meshes, firsts, *(card.firsts for card in cards), strict=True):
            known = sorted(set(all_firsts))
            slices[mesh] = known.index(first), len(known)
        self.counted = tuple(
            is_counted(parameter, turn, slices, self._ranks, dist.get_rank())
            for turn, parameter in enumerate(parameters)
        )
        return None


class _Stages:
    """The sums that the stages of a pipeline share: one for each `per="model"` group, and the total.

    Args:
        group: One rank of every stage.
        device: The device of its collectives.
    """

    def __init__(self, group: "ProcessGroup", device: torch.device) -> None:
        self._group = group
        self._device = device
        self.grows_to = 0.0
        self._count = 0
        self._rows = self._places = torch.zeros(0, dtype=torch.int64, device="cpu")

    def compare(
        self, plan: Plan | None, problem: TamegradError | None, unmatched: Mapping[str, UnmatchedError]
    ) -> TamegradError | None:
        """Finds the groups that the stages share; returns an error if they cannot go on."""
        groups = [] if plan is None else [(row, g) for row, g in enumerate(plan.groups) if g.strategy.per == "model"]
        mine = {group.name: describe_strategy(group.strategy) for _, group in groups}
        shared: dict[str, str] = {}
        nowhere = set(unmatched)
        grows_to = max((group.strategy.grows_to for _, group in groups), default=0.0)
        card = mine, set(unmatched), None if problem is None else str(problem), grows_to
        answers = gathered(card, self._group)
        for rank, (theirs, missing, failed, _) in zip(dist.get_process_group_ranks(self._group), answers, strict=True):
            nowhere &= missing
            if failed is not None:
                return _stage_error(f"an error on rank {rank}: {failed}", f"fix the error on rank {rank}")
            for name, strategy in theirs.items():
                if shared.setdefault(name, strategy) != strategy:
                    both = f"{shared[name]} and, on rank {rank}, {strategy} for the group {name!r}"
                    return _stage_error(both, 'give every stage the same strategies with per="model"')
        if nowhere:
            return next(error for name, error in unmatched.items() if name in nowhere)
        self.grows_to = max(grows_to for *_, grows_to in answers)
        names = list(shared)
        self._count = len(names)
        self._rows = torch.tensor([row for row, _ in groups], dtype=torch.int64, device="cpu")
        self._places = torch.tensor([names.index(group.name) for _, group in groups], dtype=torch.int64, device="cpu")
        return None

    @property
    def size(self) -> int:
        """The number of stages."""
        return dist.get_world_size(self._group)

    def difference(self, lines: Sequence[str]) -> SettingError | None:
        """Compares settings; returns an error if the stages differ."""
        return difference(lines, self._group, "settings")

    def reduce(self, table: Tensor, total: Tensor, changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums the shared rows, the totals, and the row of changes over the stages."""
        if self._rows.device != table.device:
            self._rows, self._places = self._rows.to(table.device), self._places.to(table.device)
        packed = table.new_zeros(self._count + 2, COLUMNS)
        packed[-2], packed[-1] = total, changed[0]
        packed.index_copy_(0, self._places, table.index_select(0, self._rows))
        packed = _sum(packed, self._group, self._device)
        table.index_copy_(0, self._rows, packed.index_select(0, self._places))
        return table, packed[-2], packed[-1:]

    def reduce_peaks(self, peaks: Tensor) -> Tensor:
        """Returns the peaks with the largest of all stages in the shared rows."""
        packed = peaks.new_zeros(self._count)
        packed.index_copy_(0, self._places, peaks.index_select(0, self._rows))
        packed = _reduce(packed, self._group, self._device, dist.ReduceOp.MAX)
        return peaks.index_copy_(0, self._rows, packed.index_select(0, self._places))


def check_process_groups(process_groups: Sequence["ProcessGroup"]) -> None:
    """Refuses anything but a sequence of process groups.

    Args:
        process_groups: The setting.

    Raises:
        SettingError: If it is anything else.
    """
    entries: Sequence[object] = process_groups if isinstance(process_groups, list | tuple) else [process_groups]
    wrong = [entry for entry in entries if not isinstance(entry, dist.ProcessGroup)]
    if wrong or entries is not process_groups:
        raise SettingError(
            "process_groups",
            got=repr(wrong[0] if wrong else process_groups),
            allowed="a list of torch.distributed.ProcessGroup, each with one rank of every stage of a pipeline",
            advice='pass process_groups=[mesh["pp"].get_group()]',
        )


def _change_error(changed: Tensor, here: str) -> SettingError:
    count, numbers = changed[:2].long().tolist()
    where = f"on rank {numbers}" if count == 1 else f"on {count} ranks"
    return SettingError(
        "the model",
        got=f"layers or parameters that changed {where} since the last step, {here}",
        allowed="a model that changes on every rank before the same step",
        advice="make the same change on all ranks, pipeline stages included",
    )


def _stage_error(got: str, advice: str) -> SettingError:
    return SettingError("process_groups", got=got, allowed="stages that agree on the groups they share", advice=advice)


def _sum(tensor: Tensor, group: "ProcessGroup", device: torch.device) -> Tensor:
    return _reduce(tensor, group, device, dist.ReduceOp.SUM)


def _reduce(tensor: Tensor, group: "ProcessGroup", device: torch.device, operation: Any) -> Tensor:  # noqa: ANN401
    moved = tensor.to(device)
    dist.all_reduce(moved, operation, group=group)
    return moved.to(tensor.device)


def _device_for(group: "ProcessGroup", parameters: Sequence[Tensor]) -> torch.device:
    """Returns the device for a group's collectives: that of the parameters if the group supports it."""
    # From the parameters, not the gradients: a rank without gradients must choose the same device.
    home = parameters[0].device
    able = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return home if home.type in able else torch.device(able[0])


# The process groups made so far, by world: each holds connections, and is never released.
_made: WeakKeyDictionary["ProcessGroup", dict[tuple[int, ...], "ProcessGroup"]] = WeakKeyDictionary()


def _group_of(ranks: Sequence[int], meshes: Sequence["DeviceMesh"]) -> "ProcessGroup":
    """Returns a process group of these ranks, an existing one if possible."""
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    for group in (group for mesh in meshes for group in mesh.get_all_groups()):
        if sorted(dist.get_process_group_ranks(group)) == list(ranks):
            return group
    groups = _made.setdefault(world, {})
    if tuple(ranks) not in groups:
        # Ranks outside it, such as other pipeline stages, do not take part in making it.
        groups[tuple(ranks)] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[tuple(ranks)]
