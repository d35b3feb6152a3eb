"""Models sharded in each way that PyTorch has train like the same model in one process."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from support.ranks import run_on_ranks
from tamegrad import Clip, ClipValue, Policy, Renormalize
from tamegrad.torch import attach

WIDTH, WORDS, STEPS = 6, 4, 3
MEASURED = ("norms", "scales", "total_norm")
POLICIES = [
    Policy(Clip(0.05), {"*norm": Clip(0.02, per="tensor"), "*.down/bias": ClipValue(0.001), "head": Renormalize()}),
    Policy(Clip(0.1, per="model")),
]


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, inner)
        self.down = nn.Linear(inner, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", x + self.down(torch.relu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        # Tensor parallelism needs even shards; 10 makes uneven ones on four processes, and some empty ones on eight.
        inner = 8 if kind in {"tp", "sp"} else 10
        self.blocks = nn.Sequential(Block(inner), Block(inner))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(self.blocks(x)))


class Expert(nn.Linear):
    """A linear layer that is sharded over processes and gathered on each, for its own part of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = [
            parameter.full_tensor(grad_placements=[Partial("avg")]) if isinstance(parameter, DTensor) else parameter
            for parameter in (self.weight, self.bias)
        ]
        # FSDP warns about outputs that are views.
        return nn.functional.linear(x, *whole).clone()


def tensor_parallel(model: Any, mesh: Any) -> None:
    """Shards the linear layers of the blocks; the other layers stay plain."""
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def fully_sharded(model: Any, **settings: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **settings)
    return cast("nn.Module", fully_shard(model, **settings))


# Each kind of sharding returns the model and the number of parts that the batch is split into.
Sharded = tuple[nn.Module, int]


def ddp(model: Any, ranks: int) -> Sharded:
    return DistributedDataParallel(model), ranks


def fsdp(model: Any, ranks: int) -> Sharded:
    return fully_sharded(model), ranks


def fsdp_offloaded(model: Any, ranks: int) -> Sharded:
    return fully_sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False)), ranks


def hybrid(model: Any, ranks: int) -> Sharded:
    return fully_sharded(model, mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copy", "shard"))), ranks


def tp(model: Any, ranks: int) -> Sharded:
    tensor_parallel(model, init_device_mesh("cpu", (ranks,)))
    return model, 1


def sp(model: Any, ranks: int) -> Sharded:
    """Shards the sequence: replicated parameters get partial gradients, still to be all-reduced."""
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        up = ColwiseParallel(input_layouts=Shard(1))
        down = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
        parallelize_module(block, mesh, {"norm": SequenceParallel(), "up": up, "down": down})
    distribute_module(model.head, mesh)
    return model, 1


def fsdp_tp(model: Any, ranks: int) -> Sharded:
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    return fully_sharded(model, mesh=mesh["data"]), ranks // 2


def fsdp_tp_plain(model: Any, ranks: int) -> Sharded:
    """Applies FSDP only to tensor-parallel parameters: plain tensors beside DTensors on a 2-D mesh."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    plain = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    for parameter in plain:
        # FSDP ignores these parameters, so their gradients are averaged here.
        parameter.register_post_accumulate_grad_hook(averaged_over(mesh["data"]))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"], ignored_params=plain & set(block.parameters()))
    return model, ranks // 2


def averaged_over(mesh: Any) -> Callable[[Any], None]:
    def average(parameter: Any) -> None:
        dist.all_reduce(parameter.grad, group=mesh.get_group())
        parameter.grad /= mesh.size()

    return average


def experts(model: Any, ranks: int) -> Sharded:
    """Shards two layers over one mesh and the rest over another."""
    few = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "expert"))
    everyone = init_device_mesh("cpu", (ranks,))
    block = model.blocks[1]
    for layer in (block.up, block.down):
        layer.__class__ = Expert
        for name, parameter in list(layer.named_parameters()):
            part = distribute_tensor(parameter.detach(), few["expert"], [Shard(0)])
            layer.register_parameter(name, nn.Parameter(part))
        fully_shard(layer, mesh=few["data"])
    elsewhere = {parameter for layer in (block.up, block.down) for parameter in layer.parameters()}
    fully_shard(model, mesh=everyone, ignored_params=elsewhere)
    return model, ranks


KINDS = {kind.__name__: kind for kind in (ddp, fsdp, fsdp_offloaded, hybrid, tp, sp, fsdp_tp, fsdp_tp_plain, experts)}


def train(model: nn.Module, batch: torch.Tensor, policy: Policy) -> dict[str, Any]:
    """Trains for some steps; returns the measurements of each, and the parameters as plain tensors."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    normalizer = attach(model, optimizer, policy)
    measured: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURED}
    for step in range(STEPS):
        model(batch * (step + 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, vectors in measured.items():
            vectors.append(getattr(normalizer.report, name))
    return {
        "groups": normalizer.plan.groups,
        "parameters": [whole(parameter.detach()) for parameter in model.parameters()],
        **{name: torch.stack(vectors) for name, vectors in measured.items()},
    }


def whole(tensor: Any) -> torch.Tensor:
    return cast("torch.Tensor", tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def a_batch() -> torch.Tensor:
    return torch.randn(8, WORDS, WIDTH, generator=torch.Generator().manual_seed(5))


def train_sharded(kind: str) -> list[dict[str, Any]]:
    ranks, results = dist.get_world_size(), []
    for policy in POLICIES:
        model, parts = KINDS[kind](Model(kind), ranks)
        batch: Any = a_batch().chunk(parts)[dist.get_rank() * parts // ranks]
        if kind == "sp":
            batch = distribute_tensor(batch, init_device_mesh("cpu", (ranks,)), [Shard(1)])
        results.append(train(model, batch, policy))
    return results


@pytest.mark.parametrize(("kind", "ranks"), [*((kind, 4) for kind in KINDS), ("fsdp", 2), ("fsdp", 8), ("fsdp_tp", 8)])
def test_training_on_several_processes_matches_one_process(kind: str, ranks: int) -> None:
    results = run_on_ranks(train_sharded, ranks, kind)
    for number, policy in enumerate(POLICIES):
        alone, first = train(Model(kind), a_batch(), policy), results[0][number]
        for result in (by_policy[number] for by_policy in results):
            assert result["groups"] == alone["groups"]
            for name in MEASURED:
                assert result[name].equal(first[name]), f"{name} differs between ranks"
                torch.testing.assert_close(result[name], alone[name], rtol=1e-6, atol=0)
            for here, there in zip(result["parameters"], alone["parameters"], strict=True):
                torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
