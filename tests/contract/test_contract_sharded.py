"""The same contract over several processes: a sharded model matches the reference for the whole model."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from support.contract import QUICK_BACKENDS, assert_same_report, assert_same_values, every_strategy, is_exact, widened
from support.ranks import run_on_ranks
from tamegrad import normalize
from tamegrad.strategies import OnNonfinite
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.memory import DTYPES

# The shape, the mesh ("both", "rows", "columns" or none), the parameter's placements and the gradient's.
Place = tuple[tuple[int, ...], str, tuple[Placement, ...], tuple[Placement, ...]]
S0, S1, R, P = Shard(0), Shard(1), Replicate(), Partial()
PLACES: dict[str, dict[str, Place]] = {
    "plain": {"weight": ((5, 3), "", (), ()), "scale": ((), "", (), ())},
    "fsdp": {"weight": ((8, 3), "rows", (S0,), (S0,)), "bias": ((7,), "rows", (S0,), (S0,))},
    "tensor_parallel": {"weight": ((6, 4), "columns", (S1,), (S1,)), "bias": ((6,), "columns", (R,), (R,))},
    "both": {
        "weight": ((12, 6), "both", (_StridedShard(0, split_factor=2), S0), (_StridedShard(0, split_factor=2), S0)),
        "bias": ((9,), "both", (S0, R), (S0, R)),
    },
    "hybrid": {"weight": ((4, 9), "both", (R, S1), (R, S1)), "bias": ((4,), "both", (R, R), (R, R))},
    "uneven": {"weight": ((3, 5), "both", (S0, S1), (S0, S1)), "bias": ((1,), "rows", (S0,), (S0,))},
    "empty": {"weight": ((0, 3), "rows", (S0,), (S0,)), "scale": ((), "columns", (R,), (R,))},
    "partial": {
        "weight": ((5,), "columns", (R,), (P,)),
        "bias": ((4,), "both", (S0, R), (P, P)),
        "scale": ((6,), "rows", (R,), (Partial("avg"),)),
    },
}


def whole_gradients(dtype: torch.dtype, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return {
        layer: {kind: torch.randn(place[0], generator=generator, dtype=wide).to(dtype) for kind, place in kinds.items()}
        for layer, kinds in PLACES.items()
    }


def parts_of(whole: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """Distributes a tensor; where a placement is a partial sum, the first rank holds all of it."""
    settled = [R if placement.is_partial() else placement for placement in placements]
    tensor = distribute_tensor(whole, mesh, settled, src_data_rank=None)
    part = tensor.to_local()
    for place, placement in zip(mesh.get_coordinate() or (), placements, strict=True):
        if isinstance(placement, Partial) and placement.reduce_op == "sum" and place > 0:
            part = torch.zeros_like(part)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def sharded_model(gradients: dict[str, dict[str, torch.Tensor]], root: DeviceMesh) -> nn.Module:
    meshes = {"both": root, "rows": root["rows"], "columns": root["columns"]}
    model = nn.Module()
    for layer, kinds in gradients.items():
        model.add_module(layer, nn.Module())
        for kind, whole in kinds.items():
            _, where, placements, unsettled = PLACES[layer][kind]
            parameter = nn.Parameter(torch.zeros_like(whole))
            gradient: torch.Tensor = whole.clone()
            if where:
                parameter = nn.Parameter(parts_of(torch.zeros_like(whole), meshes[where], placements))
                gradient = parts_of(whole, meshes[where], unsettled)
            parameter.grad = gradient
            model.get_submodule(layer).register_parameter(kind, parameter)
    return model


def cases() -> Iterator[tuple[torch.dtype, object, OnNonfinite, float | None]]:
    """Yields every strategy, dtype and `on_nonfinite`, but not every combination: ranks do not affect them."""
    choices: tuple[OnNonfinite, ...] = ("keep", "zero", "skip_group", "skip")
    for number, strategy in enumerate(every_strategy()):
        yield DTYPES[number % len(DTYPES)], strategy, "keep", None
        yield torch.float32, strategy, choices[number % 4], (math.nan, -math.inf)[number % 2]


def compare_with_the_reference(backend: Any) -> list[bytes]:
    """Runs every case; returns the bits of all norms, which must be the same on every rank."""
    root = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("rows", "columns"))
    seen = []
    for seed, (dtype, strategy, on_nonfinite, bad) in enumerate(cases()):
        gradients = whole_gradients(dtype, seed)
        if bad is not None:
            gradients["fsdp"]["weight"][7, 1] = bad
        arrays = {
            layer: {kind: widened(gradient).numpy().copy() for kind, gradient in kinds.items()}
            for layer, kinds in gradients.items()
        }
        expected, expected_report = normalize(arrays, strategy, on_nonfinite=on_nonfinite)
        model = sharded_model(gradients, root)
        before = {name: parameter.grad for name, parameter in model.named_parameters()}
        normalizer = GradientNormalizer(model, strategy, on_nonfinite=on_nonfinite, backend=backend)
        report = normalizer.normalize_()
        assert_same_report(report, expected_report, exact=is_exact(normalizer.plan))
        for name, parameter in model.named_parameters():
            layer, kind = name.split(".")
            gradient, after = parameter.grad, torch.from_numpy(np.asarray(expected[layer][kind]))
            if gradient is None:
                # Left out of the next step, on every rank.
                assert on_nonfinite == "skip_group"
                assert report.nonfinite.any()
                continue
            assert isinstance(gradient, DTensor) == isinstance(parameter, DTensor)
            if isinstance(gradient, DTensor):
                after = parts_of(after, gradient.device_mesh, gradient.placements).to_local()
                gradient = gradient.to_local()
            assert gradient is not None
            assert_same_values(gradient, after.numpy(), f"{strategy} {dtype} {name}")
            # Partial sums are all-reduced only if their layer changes; everything else changes in place.
            changed = any(expected[layer][kind].tobytes() != arrays[layer][kind].tobytes() for kind in arrays[layer])
            if layer == "partial" and changed and parameter.grad is not before[name]:
                assert isinstance(parameter.grad, DTensor)
                assert parameter.grad.placements == PLACES[layer][kind][2]
            else:
                assert parameter.grad is before[name]
        seen.append(report.norms.numpy().tobytes() + report.total_norm.numpy().tobytes())
    return seen


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_strategy_matches_the_reference_on_every_rank(ranks: int, backend: str) -> None:
    first, *others = run_on_ranks(compare_with_the_reference, ranks, backend)
    assert all(other == first for other in others)
    assert len(set(first)) > len(first) // 2
