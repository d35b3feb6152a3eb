"""Groups that may grow past their dtype, when their elements are on several ranks."""

from typing import Any, cast

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from support.overflow import Grow
from support.ranks import run_on_ranks
from tamegrad import Clip, Keep, Renormalize
from tamegrad.strategies import Strategy
from tamegrad.torch import GradientNormalizer

LOSS_SCALE = 2.0**20


def a_layer(values: list[float], mesh: Any, dtype: torch.dtype) -> nn.Module:
    """A layer whose only gradient is shared out over the ranks of a mesh."""
    whole = torch.tensor(values, dtype=dtype)
    layer = nn.Module()
    layer.weight = nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)]))
    layer.weight.grad = distribute_tensor(whole, mesh, [Shard(0)])
    return layer


def whole_gradient(layer: Any) -> list[float]:
    return cast("list[float]", layer.weight.grad.full_tensor().tolist())


def a_sharded_group(strategy: Strategy, loss_scale: float | None) -> tuple[list[float], list[float]]:
    mesh = init_device_mesh("cpu", (2,))
    # The largest element is on the second rank.
    layer = a_layer([1.0, 2.0, -4.0, 2.0], mesh, torch.float16)
    normalizer = GradientNormalizer(layer, strategy)
    report = normalizer._normalize(None if loss_scale is None else torch.tensor(loss_scale))
    return whole_gradient(layer), report.norms_after.tolist()


@pytest.mark.parametrize(("strategy", "loss_scale"), [(Renormalize(), LOSS_SCALE), (Grow(1e6), None)], ids=str)
def test_the_largest_element_of_any_rank_limits_a_group(strategy: Strategy, loss_scale: float | None) -> None:
    for values, norms in run_on_ranks(a_sharded_group, 2, strategy, loss_scale):
        assert values == [16376.0, 32752.0, -65504.0, 32752.0]
        assert norms == [pytest.approx(5 * 16376 / (loss_scale or 1.0), rel=1e-12)]


def a_pipeline_of_two_stages(dtype_of_second: torch.dtype) -> tuple[list[float], list[float]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shards"))
    stage = mesh["stages"].get_local_rank()
    dtype = (torch.float16, dtype_of_second)[stage]
    model = nn.Module()
    model.add_module(f"stage{stage}", a_layer([[1.0, 2.0], [0.0, -4.0]][stage], mesh["shards"], dtype))
    # A group that only one stage has grows too.
    alone: Any = a_layer([2.0, 4.0], mesh["shards"], torch.float16)
    if stage == 1:
        model.alone = alone
    overrides = {"alone": Grow(1e6)} if stage == 1 else None
    normalizer = GradientNormalizer(
        model, Renormalize(per="model"), overrides=overrides, process_groups=[mesh["stages"].get_group()]
    )
    report = normalizer._normalize(torch.tensor(LOSS_SCALE))
    layer = model.get_submodule(f"stage{stage}")
    if stage == 1:
        assert whole_gradient(alone) == [32752.0, 65504.0]
    return whole_gradient(layer), report.norms_after.tolist()[:1]


def test_the_largest_element_of_any_stage_limits_a_group() -> None:
    first, _, second, _ = run_on_ranks(a_pipeline_of_two_stages, 4, torch.float16)
    norm = 21**0.5 * 16376 / LOSS_SCALE
    assert first == ([16376.0, 32752.0], [pytest.approx(norm, rel=1e-12)])
    assert second == ([0.0, -65504.0], [pytest.approx(norm, rel=1e-12)])
    first, _, second, _ = run_on_ranks(a_pipeline_of_two_stages, 4, torch.float32)
    assert first[0] == [32752.0, 65504.0]
    assert second[0] == [0.0, -131008.0]


def stages_of_which_one_grows() -> list[float]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("stages",))
    strategy = Grow(1e6) if dist.get_rank() == 1 else Keep()
    layer = nn.Linear(2, 1, bias=False).half()
    layer.weight.grad = torch.tensor([[2.0, 4.0]]).half()
    normalizer = GradientNormalizer(
        nn.Sequential(layer), Clip(10.0, per="model"), overrides={"0": strategy}, process_groups=[mesh.get_group()]
    )
    normalizer.normalize_()
    assert not isinstance(layer.weight.grad, DTensor)
    return cast("list[float]", layer.weight.grad.flatten().tolist())


def test_a_stage_that_shares_no_group_that_grows_waits_for_no_other() -> None:
    assert run_on_ranks(stages_of_which_one_grows, 2) == [[2.0, 4.0], [32752.0, 65504.0]]
