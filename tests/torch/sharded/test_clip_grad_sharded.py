"""`clip_grad_norm_` of sharded parameters, on one mesh and on several, with torch's as the measure where it can."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from support.ranks import run_on_ranks
from tamegrad.torch import clip_grad_norm_, clip_grad_value_


def sharded(mesh: Any, placement: Any, scale: float) -> Any:
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [placement]))
    parameter.grad = distribute_tensor(scale * torch.ones(4, 4), mesh, [placement])
    return parameter


def on_one_mesh() -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [sharded(mesh, Shard(0), 1.0), sharded(mesh, Shard(1), 2.0), sharded(mesh, Replicate(), 3.0)]
    theirs: Any = nn.utils.clip_grad_norm_(parameters, math.inf)
    ours: Any = clip_grad_norm_(parameters, 1.0)
    assert isinstance(ours, DTensor)
    assert isinstance(theirs, DTensor)
    assert ours.dtype == theirs.dtype
    assert ours.device_mesh == theirs.device_mesh
    norms = [ours.full_tensor().item(), ours.item(), theirs.full_tensor().item()]
    return [*norms, [float(one.grad.full_tensor()[0, 0]) for one in parameters]]


def test_on_one_mesh_it_returns_a_dtensor_as_torch_does() -> None:
    norm = 4 * math.sqrt(14)
    for *norms, values in run_on_ranks(on_one_mesh, 2):
        assert norms == pytest.approx([norm] * 3)
        assert values == pytest.approx([1 / norm, 2 / norm, 3 / norm])


def on_several_meshes() -> list[Any]:
    rows = init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))
    plain = nn.Parameter(torch.zeros(9))
    parameters = [sharded(rows, Shard(0), 1.0), sharded(both["two"], Shard(0), 2.0), plain]
    for _ in range(2):
        plain.grad = torch.ones(9)
        norm = clip_grad_norm_(parameters, math.inf)
    clip_grad_value_(parameters, 0.5)
    values = [float(parameters[0].grad.full_tensor()[0, 0]), float(parameters[1].grad.full_tensor()[3, 3])]
    return [type(norm) is torch.Tensor, norm.item(), values, plain.grad.tolist()]  # type: ignore[union-attr]


def test_on_several_meshes_it_returns_a_tensor() -> None:
    for is_plain, norm, values, plain in run_on_ranks(on_several_meshes, 2):
        assert is_plain
        assert norm == pytest.approx(math.sqrt(16 + 64 + 9))
        assert values == [0.5, 0.5]
        assert plain == [0.5] * 9
