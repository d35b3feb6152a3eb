"""Gradients whose placements differ from their parameters': usually partial sums, still to be all-reduced.

Sequence parallelism leaves such gradients on the parameters of its normalization layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from tamegrad.torch.sharded.sharding import local_part, mesh_of, with_local_part

__all__ = ["with_placements_of"]

# A mesh, one of its dimensions, the reduce operation and the dtype.
_Pending: TypeAlias = tuple[Any, int, str, torch.dtype]


def with_placements_of(parameters: Sequence[Any], gradients: Mapping[int, Any]) -> dict[int, Any]:
    """Redistributes gradients to the placements of their parameters.

    Partial sums take one all-reduce for each mesh dimension and dtype, for any number of gradients. All ranks of a mesh
    must call this with the same gradients.

    Args:
        parameters: The parameters in the order of the plan; those with such a gradient are DTensors.
        gradients: DTensors on the same meshes, by position, in the same order on every rank.

    Returns:
        New DTensors by position; the gradients are not changed.
    """
    result = dict(gradients)
    while pending := _pending(result):
        for (mesh, dimension, operation, _), positions in pending.items():
            parts = _added_up([local_part(result[position]) for position in positions], mesh, dimension, operation)
            for position, part in zip(positions, parts, strict=True):
                result[position] = _replicated(result[position], part, dimension)
    return {
        position: gradient.redistribute(placements=parameters[position].placements)
        for position, gradient in result.items()
    }


def _pending(gradients: Mapping[int, Any]) -> dict[_Pending, list[int]]:
    """Returns the gradients to all-reduce together, each once, along its first partial dimension."""
    pending: dict[_Pending, list[int]] = {}
    for position, gradient in gradients.items():
        for dimension, placement in enumerate(gradient.placements):
            # Any other operation, which no gradient has had so far, is left to PyTorch's own redistribution.
            if placement.is_partial() and placement.reduce_op in {"sum", "avg"}:
                key = mesh_of(gradient), dimension, placement.reduce_op, gradient.dtype
                pending.setdefault(key, []).append(position)
                break
    return pending


def _added_up(parts: list[Tensor], mesh: Any, dimension: int, operation: str) -> list[Tensor]:  # noqa: ANN401  a mesh
    packed = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(packed, group=mesh.get_group(dimension))
    if operation == "avg":
        packed /= mesh.size(dimension)
    pieces = torch.split(packed, [part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _replicated(gradient: Any, part: Tensor, dimension: int) -> Any:  # noqa: ANN401  DTensors
    """Returns a DTensor like the gradient, but with this shard, replicated along the dimension."""
    from torch.distributed.tensor import Replicate  # noqa: PLC0415  slow, and rarely needed

    placements = list(gradient.placements)
    placements[dimension] = Replicate()
    return with_local_part(gradient, part, placements)
