from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPPerLayerOptimizer

from support.ecosystem import POLICY, Recorder, a_model, loss_of
from tamegrad import SettingError
from tamegrad.torch import attach

SETTINGS: dict[str, Any] = {"noise_multiplier": 0.5, "expected_batch_size": 5}
PRIVATE = {
    DPOptimizer: {**SETTINGS, "max_grad_norm": 1.0},
    DPPerLayerOptimizer: {**SETTINGS, "max_grad_norm": [1.0] * 4},
    AdaClipDPOptimizer: {
        **SETTINGS,
        "max_grad_norm": 1.0,
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 0.2,
        "max_clipbound": 10.0,
        "min_clipbound": 0.01,
        "unclipped_num_std": 1.0,
    },
}


@pytest.mark.parametrize("private", PRIVATE)
def test_a_private_optimizer_is_refused_and_the_one_inside_is_not(private: Any) -> None:
    plain = a_model()
    model: Any = GradSampleModule(plain)
    outer = private(torch.optim.SGD(model.parameters(), lr=0.1), **PRIVATE[private])
    with pytest.raises(SettingError, match=r"optimizer\.original_optimizer"):
        attach(model, outer, POLICY)
    normalizer = attach(model, outer.original_optimizer, POLICY)
    recorder = Recorder(plain.named_parameters(), outer.original_optimizer)
    # What privacy makes of the gradients, clipped for each sample and with noise, is what tamegrad gets.
    outer.attach_step_hook(lambda _: recorder.backward_is_done())
    for _ in range(3):
        outer.zero_grad()
        loss_of(model).backward()
        outer.step()
    recorder.check(steps=3)
    assert normalizer.steps == 3
    assert normalizer.report is not None
    assert normalizer.report["0"].clipped
