"""Gradients whose placements differ from their parameters': usually partial sums that no all-reduce has added up yet.

Sequence parallelism leaves such gradients on the parameters of its normalization layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from tamegrad.torch.sharded.sharding import local_part, mesh_of

__all__ = ["with_placements_of"]

# A mesh and one of its dimensions, how its ranks' parts make the whole, and their dtype.
_Pending: TypeAlias = tuple[Any, int, str, torch.dtype]


def with_placements_of(parameters: Sequence[Any], gradients: Mapping[int, Any]) -> dict[int, Any]:
    """Redistributes gradients to the placements of their parameters.

    Partial sums take one all-reduce for each mesh dimension and dtype, whatever the number of gradients. All ranks of a
    mesh have to call this with the same gradients.

    Args:
        parameters: The parameters in the order of the plan; those with such a gradient are DTensors.
        gradients: DTensors on the same meshes, by position, in the same order on every rank.

    Returns:
        New DTensors by position; the gradients stay as they were.
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
    """Returns which gradients have to be added up together; each once, along its first such dimension."""
    pending: dict[_Pending, list[int]] = {}
    for position, gradient in gradients.items():
        for dimension, placement in enumerate(gradient.placements):
            # Other kinds than these, which no gradient has had so far, are left to PyTorch's own redistribution.
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
    """Returns a DTensor like the gradient, but with this part, which all ranks of the dimension have."""
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415  takes long, and few need it

    placements = list(gradient.placements)
    placements[dimension] = Replicate()
    return DTensor.from_local(
        part, mesh_of(gradient), placements, run_check=False, shape=gradient.shape, stride=gradient.stride()
    )
