"""Which ranks sum together, and which rank counts each shard, on every rank of a fake cluster."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tamegrad import SettingError
from tamegrad.torch.sharded import sharding

RANKS = 16
S, R = Shard(0), Replicate()
# On a mesh of 2 stages x 2 x 4: the dimensions of a tensor, and its placements.
PLACES: list[tuple[str, tuple[Placement, ...]]] = [
    ("", ()),
    ("tensor", (S,)),
    ("data", (S,)),
    ("data tensor", (S, S)),
    ("data tensor", (R, S)),
    ("data tensor", (S, R)),
    ("data tensor", (R, R)),
    ("tensor", (R,)),
]


@contextmanager
def as_rank(rank: int) -> Iterator[Any]:
    """Makes this process one rank of a fake cluster, and yields its mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (2, 2, 4), mesh_dim_names=("stage", "data", "tensor"))
    finally:
        dist.destroy_process_group()


def tensors_on(mesh: Any) -> list[Any]:
    return [
        DTensor.from_local(torch.ones(1), mesh[tuple(where.split())], placements, run_check=False)
        if where
        else torch.ones(1)
        for where, placements in PLACES
    ]


@pytest.mark.parametrize(
    ("used", "together"),
    [
        (["tensor"], [8, 9, 10, 11]),
        (["data"], [9, 13]),
        (["data", "tensor"], [8, 9, 10, 11, 12, 13, 14, 15]),
        (["stage", "data"], [1, 5, 9, 13]),
    ],
    ids=str,
)
def test_ranks_of_overlapping_meshes_sum_together(used: list[str], together: list[int]) -> None:
    for rank in (9, 13):
        with as_rank(rank) as mesh:
            found = sharding.ranks_together([mesh[name] for name in used], rank)
            assert found == together or (used == ["tensor"] and found == [12, 13, 14, 15])


def test_meshes_of_several_roots_sum_together() -> None:
    with as_rank(5):
        pairs = init_device_mesh("cpu", (8, 2), mesh_dim_names=("pair", "in_pair"))
        quads = init_device_mesh("cpu", (2, 4, 2), mesh_dim_names=("half", "quad", "two"))
        assert sharding.ranks_together([pairs["in_pair"]], 5) == [4, 5]
        assert sharding.ranks_together([pairs["in_pair"], quads["quad"]], 5) == list(range(8))


def test_every_shard_is_counted_by_exactly_one_rank_and_ranks_take_turns() -> None:
    firsts: dict[tuple[str, ...], set[int]] = {}
    ranks = range(8)
    for rank in ranks:
        with as_rank(rank) as mesh:
            for where, _ in PLACES:
                if where:
                    names = tuple(where.split())
                    firsts.setdefault(names, set()).add(sharding.first_rank(mesh[names]))
    counts: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
    busy: Counter[int] = Counter()
    for rank in ranks:
        with as_rank(rank) as mesh:
            slices = {
                mesh[names]: (sorted(known).index(sharding.first_rank(mesh[names])), len(known))
                for names, known in firsts.items()
            }
            for index, tensor in enumerate(tensors_on(mesh)):
                # Ranks with the same coordinates along the sharded dimensions have the same shard.
                where, placements = PLACES[index]
                places = zip(where.split(), placements, strict=True)
                part = tuple(mesh[name].get_local_rank() for name, placement in places if placement.is_shard())
                for turn in range(RANKS):
                    counted = sharding.is_counted(tensor, turn, slices, list(ranks), rank)
                    counts[turn, index, part] += counted
                    busy[rank] += counted
    assert set(counts.values()) == {1}
    assert len(set(busy.values())) == 1


def test_tensors_that_are_not_sharded_are_recognized() -> None:
    with as_rank(0) as mesh:
        tensors = tensors_on(mesh)
        assert [sharding.is_sharded([tensor]) for tensor in tensors] == [S in placements for _, placements in PLACES]
        alone = DTensor.from_local(torch.ones(1), init_device_mesh("cpu", (1,)), [S], run_check=False)
        assert not sharding.is_sharded([alone])


def test_a_pytorch_whose_meshes_do_not_know_their_root_is_refused() -> None:
    with pytest.raises(SettingError, match="sharded parameters under PyTorch"):
        sharding.ranks_together([object()], 0)  # type: ignore[list-item]
