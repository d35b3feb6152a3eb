"""A step like the last one, which the CPU backend takes in one call: when it does, and that nothing else changes."""

import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.contract import bits
from support.gradients import model_with, random_gradients
from tamegrad import Clip, ClipValue, Keep, NonFiniteGradientError, Renormalize
from tamegrad.torch import GradientNormalizer, attach
from tamegrad.torch.kernels import cpu, cpu_step, objects, threads

pytestmark = pytest.mark.skipif(not objects.AVAILABLE, reason="this PyTorch is too old for the walk")
OPENMP = pytest.mark.skipif(not threads._openmp[0], reason="this PyTorch has no threads to lend")
NAN = math.nan


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list to which every step that is tried in one call adds whether it was one like the last."""
    found: list[bool] = []

    def take_step(*args: Any, **settings: Any) -> Any:
        step = cpu_step.take_step(*args, **settings)
        found.append(step[0])
        return step

    monkeypatch.setattr(cpu, "take_step", take_step)
    return found


def many_small_layers(dtype: torch.dtype = torch.float32) -> Any:
    return model_with(random_gradients((3000, 100, 7) * 400 + (3 * cpu.CHUNK + 1,), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_it_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype, taken: list[bool]) -> None:
    normalizer = GradientNormalizer(many_small_layers(dtype), ClipValue(1e9), backend="cpu")
    wanted = bits(normalizer.normalize_().norms)
    for count in (1, *(2, 3, 5) * 10):
        torch.set_num_threads(count)
        assert torch.equal(bits(normalizer.normalize_().norms), wanted)
    assert taken == [True] * 31


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("position", [0, 600, 1200])
def test_what_was_measured_is_dropped_if_any_gradient_is_unlike_the_last(
    position: int, count: int, taken: list[bool]
) -> None:
    model = many_small_layers()
    parameters = list(model.parameters())
    normalizer = GradientNormalizer(model, Clip(1e9, per="tensor"), backend="cpu")
    torch.set_num_threads(count)
    changed = parameters[position]
    usual = changed.grad
    unlike: list[tuple[Tensor | None, bool]] = [
        (torch.ones(changed.shape), True),
        (None, False),
        (torch.ones(changed.shape, dtype=torch.float64), False),
        (torch.ones(changed.shape).to_sparse(), False),
        (torch.ones(1).expand(changed.shape), False),
    ]
    changed.grad_dtype = None
    for gradient, expected in unlike:
        changed.grad = usual
        before = normalizer.normalize_().norms
        taken.clear()
        changed.grad = gradient
        after = normalizer.normalize_().norms
        assert taken == [expected]
        assert after[position].item() == (0.0 if gradient is None else math.sqrt(changed.numel()))
        assert torch.equal(
            torch.cat([before[:position], before[position + 1 :]]), torch.cat([after[:position], after[position + 1 :]])
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_values_that_are_cut_in_one_place_alone_are_seen_beside_those_that_are_not(dtype: torch.dtype) -> None:
    gradients = [torch.full((cpu.CHUNK,), 0.5, dtype=dtype) for _ in range(3)]
    model = model_with([gradient.clone() for gradient in gradients])
    normalizer = GradientNormalizer(model, ClipValue(1.0), backend="cpu")
    assert normalizer.normalize_().scales.tolist() == [1.0]
    model.p1.grad[17] = 3.0
    report = normalizer.normalize_()
    quarter = 3 * cpu.CHUNK * 0.25
    assert report.norms.item() == math.sqrt(quarter + 8.75)
    assert report.norms_after.item() == math.sqrt(quarter + 0.75)
    assert model.p1.grad[16:19].tolist() == [0.5, 1.0, 0.5]
    assert torch.equal(model.p0.grad, gradients[0])


def test_a_model_of_one_value_is_taken_at_once_too(taken: list[bool]) -> None:
    model = model_with([torch.tensor([3.0])])
    normalizer = GradientNormalizer(model, Clip(2.0), backend="cpu")
    normalizer.normalize_()
    model.p0.grad = torch.tensor([-8.0])
    report = normalizer.normalize_()
    assert taken == [True]
    assert model.p0.grad.item() == -2.0
    assert (report.norms.tolist(), report.scales.tolist(), report.clipped.tolist()) == ([8.0], [0.25], [True])
    assert report.total_norm.item() == 8.0


@pytest.mark.parametrize(
    ("strategy", "gradient", "scale"),
    [
        (Clip(5.0), [3.0, 4.0], 1.0),
        (Clip(math.nextafter(5.0, 0.0)), [3.0, 4.0], math.nextafter(1.0, 0.0)),
        (Clip(math.nextafter(5.0, 6.0)), [3.0, 4.0], 1.0),
        (Renormalize(), [1.0, 0.0], 1.0),
        (Renormalize(), [0.0, 0.0], 1.0),
        (Renormalize(), [2.0, 0.0], 0.5),
        (Renormalize(), [0.5, 0.0], 2.0),
        (Renormalize(), [1e-300, 0.0], 1e300),
        (Renormalize(), [1e300, 0.0], 1e-300),
        (ClipValue(4.0), [3.0, 4.0], 1.0),
        (Keep(), [1e300, 1e300], 1.0),
    ],
    ids=str,
)
def test_it_is_known_exactly_when_nothing_changes(
    strategy: Any, gradient: list[float], scale: float, taken: list[bool]
) -> None:
    model = model_with([torch.ones(2, dtype=torch.float64)])
    normalizer = GradientNormalizer(model, strategy, backend="cpu")
    normalizer.normalize_()
    model.p0.grad = torch.tensor(gradient, dtype=torch.float64)
    report = normalizer.normalize_()
    assert taken == [True]
    assert report.scales.item() == pytest.approx(scale, rel=1e-15)
    assert (report.scales.item() == 1.0) == (scale == 1.0) == (model.p0.grad.tolist() == gradient)


@pytest.mark.parametrize("count", [1, 2])
@OPENMP
def test_another_thread_of_python_runs_while_gradients_are_measured(count: int) -> None:
    normalizer = GradientNormalizer(model_with([torch.ones(2**25)]), Clip(1e9), backend="cpu")
    torch.set_num_threads(count)
    normalizer.normalize_()
    times: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            times.append(time.perf_counter())
            time.sleep(0)

    def ran_in_between() -> bool:
        start = time.perf_counter()
        normalizer.normalize_()
        end = time.perf_counter()
        # Had the GIL been kept, the other thread could have run at the beginning and the end alone.
        return any(start + (end - start) / 4 < moment < end - (end - start) / 4 for moment in times)

    ticking = threading.Thread(target=tick)
    ticking.start()
    # On a busy machine the thread may not get its turn every time.
    seen = any(ran_in_between() for _ in range(50))
    done.set()
    ticking.join()
    assert seen


LAZY: dict[str, Callable[[], Tensor]] = {
    "conjugate": lambda: torch.tensor([3.0 + 4.0j]).conj(),
    "negative": lambda: torch.tensor([3.0 + 4.0j]).conj().imag,
    "negative conjugate": lambda: torch._neg_view(torch.tensor([3.0 + 4.0j]).conj()),
}


@pytest.mark.parametrize("kind", LAZY)
def test_a_gradient_that_memory_does_not_hold_as_it_is_meant_is_seen(kind: str) -> None:
    usual = LAZY[kind]().resolve_conj().resolve_neg()
    model = model_with([usual])
    normalizer = GradientNormalizer(model, Clip(1.0), backend="cpu")
    normalizer.normalize_()
    wanted = model.p0.grad.clone()
    model.p0.grad = LAZY[kind]()
    normalizer.normalize_()
    assert model.p0.grad.is_conj() == model.p0.grad.is_neg() is False
    assert torch.equal(model.p0.grad, wanted)


def test_memory_that_is_shared_from_the_second_step_on_is_changed_once() -> None:
    model = model_with([torch.ones(4), torch.ones(4)])
    normalizer = GradientNormalizer(model, Clip(1.0, per="model"), backend="cpu")
    normalizer.normalize_()
    model.p0.grad = torch.full((4,), 2.0)
    model.p1.grad = model.p0.grad.view(2, 2).view(4)
    assert normalizer.normalize_().total_norm.item() == 4.0
    assert model.p1.grad.tolist() == [0.5] * 4


def test_a_model_that_changed_is_noticed(taken: list[bool]) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    for layer in model:
        layer.weight.grad = torch.ones(2, 2)
    normalizer = GradientNormalizer(model, Clip(1.0), backend="cpu")
    normalizer.normalize_()
    model[1] = nn.Linear(2, 2, bias=False)
    model[1].weight.grad = torch.full((2, 2), 4.0)
    assert normalizer.normalize_().norms.tolist() == [1.0, 8.0, 1.0]
    model[2].register_parameter("scale", nn.Parameter(torch.zeros(1)))
    model[2].scale.grad = torch.tensor([5.0])
    assert normalizer.normalize_()["2"].norm == math.sqrt(26)
    assert normalizer.normalize_().norms.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert taken == [False, False, True]


def test_a_parameter_group_that_the_optimizer_got_is_noticed(taken: list[bool]) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    for layer in model:
        layer.weight.grad = torch.ones(2, 2)
    normalizer = attach(model, optimizer, Clip(1.0), backend="cpu")
    optimizer.step()
    optimizer.step()
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.step()
    assert taken == [True]
    assert normalizer.report is not None
    assert normalizer.report.norms.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "skip", "raise"])
def test_a_group_that_is_not_finite_from_the_second_step_on(on_nonfinite: Any, taken: list[bool]) -> None:
    model = model_with([torch.ones(4), torch.ones(4)])
    normalizer = GradientNormalizer(model, Clip(1.0, per="tensor"), on_nonfinite=on_nonfinite, backend="cpu")
    normalizer.normalize_()
    model.p0.grad, model.p1.grad = torch.tensor([1.0, NAN, math.inf, 1.0]), torch.ones(4)
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError, match="p0"):
            normalizer.normalize_()
    else:
        assert normalizer.normalize_().nonfinite.tolist() == [2, 0]
    assert taken == [True]
    assert normalizer.nonfinite_steps == {"p0": 1}
    assert normalizer.skipped_steps == (on_nonfinite == "skip")
    assert model.p0.grad.isnan().any() == (on_nonfinite != "zero")
    assert model.p1.grad.tolist() == [1.0 if on_nonfinite in {"skip", "raise"} else 0.5] * 4


def test_gradients_of_several_dtypes_are_not_tried(taken: list[bool]) -> None:
    model = model_with([torch.ones(4), torch.ones(4, dtype=torch.float64)])
    normalizer = GradientNormalizer(model, Clip(1.0), backend="cpu")
    assert [normalizer.normalize_().total_norm.item() for _ in range(2)] == pytest.approx([math.sqrt(8), 1.0])
    assert taken == []


def test_a_parameter_that_makes_its_gradient_itself_is_asked() -> None:
    kind: Any = type("OwnGradient", (nn.Parameter,), {"grad": property(lambda _: torch.full((4,), 2.0))})
    normalizer = GradientNormalizer([("p", kind(torch.zeros(4)))], Clip(1e9), backend="cpu")
    assert [normalizer.normalize_().total_norm.item() for _ in range(2)] == [4.0, 4.0]


def test_no_gradient_is_kept_alive_or_let_go() -> None:
    model = model_with([torch.ones(1000), torch.ones(20, 10)[:, ::2], torch.ones(7)])
    for strided in (True, False):
        normalizer = GradientNormalizer(model, Clip(1.0), backend="cpu")
        counts = [sys.getrefcount(parameter.grad) for parameter in model.parameters()]
        for _ in range(5):
            normalizer.normalize_()
        assert [sys.getrefcount(parameter.grad) for parameter in model.parameters()] == counts
        if strided:
            model.p1.grad = torch.ones(20, 5)
    references = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    assert [reference() for reference in references] == [None] * 3
