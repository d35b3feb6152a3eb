"""When reports go to sinks, from which rank, and what happens if a sink fails."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from support.ranks import run_on_ranks
from tamegrad import Clip, Report, SettingError, TamegradWarning
from tamegrad.integrations import CsvSink
from tamegrad.torch import GradientNormalizer, attach, normalize_grad_


class Recorder:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[tuple[int, Report[Any]]] = []
        # A lock cannot be copied or pickled, like a writer that has threads.
        self.lock = threading.Lock()

    def write(self, step: int, report: Report[Any]) -> None:
        self.written.append((step, report))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.written]


class Failing(Recorder):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, step: int, report: Report[Any]) -> None:
        super().write(step, report)
        raise self.error

    def __repr__(self) -> str:
        return "Failing()"


class Loop:
    """A model with an optimizer that is attached to."""

    def __init__(self, *sinks: Any, optimizer: Any = torch.optim.SGD, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-3)
        self.normalizer = attach(self.model, self.optimizer, Clip(1.0), sinks=sinks, **settings)

    def loss(self) -> Any:
        self.optimizer.zero_grad()
        loss: Any = self.model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.loss()
            self.optimizer.step()


def test_every_nth_step_is_written_with_numpy_arrays() -> None:
    first, second = Recorder(), Recorder()
    loop = Loop(first, second, log_every=3)
    loop.run(7)
    assert first.steps == second.steps == [3, 6]
    report = first.written[0][1]
    assert isinstance(report.norms, type(report.on_host().norms))
    assert report is second.written[0][1]
    loop.run(2)
    assert loop.normalizer.report is not None
    assert first.written[-1][1].rows() == loop.normalizer.report.rows()


def test_every_fiftieth_step_is_written_if_nothing_is_said() -> None:
    sink = Recorder()
    Loop(sink).run(101)
    assert sink.steps == [50, 100]


def test_a_loop_by_hand_is_written_as_well() -> None:
    sink, model = Recorder(), nn.Linear(3, 2)
    normalizer = GradientNormalizer(model, Clip(1.0), sinks=[sink], log_every=2)
    for _ in range(5):
        model(torch.ones(4, 3)).sum().backward()
        normalizer.normalize_()
    assert sink.steps == [2, 4]


def test_a_step_with_many_evaluations_is_written_once() -> None:
    sink = Recorder()
    loop = Loop(sink, optimizer=torch.optim.LBFGS, log_every=1)
    for _ in range(2):
        loop.optimizer.step(loop.loss)
    assert sink.steps == [1, 2]


def test_a_round_of_several_optimizers_is_written_once() -> None:
    sink, model = Recorder(), nn.Linear(3, 2)
    optimizers = [torch.optim.SGD([parameter], lr=1e-3) for parameter in model.parameters()]
    attach(model, optimizers, Clip(1.0), sinks=[sink], log_every=1)
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert sink.steps == [1, 2, 3]


def test_the_steps_of_a_checkpoint_go_on(tmp_path: Path) -> None:
    path = tmp_path / "norms.csv"
    loop = Loop(CsvSink(path), log_every=2)
    loop.run(5)
    state = loop.normalizer.state_dict()
    resumed = Loop(CsvSink(path), log_every=2)
    resumed.normalizer.load_state_dict(state)
    resumed.run(3)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "2", "4", "6", "8"]
    assert resumed.normalizer.steps == 8
    resumed.normalizer.detach()
    resumed.normalizer.load_state_dict(state)
    assert resumed.normalizer.steps == 5


def test_a_full_disk_does_not_stop_the_training() -> None:
    failing, working = Failing(OSError(28, "No space left on device")), Recorder()
    loop = Loop(failing, working, log_every=1)
    with pytest.warns(
        TamegradWarning, match=r"Failing\(\) could not write step 1 and is left out.*No space left"
    ) as caught:
        loop.run(3)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert failing.steps == [1]
    assert working.steps == [1, 2, 3]


def test_a_mistake_in_a_sink_is_raised_after_the_step() -> None:
    loop = Loop(Failing(ZeroDivisionError("mine")), log_every=2)
    loop.run(1)
    before = loop.model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError, match="mine"):
        loop.run(1)
    assert not torch.equal(loop.model.weight, before)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])  # noqa: S301
def test_a_copy_writes_nothing(make_copy: Any) -> None:
    sink, model = Recorder(), nn.Linear(3, 2)
    normalizer = GradientNormalizer(model, Clip(1.0), sinks=[sink], log_every=1)
    other, other_model = make_copy((normalizer, model))
    for one, own in ((normalizer, model), (other, other_model)):
        own.weight.grad = torch.ones(2, 3)
        one.normalize_()
    assert sink.steps == [1]
    assert other.steps == 1


def test_what_is_no_sink_is_refused(tmp_path: Path) -> None:
    wrong: list[Any] = [CsvSink(tmp_path / "norms.csv"), [None], "norms.csv", [CsvSink], None]
    for sinks in wrong:
        with pytest.raises(SettingError, match=r"^sinks: got .*allowed: .*write\(step, report\)"):
            GradientNormalizer(nn.Linear(2, 2), Clip(1.0), sinks=sinks)
    numbers: list[Any] = [0, -1, 1.5, True, None]
    for every in numbers:
        with pytest.raises(SettingError, match="^log_every: got .*allowed: a whole number"):
            GradientNormalizer(nn.Linear(2, 2), Clip(1.0), log_every=every)
    with pytest.raises(SettingError, match=r"^normalize_grad_\(sinks\): got .*next: "):
        normalize_grad_(nn.Linear(2, 2), Clip(1.0), sinks=[Recorder()])


def on_a_rank(folder: str) -> list[int]:
    sink = Recorder()
    loop = Loop(sink, CsvSink(Path(folder, f"rank{dist.get_rank()}.csv")), log_every=1)
    loop.run(2)
    return sink.steps


def test_rank_0_writes_and_no_other_rank_makes_a_file(tmp_path: Path) -> None:
    assert run_on_ranks(on_a_rank, 2, str(tmp_path)) == [[1, 2], []]
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.csv"]
