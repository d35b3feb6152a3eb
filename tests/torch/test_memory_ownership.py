"""Memory is touched only where it is owned, and only while it is: copies, wrappers, threads, autograd."""

import copy
import ctypes
import itertools
import math
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.utils._pytree import tree_map

from support.contract import QUICK_BACKENDS
from support.gradients import model_with
from tamegrad import Clip, ClipValue, SettingError
from tamegrad.torch import GradientNormalizer, Summary
from tamegrad.torch.backends.cpu import CpuBackend
from tamegrad.torch.memory import HeldMemory


@pytest.fixture(params=QUICK_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301  our own bytes


class Trainer:
    """Holds a model and what normalizes its gradients, as people's classes do."""

    def __init__(self, backend: Any) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.normalizer = GradientNormalizer(self.model, Clip(1.0), backend=backend)

    def fill(self, value: float) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, value)

    def norms(self) -> list[float]:
        layers = [
            torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None]) for layer in self.model
        ]
        return [layer.norm().item() for layer in layers]


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
    def test_a_copy_normalizes_its_own_model(self, copied: Callable[[Any], Any], backend: Any) -> None:
        original = Trainer(backend)
        for _ in range(2):
            original.fill(3.0)
            original.normalizer.normalize_()
        other = copied(original)
        original.fill(30.0)
        other.fill(60.0)
        before = original.norms()
        report = other.normalizer.normalize_()
        assert other.norms() == pytest.approx([1.0, 1.0])
        assert original.norms() == before
        assert report.norms.tolist() == pytest.approx([2 * norm for norm in before])

    @pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
    def test_a_copy_outlives_the_original(self, copied: Callable[[Any], Any], backend: Any) -> None:
        original = Trainer(backend)
        original.fill(3.0)
        original.normalizer.normalize_()
        other = copied(original)
        del original
        for value in (3.0, 30.0):
            other.fill(value)
            other.normalizer.normalize_()
            assert other.norms() == pytest.approx([1.0, 1.0])

    def test_a_copy_follows_its_own_model(self, backend: Any) -> None:
        original = Trainer(backend)
        other = copy.deepcopy(original)
        original.model[0] = nn.Linear(5, 5)
        other.fill(3.0)
        assert other.normalizer.normalize_().groups == ("0", "1")
        other.model[1] = nn.Linear(7, 7)
        other.fill(3.0)
        other.normalizer.normalize_()
        assert other.norms() == pytest.approx([1.0, 1.0])


class Wrapped(Tensor):
    """Has no memory of its own, but holds another tensor and does every operation on that one."""

    inner: Tensor  # type: ignore[assignment]  # Tensor.inner is a function

    @staticmethod
    def __new__(cls: type[Self], inner: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's declaration is no class method
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inside = tree_map(lambda value: value.inner if isinstance(value, Wrapped) else value, (args, kwargs or {}))
        out = function(*inside[0], **inside[1])
        if args and isinstance(args[0], Wrapped) and out is args[0].inner:
            return args[0]
        return tree_map(lambda value: Wrapped(value) if isinstance(value, Tensor) else value, out)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wrapped({self.inner})"


class Unreadable(Wrapped):
    """Refuses to be copied to another tensor."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's declaration is no class method
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.copy_.default:
            raise NotImplementedError("no copies")
        out = super().__torch_dispatch__(function, types, args, kwargs)
        return cls(out.inner) if function is torch.ops.aten.detach.default else out


def wrapped_model(kind: type[Wrapped], *values: float) -> Any:
    model = nn.Module()
    for index, value in enumerate(values):
        parameter = nn.Parameter(kind(torch.zeros(4, 4)))
        parameter.grad = kind(torch.full((4, 4), value))
        model.register_module(f"layer{index}", nn.Module())
        model.get_submodule(f"layer{index}").register_parameter("weight", parameter)
    return model


class TestTensorsWithoutMemory:
    @pytest.mark.parametrize("strategy", [Clip(1.0), ClipValue(0.25)], ids=str)
    def test_a_wrapper_subclass_is_normalized_by_its_own_operations(self, strategy: Any, backend: Any) -> None:
        model = wrapped_model(Wrapped, 3.0, 5.0)
        held = [parameter.grad.inner for parameter in model.parameters()]
        for _ in range(2):
            report = GradientNormalizer(model, strategy, backend=backend).normalize_()
        assert report.norms_after.tolist() == pytest.approx([1.0, 1.0])
        assert [inner.norm().item() for inner in held] == pytest.approx([1.0, 1.0])

    def test_one_that_cannot_be_copied_is_refused_before_anything_is_changed(self, backend: Any) -> None:
        model = wrapped_model(Unreadable, 3.0)
        model.register_parameter("plain", nn.Parameter(torch.zeros(2)))
        model.plain.grad = torch.tensor([30.0, 40.0])
        message = (
            r"^gradient of layer0.weight: got a Unreadable that has no memory of its own and cannot be copied to a"
        )
        with pytest.raises(SettingError, match=message):
            GradientNormalizer(model, Clip(1.0), backend=backend).normalize_()
        assert model.plain.grad.tolist() == [30.0, 40.0]

    def test_a_fake_tensor_is_refused(self, backend: Any) -> None:
        with torch._subclasses.FakeTensorMode():
            model = nn.Linear(2, 2)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        with pytest.raises(SettingError, match=r"^gradient of weight: got a FakeTensor"):
            GradientNormalizer(model, Clip(1.0), backend=backend).normalize_()

    def test_what_a_collective_has_not_finished_is_waited_for(self, tmp_path: Path, backend: Any) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
            for parameter in model.parameters():
                full = torch.full_like(parameter, 3.0).detach()
                world: Any = dist.group.WORLD
                parameter.grad = functional.all_reduce(full, "sum", world)
                assert parameter.grad.data_ptr() == 0
            report = GradientNormalizer(model, Clip(1.0), backend=backend).normalize_()
            assert report.norms.tolist() == [24.0] * 3
            norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        finally:
            dist.destroy_process_group()
        assert norms == pytest.approx([1.0] * 3)

    def test_gradients_on_meta_take_a_step_on_the_plain_backend(self) -> None:
        model = nn.Linear(3, 4, device="meta")
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        report = GradientNormalizer(model, Clip(1.0)).normalize_()
        assert report.norms.device.type == "meta"


class TestMemoryThatIsReplacedMeanwhile:
    """A signal handler, a finalizer or another thread gives a gradient other memory while it is normalized."""

    @pytest.fixture
    def model(self) -> Any:
        return model_with([torch.full((1000,), 3.0)])

    def replacing_before_apply(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
        apply_ = CpuBackend.apply_

        def replaced(self: Any, *args: Any) -> None:
            change()
            apply_(self, *args)

        monkeypatch.setattr(CpuBackend, "apply_", replaced)

    def test_the_new_memory_is_written_and_the_old_is_not(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        old = model.p0.grad.detach()

        def change() -> None:
            model.p0.grad.data = torch.full((1000,), 3.0)

        self.replacing_before_apply(monkeypatch, change)
        GradientNormalizer(model, Clip(1.0), backend="cpu").normalize_()
        assert old.eq(3.0).all()
        assert model.p0.grad.norm().item() == pytest.approx(1.0)

    @pytest.mark.parametrize("replacement", [torch.full((10,), 3.0), torch.full((1000,), 3.0).half()], ids=str)
    def test_memory_of_another_size_is_not_touched(
        self, model: Any, replacement: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = replacement.clone()

        def change() -> None:
            model.p0.grad.data = replacement

        self.replacing_before_apply(monkeypatch, change)
        with pytest.raises(SettingError, match="got a gradient that changed its size or dtype while it was normalized"):
            GradientNormalizer(model, Clip(1.0), backend="cpu").normalize_()
        assert replacement.equal(before)

    def test_memory_that_is_written_stays_allocated(self) -> None:
        tensor = torch.ones(1000)
        held = HeldMemory.of([tensor])
        tensor.data = torch.zeros(1)
        values = (ctypes.c_float * 1000).from_address(int(held.memory.addresses[0]))
        assert list(values) == [1.0] * 1000

    def test_a_change_during_the_look_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tensor = torch.ones(1000)
        ask = Tensor.untyped_storage

        def replaced_meanwhile(asked: Tensor) -> torch.UntypedStorage:
            storage = ask(asked)
            asked.data = torch.ones(1000)
            return storage

        monkeypatch.setattr(Tensor, "untyped_storage", replaced_meanwhile)
        assert HeldMemory.of([tensor]).is_held.tolist() == [False]

    def test_a_signal_handler_that_replaces_gradients_all_the_time(self, model: Any) -> None:
        normalizer = GradientNormalizer(model, Clip(1.0), backend="cpu")
        replaced = 0

        def replace(*_: object) -> None:
            nonlocal replaced
            replaced += 1
            # The old memory goes back, and to the next tensors of this size.
            model.p0.grad.data = torch.full((1000,), 3.0)

        before = signal.signal(signal.SIGALRM, replace)
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
            for _ in range(300):
                model.p0.grad = torch.full((1000,), 3.0)
                others = [torch.full((1000,), 5.0) for _ in range(4)]
                normalizer.normalize_()
                assert all(other.eq(5.0).all() for other in others)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert replaced > 100

    def test_an_exception_of_a_handler_is_not_swallowed(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        self.replacing_before_apply(monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            GradientNormalizer(model, Clip(1.0), backend="cpu").normalize_()
        assert model.p0.grad.eq(3.0).all()


def test_one_normalizer_in_several_threads(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(50, 60, bias=False) for _ in range(200)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    normalizer = GradientNormalizer(model, Clip(1e9, per="tensor"), backend=backend)
    # The plan and its tables are made anew in every second step, while other threads read them.
    calls = itertools.count()
    monkeypatch.setattr(normalizer._planner, "is_stale", lambda _: next(calls) % 2)

    def normalizing(_: int) -> list[float]:
        return [normalizer.normalize_().norms.max().item() for _ in range(30)]

    with ThreadPoolExecutor(4) as pool:
        results = [norm for norms in pool.map(normalizing, range(4)) for norm in norms]
    assert results == [math.sqrt(3000)] * len(results)


class TestAutograd:
    def test_a_second_derivative_through_a_clipped_gradient_is_not_silently_wrong(self, backend: Any) -> None:
        weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        normalizer = GradientNormalizer([("weight", weight)], Clip(1.0), backend=backend)
        for _ in range(2):
            weight.grad = None
            with warnings.catch_warnings(action="ignore"):  # of a cycle of references, which PyTorch gives once
                cubes: Any = (weight**3).sum()
                cubes.backward(create_graph=True)
            gradient: Any = weight.grad
            penalty = gradient.square().sum()
            normalizer.normalize_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(penalty, weight)

    @pytest.mark.parametrize("columns", [slice(0, 1), slice(0, 2)])
    def test_a_gradient_of_a_graph_that_has_to_be_copied(self, columns: slice, backend: Any) -> None:
        full = torch.full((4, 2), 3.0, requires_grad=True)
        model: Any = nn.Module()
        model.weight = nn.Parameter(torch.zeros(2, 4)[columns])
        model.weight.grad = (full * 1.0).t()[columns]
        report = GradientNormalizer(model, Clip(1.0), backend=backend).normalize_()
        assert report["(root)"].norm == pytest.approx(3 * math.sqrt(model.weight.numel()))
        assert model.weight.grad.norm().item() == pytest.approx(1.0)

    def test_a_gradient_that_keeps_its_values_keeps_its_version(self, backend: Any) -> None:
        model = model_with([torch.ones(4), torch.ones(9)])
        before = [parameter.grad._version for parameter in model.parameters()]
        GradientNormalizer(model, Clip(2.5, per="tensor"), backend=backend).normalize_()
        after = [parameter.grad._version for parameter in model.parameters()]
        assert (after[0] - before[0], after[1] > before[1]) == (0, True)

    def test_inference_tensors_are_changed_in_inference_mode_only(self, backend: Any) -> None:
        model = model_with([torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])])
        with torch.inference_mode():
            model.p1.grad = torch.tensor([3.0, 4.0])
        normalizer = GradientNormalizer(model, Clip(1.0, per="tensor"), backend=backend)
        model.p0.grad = torch.tensor([3.0, 4.0])
        with pytest.raises(SettingError, match="^gradient of p1: got an inference tensor outside of inference mode"):
            normalizer.normalize_()
        assert model.p0.grad.tolist() == [3.0, 4.0]
        # Measuring is allowed.
        assert GradientNormalizer(model, Clip(9.0, per="tensor"), backend=backend).normalize_().norms.tolist() == [5, 5]
        with torch.inference_mode():
            normalizer.normalize_()
        torch.testing.assert_close(model.p1.grad, torch.tensor([0.6, 0.8]))


@pytest.fixture
def other_default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("other_default_device")
@pytest.mark.parametrize("strategy", [Clip(1.0), ClipValue(0.1)], ids=str)
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "skip", "raise"])
def test_another_default_device_changes_nothing(on_nonfinite: Any, strategy: Any, backend: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="cpu"), nn.Linear(4, 2, device="cpu"))
    normalizer = GradientNormalizer(model, strategy, on_nonfinite=on_nonfinite, backend=backend)
    summary = Summary()
    for value in (3.0, 30.0):
        for parameter in model.parameters():
            parameter.grad = torch.full(parameter.shape, value, device="cpu")
        report = normalizer.normalize_()
        summary.update(report)
    assert report.norms.device.type == "cpu"
    assert [row.largest for row in summary] == report.norms.tolist()
    assert report.norms.tolist() == pytest.approx([30 * math.sqrt(16), 30 * math.sqrt(10)])
    assert normalizer.nonfinite_steps == {}
    assert all(parameter.grad is not None and parameter.grad.norm() <= 1.001 for parameter in model.parameters())


def test_an_error_inside_a_function_mode_is_not_swallowed(backend: Any) -> None:
    class Refusing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__self__", None) is Tensor.grad:
                raise KeyboardInterrupt
            return function(*args, **(kwargs or {}))

    model = model_with([torch.ones(4)])
    normalizer = GradientNormalizer(model, Clip(1.0), backend=backend)
    with Refusing(), pytest.raises(KeyboardInterrupt):
        normalizer.normalize_()
    assert model.p0.grad.tolist() == [1.0] * 4
