"""Sharded models step inside backward as they do after it: FSDP2's hooks come when gradients are reduced."""

from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from support.ranks import run_on_ranks
from support.training import adamw
from support.transformer import Gpt, batches
from tamegrad import Clip, Policy, SettingError
from tamegrad.torch import StepInBackward, attach

DATA = batches(bytes(range(256)) * 4, 2, rows=8)
POLICY = Policy(Clip(0.05), {"*norm*": Clip(0.02, per="tensor"), "head": Clip(0.01, per="param_type")})


def sharded(kind: str, ranks: int) -> Any:
    model: Any = Gpt(2, reentrant=False if "checkpointed" in kind else None)
    if kind == "tensor parallel":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "model"))
        for block in model.blocks:
            parallelize_module(block, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    else:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("data",))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    if "blocks only" not in kind:
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


def all_ways(kinds: list[str]) -> dict[str, bool]:
    return {kind: both_ways(kind) for kind in kinds}


@pytest.mark.parametrize(("ranks", "kinds"), [(2, ["fsdp", "blocks only, checkpointed"]), (4, ["tensor parallel"])])
def test_sharded_models_end_at_the_same_bits(ranks: int, kinds: list[str]) -> None:
    assert run_on_ranks(all_ways, ranks, kinds) == [dict.fromkeys(kinds, True)] * ranks


class Two(nn.Module):
    """Two sharded layers, each of one parameter, whose gradients arrive in either order."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2,))
        self.layers = nn.ModuleList()
        for size in (4, 8):
            layer = nn.Module()
            layer.register_parameter("weight", nn.Parameter(distribute_tensor(torch.ones(size), mesh, [Shard(0)])))
            self.layers.append(layer)

    def loss(self, order: list[int]) -> Any:
        parts: list[Any] = [(10.0**index * self.layers[index].weight.to_local()).sum() for index in order]  # type: ignore[operator, union-attr]
        return sum(parts)


def in_different_orders() -> bool:
    rank = dist.get_rank()
    orders = [[0, 1], [0, 1] if rank else [1, 0], [1, 0] if rank else [0, 1]]
    after, inside = Two(), Two()
    optimizer = adamw(after.parameters())
    attach(after, optimizer, Clip(1.0))
    stepper = StepInBackward(inside, adamw, Clip(1.0))
    for order in orders:
        after.loss(order).backward()
        optimizer.step()
        optimizer.zero_grad()
        inside.loss(order).backward()
        assert stepper.report is not None
        assert [row.norm for row in stepper.report] == pytest.approx([2.0, 10 * 8**0.5])
    return all(torch.equal(a, b) for a, b in zip(local_parameters(after), local_parameters(inside), strict=True))


def in_different_orders_from_the_beginning() -> str:
    model = Two()
    stepper = StepInBackward(model, adamw, Clip(1.0))
    with pytest.raises(SettingError) as caught:
        model.loss([0, 1] if dist.get_rank() else [1, 0]).backward()
    assert stepper.steps == 0
    return str(caught.value)


def test_ranks_whose_gradients_arrive_in_different_orders_do_not_mix_up_norms() -> None:
    assert run_on_ranks(in_different_orders, 2) == [True, True]


def test_ranks_that_differ_from_the_beginning_are_refused() -> None:
    for message in run_on_ranks(in_different_orders_from_the_beginning, 2):
        assert "different orders on the ranks" in message


def refuse_data_parallel() -> list[str]:
    """On one rank: the wrapper, a module inside of one, and a wrapper that is made later."""
    messages = []
    for where in ("outside", "inside", "later"):
        model = Gpt(1)
        wrapper: Any = None if where == "later" else DistributedDataParallel(model)
        try:
            stepper = StepInBackward(wrapper if where == "outside" else model, adamw, Clip(1.0))
            wrapper = DistributedDataParallel(model)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            loss: Any = wrapper(DATA[0][:, :-1]).sum()
            loss.backward()
        except SettingError as error:
            messages.append(str(error))
        if where == "later":
            del stepper
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return messages


def test_data_parallel_is_refused_however_it_is_wrapped() -> None:
    (messages,) = run_on_ranks(refuse_data_parallel, 1)
    assert len(messages) == 3
    assert all("DistributedDataParallel" in message and "FSDP2" in message for message in messages)
