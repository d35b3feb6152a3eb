"""`attach` in a loop with Accelerate, compared with a loop that is written by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import AutocastKwargs
from torch import Tensor

from support.ecosystem import POLICY, a_model
from support.trainers import STEPS, an_optimizer, batches, check_same, mean_loss, train_by_hand
from tamegrad.torch import attach


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps the state of a process for all tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(*, fused: bool = False, scaled: bool = False, **settings: Any) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator(cpu=True, **settings)
    if scaled:
        # A loss scale without float16, which on the CPU is something else.
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain = a_model()
    model, optimizer = accelerator.prepare(plain, an_optimizer(plain, fused=fused))
    return accelerator, model, optimizer, attach(model, optimizer, POLICY)


def train(accelerator: Any, model: Any, optimizer: Any, data: list[Tensor], *, max_norm: float | None = None) -> None:
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(mean_loss(model, batch))
            if max_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1e9])
def test_parameters_are_those_of_a_loop_by_hand(
    accumulate: int, max_norm: float | None, *, fused: bool, scaled: bool
) -> None:
    accelerator, model, optimizer, normalizer = prepared(
        fused=fused, scaled=scaled, gradient_accumulation_steps=accumulate
    )
    data = batches(accumulate * STEPS)
    train(accelerator, model, optimizer, data, max_norm=max_norm)
    check_same(accelerator.unwrap_model(model), train_by_hand(a_model(), data, accumulate=accumulate))
    assert normalizer.steps == STEPS
    if scaled:
        assert accelerator.scaler._get_growth_tracker() == STEPS


def test_resume(tmp_path: Path) -> None:
    data = batches(STEPS)
    accelerator, model, optimizer, normalizer = prepared()
    accelerator.register_for_checkpointing(normalizer)
    train(accelerator, model, optimizer, data[:5])
    accelerator.save_state(str(tmp_path))
    accelerator, model, optimizer, normalizer = prepared()
    accelerator.register_for_checkpointing(normalizer)
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, data[5:])
    check_same(model, train_by_hand(a_model(), data))
    assert normalizer.steps == STEPS
