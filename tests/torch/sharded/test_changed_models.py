"""A model that changed on some ranks only: an error on every rank at that step, in the sum that a step takes anyway."""

import time
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from support.ranks import COLLECTIVE_TIMEOUT, run_on_ranks
from tamegrad import Clip
from tamegrad.errors import SettingError
from tamegrad.strategies import OnNonfinite
from tamegrad.torch import GradientNormalizer


def with_gradients(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    return model


def refusal_of(normalizer: GradientNormalizer) -> str:
    try:
        normalizer.normalize_()
    except SettingError as error:
        return str(error)
    return ""


def changed_on(ranks: list[int], on_nonfinite: OnNonfinite) -> tuple[list[str], bool, float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    normalizer = GradientNormalizer(with_gradients(model), Clip(1e-3), on_nonfinite=on_nonfinite)
    normalizer.normalize_()
    with_gradients(model)
    before = [parameter.grad.to_local().clone() for parameter in model.parameters()]
    if dist.get_rank() in ranks:
        del model[2]
    start = time.monotonic()
    # A program that goes on gets the same error again.
    refusals = [refusal_of(normalizer), refusal_of(normalizer)]
    elapsed = time.monotonic() - start
    after = [parameter.grad.to_local() for parameter in model.parameters()]
    return refusals, all(old.equal(new) for old, new in zip(before, after, strict=False)), elapsed


@pytest.mark.parametrize(
    ("ranks", "on_nonfinite", "named"), [([1], "keep", "on rank 1"), ([0, 2], "raise", "on 2 ranks")]
)
def test_a_model_that_changed_on_some_ranks_is_refused_on_all(
    ranks: list[int], on_nonfinite: OnNonfinite, named: str
) -> None:
    for rank, (refusals, unchanged, elapsed) in enumerate(run_on_ranks(changed_on, 3, ranks, on_nonfinite)):
        for refusal in refusals:
            assert f"the model: got layers or parameters that changed {named} since the last step" in refusal
            assert ("not on this one" in refusal) == (rank not in ranks)
        assert unchanged
        assert elapsed < COLLECTIVE_TIMEOUT / 4


def test_a_model_that_changed_on_all_ranks_is_followed() -> None:
    for refusals, unchanged, _ in run_on_ranks(changed_on, 3, [0, 1, 2], "keep"):
        assert refusals == ["", ""]
        assert not unchanged


def a_stage_that_changed(stages: list[int]) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shards"))
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        fully_shard(layer, mesh=mesh["shards"])
    groups = [mesh["stages"].get_group()]
    normalizer = GradientNormalizer(with_gradients(model), Clip(1.0, per="model"), process_groups=groups)
    normalizer.normalize_()
    if mesh["stages"].get_local_rank() in stages:
        del model[1]
    return refusal_of(normalizer)


def test_stages_of_a_pipeline_change_together() -> None:
    assert run_on_ranks(a_stage_that_changed, 4, [0, 1]) == [""] * 4
    refusals = run_on_ranks(a_stage_that_changed, 4, [1])
    assert all("changed on 2 ranks" in refusal for refusal in refusals)


def a_policy_that_changed(ranks: list[int]) -> tuple[str, list[float]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = nn.Sequential(nn.Linear(6, 6))
    fully_shard(model[0], mesh=mesh)
    normalizer = GradientNormalizer(with_gradients(model), Clip(1e-3))
    normalizer.normalize_()
    with_gradients(model)
    refusal = ""
    try:
        if dist.get_rank() in ranks:
            normalizer.policy = Clip(1e-4)
        normalizer.normalize_()
    except SettingError as error:
        refusal = str(error)
    assert normalizer.report is not None
    return refusal, normalizer.report.norms_after.tolist()


def test_a_policy_changes_on_all_ranks_or_on_none() -> None:
    for refusal, norms_after in run_on_ranks(a_policy_that_changed, 2, [0, 1]):
        assert refusal == ""
        assert norms_after == pytest.approx([1e-4])
    for refusal, _ in run_on_ranks(a_policy_that_changed, 2, [1]):
        assert "changed on rank 1" in refusal


def a_change_under_another_default_device() -> list[float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    with_gradients(model)
    with torch.device("meta"):
        normalizer = GradientNormalizer(model, Clip(1e-3))
        normalizer.normalize_()
        del model[1]
        report = normalizer.normalize_()
    norms: list[float] = report.norms_after.tolist()
    return norms


def test_another_default_device_changes_nothing() -> None:
    for norms in run_on_ranks(a_change_under_another_default_device, 2):
        assert norms == pytest.approx([1e-3])
