"""Queries on sharded tensors: their mesh, their local shard, and which rank counts each shard.

A sharded tensor is PyTorch's `DTensor`, recognized by its `device_mesh`, so that models without one do not need
`torch.distributed`. A rank is a process.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from tamegrad.errors import SettingError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Slices",
    "first_rank",
    "is_counted",
    "is_sharded",
    "local_part",
    "mesh_of",
    "ranks_together",
    "replicated",
    "waited_for",
    "with_local_part",
]

# For each mesh of a model, its index among the parallel slices of a larger mesh, and their number; each is a replica.
Slices: TypeAlias = Mapping["DeviceMesh", tuple[int, int]]


def mesh_of(tensor: Tensor) -> "DeviceMesh | None":
    """Returns the mesh of a tensor, or None for a plain tensor."""
    mesh: DeviceMesh | None = getattr(tensor, "device_mesh", None)
    return mesh


def is_sharded(parameters: Iterable[Any]) -> bool:
    """Returns whether any parameter is split over ranks."""
    return any(
        not placement.is_replicate() and mesh.size(dimension) > 1
        for parameter in parameters
        if (mesh := mesh_of(parameter)) is not None
        for dimension, placement in enumerate(parameter.placements)
    )


def local_part(tensor: Any) -> Tensor:  # noqa: ANN401  a DTensor
    """Returns this rank's shard of a tensor, in the same memory."""
    part: Tensor = waited_for(tensor.to_local())
    return part


def waited_for(tensor: Any) -> Any:  # noqa: ANN401  a tensor of any class
    """Waits for a collective that may still run (`AsyncCollectiveTensor`) and returns its result, or the tensor."""
    is_asynchronous = isinstance(getattr(tensor, "elem", None), Tensor) and hasattr(tensor, "wait")
    return tensor.wait() if is_asynchronous else tensor


def with_local_part(like: Any, part: Tensor, placements: Sequence[Any] | None = None) -> Tensor:  # noqa: ANN401
    """Returns a DTensor like another, but with `part` as this rank's shard and, if given, other placements."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  slow, and already imported where there is a DTensor

    placed = like.placements if placements is None else placements
    return DTensor.from_local(part, like.device_mesh, placed, run_check=False, shape=like.shape, stride=like.stride())


def replicated(tensor: Tensor, mesh: "DeviceMesh") -> Tensor:
    """Returns a tensor that is the same on all ranks of a mesh as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415  as above

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def first_rank(mesh: "DeviceMesh") -> int:
    """Returns the first rank of a mesh, which identifies it among parallel slices of a larger mesh."""
    return int(mesh.mesh.flatten()[0])


def ranks_together(meshes: Iterable["DeviceMesh"], rank: int) -> list[int]:
    """Returns the ranks that the sums of a model go over.

    These are the ranks of its meshes, of the parallel slices that those ranks belong to, and so on: a whole mesh if
    some layers are sharded over its rows and others over its columns. Each of these ranks gets the same answer.

    Args:
        meshes: The meshes of the model's parameters, as this rank sees them.
        rank: This rank.

    Returns:
        The ranks, in ascending order.
    """
    slices = [set(ranks) for mesh in meshes for ranks in _parallel_slices(mesh)]
    together, before = {rank}, set[int]()
    while together != before:
        before = together
        together = before.union(*(ranks for ranks in slices if not ranks.isdisjoint(before)))
    return sorted(together)


def _parallel_slices(mesh: "DeviceMesh") -> list[list[int]]:
    """Returns the ranks of each slice of the root mesh along a mesh's dimensions; one slice is the mesh itself."""
    # PyTorch has no public API for a mesh's root.
    find_root = getattr(mesh, "_get_root_mesh", None)
    if find_root is None:
        raise SettingError(
            "model",
            got=f"sharded parameters under PyTorch {torch.__version__}",
            allowed="a PyTorch whose meshes know their root mesh, such as 2.13",
            advice="pip install --upgrade torch",
        )
    root: Tensor = find_root().mesh
    places = torch.isin(root, mesh.mesh).nonzero()
    runs = places.amax(0) > places.amin(0)
    order = [*(~runs).nonzero().flatten().tolist(), *runs.nonzero().flatten().tolist()]
    length = math.prod(root.shape[dimension] for dimension in runs.nonzero().flatten().tolist())
    slices: list[list[int]] = root.permute(order).reshape(-1, length).tolist()
    return slices


def is_counted(tensor: Any, turn: int, slices: Slices, ranks: Sequence[int], rank: int) -> bool:  # noqa: ANN401
    """Returns whether this rank counts its shard of a tensor: of all ranks with the same shard, one does.

    Args:
        tensor: A DTensor, or a plain tensor, which is the same on all ranks.
        turn: A number that differs from tensor to tensor, so that the ranks take turns.
        slices: The slices of the model's meshes.
        ranks: All ranks that the sums go over.
        rank: This rank.

    Returns:
        Whether this rank counts it.
    """
    mesh = mesh_of(tensor)
    if mesh is None:
        return ranks[turn % len(ranks)] == rank
    coordinate, (own, count) = mesh.get_coordinate(), slices[mesh]
    if coordinate is None or turn % count != own:
        return False
    turn //= count
    for place, size, placement in zip(coordinate, mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            if place != turn % size:
                return False
            turn //= size
    return True
