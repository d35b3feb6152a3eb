"""What ranks compare before they go on together: settings and plans, as lines of text that are equal only if they are.

A line names every float with all its digits, so that two thresholds that differ in the last bit differ in the text.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import distributed as dist

from tamegrad.errors import SettingError
from tamegrad.groups import Plan
from tamegrad.policy import Policy
from tamegrad.strategies import Strategy
from tamegrad.torch.sharded.sharding import mesh_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "describe_plan",
    "describe_policy",
    "describe_strategy",
    "difference",
    "digest_of",
    "gathered",
    "named_ranks",
]

# Up to here floats hold every whole number.
_WHOLE_NUMBERS = 2**53
# How many differences, and how many ranks, a message names.
_MOST_DIFFERENCES, _MOST_RANKS = 3, 8
# What is in the text of a function or an object without a text of its own, and differs from process to process.
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


def describe_strategy(strategy: Strategy) -> str:
    """Returns a strategy as text: its class and all its fields.

    Args:
        strategy: A strategy, built in or of a user.

    Example:
        >>> from tamegrad import Clip
        >>> describe_strategy(Clip(0.1 + 0.2))
        "Clip(threshold=0.30000000000000004, per='layer')"
    """
    fields = dataclasses.fields(strategy)
    return (
        f"{type(strategy).__qualname__}({', '.join(f'{f.name}={_exact(getattr(strategy, f.name))}' for f in fields)})"
    )


def describe_policy(policy: Policy) -> list[str]:
    """Returns a policy as lines: its default and its overrides in their order."""
    lines = [f"default strategy: {describe_strategy(policy.default)}"]
    return lines + [f"override {one.name!r}: {describe_strategy(one.strategy)}" for one in policy.overrides]


def describe_plan(plan: Plan, parameters: Sequence[Any]) -> list[str]:
    """Returns a plan and the tensors it is for as lines: strategies, names, shapes, dtypes and placements."""
    lines = [f"{group.name}: {describe_strategy(group.strategy)}" for group in plan.groups]
    for entry, group, parameter in zip(plan.parameters, plan.group_of, parameters, strict=True):
        mesh = mesh_of(parameter)
        where = "" if mesh is None else f" as {[str(placement) for placement in parameter.placements]} on {mesh.shape}"
        kind = str(parameter.dtype).removeprefix("torch.")
        lines.append(f"{entry.name} in group {group}: {kind} {tuple(parameter.shape)}{where}")
    return lines


def digest_of(lines: Sequence[str]) -> str:
    """Returns a digest of lines."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def difference(lines: Sequence[str], group: "ProcessGroup", what: str) -> SettingError | None:
    """Compares lines with those of the group's other ranks; every rank must call it.

    Args:
        lines: What must be equal on all ranks.
        group: The ranks.
        what: What the lines are, for the message: `"plans"`.

    Returns:
        An error that names what differs and on which ranks, the same on each; None if nothing does.
    """
    ranks = dist.get_process_group_ranks(group)
    digests = gathered(digest_of(lines), group)
    if digests.count(digests[0]) == len(digests):
        return None
    firsts: list[list[str]] = [list(lines) if dist.get_rank() == ranks[0] else []]
    dist.broadcast_object_list(firsts, src=ranks[0], group=group)
    found: dict[tuple[str, str], list[int]] = {}
    for rank, pair in zip(ranks, gathered(_first_difference(firsts[0], lines), group), strict=True):
        if pair is not None:
            found.setdefault(pair, []).append(rank)
    other = [f"{here!r} instead of {first!r} on {named_ranks(those)}" for (first, here), those in found.items()]
    number = sum(map(len, found.values()))
    more = f"; and {len(other) - _MOST_DIFFERENCES} differences more" if len(other) > _MOST_DIFFERENCES else ""
    return SettingError(
        f"the {what} of the ranks",
        got=f"{what} that differ from rank {ranks[0]}'s on {number} of {len(ranks)} ranks: "
        f"{'; '.join(other[:_MOST_DIFFERENCES])}{more}",
        allowed="the same model and the same settings on every rank",
        advice="build the same model, meshes, policy and settings on every rank; print(normalizer.plan) shows a plan",
    )


def gathered(mine: Any, group: "ProcessGroup") -> list[Any]:  # noqa: ANN401  anything picklable
    """Returns what each rank of a group passes; every rank must call it."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def named_ranks(ranks: Sequence[int]) -> str:
    """Returns ranks as text for a message.

    Example:
        >>> named_ranks([1]), named_ranks([1, 3])
        ('rank 1', 'ranks 1, 3')
    """
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks[:_MOST_RANKS]))}{more}"


def _first_difference(first: Sequence[str], lines: Sequence[str]) -> tuple[str, str] | None:
    longest = max(len(first), len(lines))
    padded = [[*side, *["(nothing)"] * (longest - len(side))] for side in (first, lines)]
    return next((pair for pair in zip(*padded, strict=True) if pair[0] != pair[1]), None)


def _exact(value: object) -> str:
    """Returns a field of a strategy as text that is the same in every process if the value is."""
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < _WHOLE_NUMBERS):
        # The text of a float has all its digits; a whole number may have been given as an integer.
        return repr(float(value))
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_exact, value)))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_exact, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_exact(one)}' for key, one in value.items())}}}"
    return _ADDRESS.sub("", repr(value))
