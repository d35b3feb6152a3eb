"""Communication between ranks: one sum a step, plans that agree, and the same decisions on every rank."""

import pickle
import warnings
from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from support.ranks import run_on_ranks
from tamegrad import Clip, ClipValue, Policy
from tamegrad.errors import NonFiniteGradientError, SettingError, TamegradError
from tamegrad.strategies import OnNonfinite
from tamegrad.torch import GradientNormalizer, attach, normalize_grad_
from tamegrad.torch.sharded.agreement import digest_of
from tamegrad.torch.sharded.distributed import _Card


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in PyTorch
    """Counts the collectives that start, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # DTensor dispatches first; the collectives inside its operation then come through here.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in {"c10d", "_c10d_functional"}:
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def a_model(layers: int = 3) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def with_gradients(model: Any, value: float = 1.0) -> Any:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return model


def rows_and_columns() -> Any:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("rows", "columns"))


def refusal_of(call: Any) -> tuple[str, str]:
    try:
        call()
    except TamegradError as error:
        return type(error).__name__, str(error)
    return "", ""


# Collectives of a step.


def collectives_of_a_step(kind: str, layers: int) -> dict[str, int]:
    model = a_model(layers)
    mesh = rows_and_columns()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "replicated":
        for layer in model:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate(), Replicate()]))
    elif kind == "fsdp":
        for layer in model:
            fully_shard(layer)
    else:
        for number, layer in enumerate(model):
            on, placements = [(mesh, [Shard(0), Shard(1)]), (mesh["rows"], [Shard(0)])][number % 2]
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), on, placements))
    normalizer = GradientNormalizer(with_gradients(model), Clip(0.1), on_nonfinite="skip")
    with Collectives() as collectives:
        normalizer.normalize_()
    return dict(collectives.counts)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("ddp", {}), ("replicated", {}), ("fsdp", {"allreduce_": 1}), ("mixed", {"allreduce_": 1})],
)
def test_a_step_takes_one_all_reduce_and_none_if_nothing_is_sharded(kind: str, expected: dict[str, int]) -> None:
    for layers in (2, 9):
        assert run_on_ranks(collectives_of_a_step, 4, kind, layers) == [expected] * 4


def collectives_with_partial_sums(layers: int) -> tuple[dict[str, int], list[float]]:
    mesh = init_device_mesh("cpu", (2,))
    model = a_model(layers)
    for layer in model:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Replicate()]))
    # As sequence parallelism leaves them on replicated parameters.
    for layer in with_gradients(model):
        layer.bias.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    normalizer = GradientNormalizer(model, Clip(1.0, per="tensor"))
    with Collectives() as collectives:
        report = normalizer.normalize_()
    return dict(collectives.counts), report.norms.tolist()


def test_partial_sums_take_one_more_all_reduce_for_any_number_of_layers() -> None:
    for layers in (2, 9):
        for counts, norms in run_on_ranks(collectives_with_partial_sums, 2, layers):
            assert counts == {"allreduce_": 2}
            assert norms == [4.0] * (2 * layers)


# Differences between ranks.


def a_rank_without_gradients() -> list[float]:
    model = with_gradients(fully_shard(a_model()))
    if dist.get_rank() == 1:
        for parameter in model.parameters():
            parameter.grad = None
    with warnings.catch_warnings(record=True, action="always") as caught:
        norms = GradientNormalizer(model, Clip(1.0)).normalize_().norms.tolist()
    assert ["nothing to normalize" in str(warning.message) for warning in caught] == [True] * dist.get_rank()
    return cast("list[float]", norms)


def test_a_rank_without_gradients_adds_nothing_and_blocks_no_other_rank() -> None:
    # The other rank has half of 16 + 4 ones.
    for norms in run_on_ranks(a_rank_without_gradients, 2):
        assert norms == [10**0.5] * 3


def some_gradients() -> list[float]:
    model = with_gradients(fully_shard(a_model()))
    if dist.get_rank() == 1:
        model[0].weight.grad = model[2].weight.grad = model[2].bias.grad = None
    return cast("list[float]", GradientNormalizer(model, Clip(1.0)).normalize_().norms.tolist())


def test_a_gradient_that_one_rank_lacks_adds_nothing_there() -> None:
    # Each rank has half of 16 + 4 ones.
    for norms in run_on_ranks(some_gradients, 2):
        torch.testing.assert_close(norms, [12**0.5, 20**0.5, 10**0.5])


def other_settings(kind: str) -> tuple[str, str]:
    odd = dist.get_rank() == 1
    model = fully_shard(a_model(4 if odd and kind == "model" else 3))
    overrides: Any = {"9": None} if odd and kind == "override" else None
    return refusal_of(lambda: GradientNormalizer(model, Clip(1.0), overrides=overrides))


def test_models_that_differ_are_refused_on_every_rank() -> None:
    for name, message in run_on_ranks(other_settings, 4, "model"):
        assert name == "SettingError"
        assert "on 1 of 4 ranks" in message
        assert "on rank 1" in message


def test_an_error_in_the_plan_of_one_rank_is_raised_on_all() -> None:
    (other, message), (own, own_message), *_ = run_on_ranks(other_settings, 4, "override")
    assert own == "UnmatchedError"
    assert "closest" in own_message
    assert other == "SettingError"
    assert "the plan of rank 1: got an error: override '9'" in message
    assert message.endswith("next: fix the error on rank 1")


def a_changed_model() -> tuple[list[float], list[str]]:
    model = a_model()
    for layer in model:
        fully_shard(layer)
    normalizer = GradientNormalizer(with_gradients(model), Clip(1.0))
    normalizer.normalize_()
    model.append(with_gradients(fully_shard(nn.Linear(4, 4))))
    report = normalizer.normalize_()
    return report.norms.tolist(), list(report.groups)


def test_the_plan_follows_a_model_that_changes_on_every_rank() -> None:
    for norms, groups in run_on_ranks(a_changed_model, 2):
        torch.testing.assert_close(norms, [1.0, 1.0, 1.0, 20**0.5])
        assert groups == ["0", "1", "2", "3"]


def a_gradient_on_another_mesh() -> tuple[str, str]:
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.ones(4), other, [Replicate(), Shard(0)])
    normalizer = GradientNormalizer([("out.bias", parameter)], Clip(1.0))
    return refusal_of(normalizer.normalize_)


def test_a_gradient_on_a_different_mesh_from_its_parameter_is_refused() -> None:
    for name, message in run_on_ranks(a_gradient_on_another_mesh, 2):
        assert name == "SettingError"
        assert "gradient of out.bias: got a gradient that is sharded over DeviceMesh((1, 2)" in message


def gradients_with_other_placements() -> list[float]:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(torch.arange(16.0).view(4, 4), mesh, [Shard(1)])
    GradientNormalizer([("out.weight", parameter)], ClipValue(2.0)).normalize_()
    gradient: Any = parameter.grad
    assert gradient.placements == parameter.placements  # type: ignore[attr-defined]  # a DTensor
    return cast("list[float]", gradient.full_tensor().flatten().tolist())


def test_a_gradient_sharded_differently_from_its_parameter_is_normalized_too() -> None:
    assert run_on_ranks(gradients_with_other_placements, 2) == [[0.0, 1.0] + [2.0] * 14] * 2


# Non-finite gradients.


def a_nan_on_one_rank(on_nonfinite: OnNonfinite) -> dict[str, Any]:
    model = a_model()
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    normalizer = attach(model, optimizer, Clip(1.0), on_nonfinite=on_nonfinite)
    with_gradients(model)
    gradients: Any = [parameter.grad for parameter in model.parameters()]
    if dist.get_rank() == 1:
        gradients[2].to_local()[0, 1] = float("nan")
        gradients[3].to_local()[0] = float("-inf")
    before = [parameter.full_tensor().clone() for parameter in cast("Any", model.parameters())]
    refusal, counts = "", {}
    try:
        optimizer.step()
    except NonFiniteGradientError as error:
        refusal, counts = str(error), error.counts
    after = [parameter.full_tensor() for parameter in cast("Any", model.parameters())]
    return {
        "refusal": refusal,
        "counts": counts,
        "unchanged": [old.equal(new) for old, new in zip(before, after, strict=True)],
        "skipped": normalizer.skipped_steps,
        "nonfinite": normalizer.nonfinite_steps,
        "state": len(optimizer.state),
    }


@pytest.mark.parametrize("on_nonfinite", ["zero", "skip", "raise"])
def test_every_rank_decides_the_same_about_a_nan_on_one_rank(on_nonfinite: OnNonfinite) -> None:
    first, second = run_on_ranks(a_nan_on_one_rank, 2, on_nonfinite)
    assert first == second
    assert first["nonfinite"] == {"1": 1}
    if on_nonfinite == "zero":
        # Adam does not move where the gradient was always zero.
        assert first["unchanged"] == [False, False, True, True, False, False]
    else:
        assert all(first["unchanged"])
        assert first["state"] == 0
    assert first["skipped"] == (on_nonfinite == "skip")
    assert first["counts"] == ({"1.weight": (1, 0, 0), "1.bias": (0, 0, 1)} if on_nonfinite == "raise" else {})
    assert ("layer '1'" in first["refusal"]) == (on_nonfinite == "raise")


# Pipelines: two stages, the rows of the mesh, of two ranks each.


def a_pipeline(policy: Any, on_nonfinite: OnNonfinite, bad_rank: int | None) -> dict[str, Any]:
    mesh = rows_and_columns()
    stage = mesh["rows"].get_local_rank()
    model = nn.Sequential()
    for name in (("first", "shared"), ("second", "third"))[stage]:
        model.add_module(name, nn.Linear(4, 4))
    fully_shard(model, mesh=mesh["columns"])
    with_gradients(model)
    if dist.get_rank() == bad_rank:
        cast("Any", model.get_parameter("third.weight").grad).to_local()[0, 0] = float("inf")
    group = mesh["rows"].get_group()
    normalizer = GradientNormalizer(model, policy, on_nonfinite=on_nonfinite, process_groups=[group])
    with Collectives() as collectives:
        try:
            report = normalizer.normalize_()
        except NonFiniteGradientError as error:
            return {"refusal": str(error)}
    weight: Any = next(model.parameters()).grad
    return {
        "norms": dict(zip(report.groups, report.norms.tolist(), strict=True)),
        "total": float(report.total_norm),
        "skipped": report.skipped,
        "weight": float(weight.full_tensor()[0, 0]),
        "collectives": dict(collectives.counts),
    }


def test_a_group_of_the_whole_model_spans_the_stages_of_a_pipeline() -> None:
    for result in run_on_ranks(a_pipeline, 4, Clip(1.0, per="model"), "keep", None):
        assert result["norms"] == {"model": 80**0.5}
        assert result["total"] == 80**0.5
        assert result["weight"] == pytest.approx(80**-0.5)
        assert result["collectives"] == {"allreduce_": 2}


def test_layers_and_groups_of_one_stage_stay_within_it() -> None:
    policy = Policy(Clip(1.0, per="model"), {"*ir*": Clip(0.5), "*ir*/bias": None, "*/bias": Clip(9.0, per="model")})
    first, _, second, _ = run_on_ranks(a_pipeline, 4, policy, "keep", None)
    assert first["norms"] == {"first": 20**0.5, "model": 32**0.5, "*/bias": 8**0.5}
    assert second["norms"] == {"model": 32**0.5, "*/bias": 8**0.5, "third": 20**0.5}
    assert first["total"] == second["total"] == 80**0.5


def test_all_stages_skip_a_step_with_a_nonfinite_gradient_in_one() -> None:
    for result in run_on_ranks(a_pipeline, 4, Clip(1.0), "skip", 3):
        assert result["skipped"]
        assert result["weight"] == 1.0
    first, _, second, _ = run_on_ranks(a_pipeline, 4, Clip(1.0), "raise", 3)
    assert "another stage" in first["refusal"]
    assert "third.weight: 1 +inf" in second["refusal"]


def an_override_without_a_layer(pattern: str) -> tuple[str, str]:
    mesh = rows_and_columns()
    model = nn.Sequential()
    model.add_module(("first", "second")[mesh["rows"].get_local_rank()], nn.Linear(4, 4))
    fully_shard(model, mesh=mesh["columns"])
    groups = [mesh["rows"].get_group()]
    return refusal_of(lambda: GradientNormalizer(model, Clip(1.0), overrides={pattern: None}, process_groups=groups))


def test_an_override_must_match_in_at_least_one_stage() -> None:
    assert run_on_ranks(an_override_without_a_layer, 4, "second") == [("", "")] * 4
    for name, message in run_on_ranks(an_override_without_a_layer, 4, "third"):
        assert name == "UnmatchedError"
        assert "override 'third'" in message


def test_ranks_exchange_few_bytes() -> None:
    sent = [_Card(None, (0, 1_000, 9_999)), digest_of(["plan"]), digest_of(["settings"])]
    assert sum(len(pickle.dumps(one)) for one in sent) < 300


def stages_that_disagree() -> tuple[str, str]:
    mesh = rows_and_columns()
    model = fully_shard(a_model(), mesh=mesh["columns"])
    threshold = 1.0 + mesh["rows"].get_local_rank()
    groups = [mesh["rows"].get_group()]
    return refusal_of(lambda: GradientNormalizer(model, Clip(threshold, per="model"), process_groups=groups))


def test_stages_that_disagree_on_a_shared_group_are_refused() -> None:
    for name, message in run_on_ranks(stages_that_disagree, 4):
        assert name == "SettingError"
        assert "Clip(threshold=1.0, per='model') and, on rank" in message


@pytest.mark.parametrize("wrong", ["pp", [1], None])
def test_anything_but_process_groups_is_refused(wrong: Any) -> None:
    with pytest.raises(SettingError, match="process_groups: got"):
        GradientNormalizer(a_model(), Clip(1.0), process_groups=wrong)


# Optimizers and wrappers.


def a_zero_redundancy_optimizer() -> list[torch.Tensor]:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # from PyTorch itself
        from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415
    model = DistributedDataParallel(a_model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=1.0)
    # The optimizer inside holds what this rank updates.
    assert (
        "attach to the ZeroRedundancyOptimizer itself"
        in refusal_of(lambda: attach(model, optimizer.optim, ClipValue(0.25)))[1]
    )
    normalizer = attach(model, optimizer, ClipValue(0.25))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with_gradients(model)
    optimizer.step()
    assert normalizer.report is not None
    assert normalizer.report.groups == ("0", "1", "2")
    return [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


def test_attaches_to_an_optimizer_that_shards_its_state() -> None:
    for moved in run_on_ranks(a_zero_redundancy_optimizer, 2):
        for difference in moved:
            torch.testing.assert_close(difference, torch.full_like(difference, 0.25))


def fsdp1(*, use_orig_params: bool) -> tuple[str, str]:
    model = FullyShardedDataParallel(a_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    whole = refusal_of(lambda: GradientNormalizer(model, Clip(1.0)))
    pairs = refusal_of(lambda: GradientNormalizer(model.named_parameters(), Clip(1.0)))
    assert whole[0] == pairs[0]
    return whole


def test_fsdp1_is_refused_and_the_error_names_the_alternative() -> None:
    for name, message in run_on_ranks(fsdp1_both_ways, 2):
        assert name == "SettingError"
        assert "FSDP1" in message
        assert "fully_shard (FSDP2)" in message


def fsdp1_both_ways() -> tuple[str, str]:
    flat, views = fsdp1(use_orig_params=False), fsdp1(use_orig_params=True)
    assert flat[0] == views[0]
    return views


def test_deepspeed_is_refused_and_the_error_names_the_alternative() -> None:
    engine = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})(2, 2)
    with pytest.raises(SettingError, match="a DeepSpeedEngine from DeepSpeed.*gradient_clipping"):
        normalize_grad_(engine, Clip(1.0))
    optimizer = type("ZeRO", (), {"__module__": "deepspeed.runtime.zero.stage3"})
    model = a_model()
    with pytest.raises(SettingError, match="attach.optimizer.: got a ZeRO from DeepSpeed"):
        attach(model, optimizer(), Clip(1.0))
    model[1].bias.ds_id = 3
    with pytest.raises(SettingError, match=r"parameter 1\.bias: .*partitioned"):
        GradientNormalizer(model, Clip(1.0))
