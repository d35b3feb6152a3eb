from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer

from support.ecosystem import POLICY, Recorder, a_model, step_by_hand
from tamegrad import SettingError
from tamegrad.torch import attach


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_attaches_to_the_optimizer_inside_that_of_local_sgd() -> None:
    model = a_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=2))
    normalizer = attach(model, outer, POLICY)
    for optimizer in (outer, inner):
        with pytest.raises(SettingError, match="has a normalizer already"):
            attach(model, optimizer, POLICY)
    recorder = Recorder(model.named_parameters(), inner)
    for _ in range(4):
        step_by_hand(model, outer, recorder)
    recorder.check(steps=4)
    assert normalizer.steps == 4
    assert normalizer.report is not None
    assert normalizer.report["0"].clipped
