"""Gradients in a dictionary that are DTensors: one norm over all ranks."""

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split

from support.ranks import run_on_ranks
from tamegrad import Clip, SettingError
from tamegrad.torch import normalize_grad_

RANKS = 2
WHOLE = torch.tensor([1.0, 2.0, 2.0, 4.0])


def normalized(again: bool) -> tuple[list[float], list[float]]:  # noqa: FBT001  what `run_on_ranks` passes
    mesh = init_device_mesh("cpu", (RANKS,))
    gradients: dict[str, Any] = {
        "a.weight": distribute_tensor(WHOLE, mesh, [Split(0)]),
        "a.bias": distribute_tensor(WHOLE, mesh, [Replicate()]),
    }
    if again:
        gradients["a.scale"] = gradients["a.weight"]
    report = normalize_grad_(gradients, Clip(1.0))
    return report.norms.tolist(), torch.stack([gradient.full_tensor() for gradient in gradients.values()]).tolist()


def refused() -> str:
    mesh = init_device_mesh("cpu", (RANKS,))
    gradient = DTensor.from_local(WHOLE.clone(), mesh, [Partial()])
    with pytest.raises(SettingError) as raised:
        normalize_grad_({"a.weight": gradient}, Clip(1.0))
    return str(raised.value)


@pytest.mark.parametrize("again", [False, True])
def test_sharded_gradients_have_one_norm_over_all_ranks(again: bool) -> None:  # noqa: FBT001
    tensors = 3 if again else 2
    norm = 5.0 * tensors**0.5
    for norms, after in run_on_ranks(normalized, RANKS, again):
        assert norms == pytest.approx([norm])
        torch.testing.assert_close(torch.tensor(after), WHOLE.expand(tensors, -1) / norm)


def test_refuses_gradients_that_the_ranks_still_have_to_add_up() -> None:
    for message in run_on_ranks(refused, RANKS):
        assert "a.weight: got a DTensor whose ranks still have to be added up" in message
        assert "redistribute" in message
