"""Sharded models step inside backward as they do after it: FSDP2's hooks come when gradients are reduced."""

from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from support.ranks import run_on_ranks
from support.transformer import Gpt, batches
from tamegrad import Clip, Policy
from tamegrad.torch import StepInBackward, attach

DATA = batches(bytes(range(256)) * 4, 3, rows=8)
POLICY = Policy(Clip(0.05), {"*norm*": Clip(0.02, per="tensor"), "head": Clip(0.01, per="param_type")})


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def sharded(kind: str, ranks: int) -> Any:
    model: Any = Gpt(3, reentrant=False if kind == "checkpoints" else None)
    if kind == "tensor parallel":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "model"))
        for block in model.blocks:
            parallelize_module(block, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    else:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"], reshard_after_forward=kind != "no resharding")
    if kind != "blocks only":
        fully_shard(model, mesh=mesh["data"])
    return model


def local_parameters(model: Any) -> list[torch.Tensor]:
    return [
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for parameter in model.parameters()
    ]


def train(kind: str, *, inside: bool) -> Any:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = sharded(kind, ranks)
    if inside:
        owner: Any = StepInBackward(model, adamw, POLICY)
        optimizer = owner
    else:
        optimizer = adamw(list(model.parameters()))
        owner = attach(model, optimizer, POLICY)
    own = rank // 2 if kind == "tensor parallel" else rank
    for tokens in DATA:
        part = tokens.chunk(ranks // 2 if kind == "tensor parallel" else ranks)[own]
        logits = model(part[:, :-1])
        loss: Any = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        loss.backward()
        if inside:
            assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert owner.steps == len(DATA)
    return local_parameters(model), str(owner.report), owner.report.clipped.sum().item()


def both_ways(kind: str) -> bool:
    after, report_after, clipped = train(kind, inside=False)
    inside, report_inside, _ = train(kind, inside=True)
    assert clipped > 5
    assert report_after == report_inside
    return all(torch.equal(a, b) for a, b in zip(after, inside, strict=True))


@pytest.mark.parametrize("kind", ["fsdp", "checkpoints", "tensor parallel"])
def test_sharded_models_end_at_the_same_bits(kind: str) -> None:
    assert run_on_ranks(both_ways, 4 if kind == "tensor parallel" else 2, kind) == [True] * (
        4 if kind == "tensor parallel" else 2
    )


@pytest.mark.parametrize("kind", ["no resharding", "blocks only"])
def test_x(kind: str) -> None:
    assert run_on_ranks(both_ways, 2, kind) == [True] * 2
