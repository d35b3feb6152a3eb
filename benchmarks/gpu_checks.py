"""What can go wrong on a device beyond numbers: waiting, CUDA graphs, memory that moves, other bits in every run."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from gpu_correct import Layers, compare, drawn, model_of
from gpu_names import DTYPES, BackendName
from gpu_subjects import Bench, Subject
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tamegrad import Clip, ClipValue, Renormalize
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer, attach

__all__ = ["fsdp", "graph", "hazard", "launches"]

STRATEGIES: tuple[Strategy, ...] = (Clip(1e-3), ClipValue(1e-3), Renormalize())
CHOICES: tuple[OnNonfinite, ...] = ("keep", "zero")


@contextlib.contextmanager
def no_waiting(bench: Bench) -> Iterator[None]:
    """Makes PyTorch raise where the host waits for the device."""
    if bench.dry:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(bench: Bench, backend: BackendName) -> None:
    """The section: the host never waits, and how much a step launches, counted by the profiler."""
    subject = Subject(bench, "linears")
    for strategy, choice in itertools.product(STRATEGIES, CHOICES):
        normalizer = GradientNormalizer(subject.model, strategy, backend=backend, on_nonfinite=choice)

        def steps(normalizer: GradientNormalizer = normalizer) -> None:
            for _ in range(2):
                normalizer.normalize_()
            subject.renew()
            bench.synchronize()
            with no_waiting(bench):
                # Once with new addresses, once with the same.
                normalizer.normalize_()
                normalizer.normalize_()

        bench.check(backend, "no synchronization", f"{strategy}, {choice}", steps)
    for model in ("gpt2", "linears"):
        subject = Subject(bench, model)
        normalizer = GradientNormalizer(subject.model, Clip(1e-3), backend=backend)
        bench.check(backend, "profile", model, lambda m=model, n=normalizer: _profile(bench, backend, m, n.normalize_))  # type: ignore[misc]
    if backend == "foreach":
        parameters = subject.parameters
        clip = torch.nn.utils.clip_grad_norm_
        _profile(bench, "torch's global clip", "linears", lambda: clip(parameters, 1e-3, foreach=True))


def _profile(bench: Bench, tool: str, model: str, step: Callable[[], object]) -> None:
    for _ in range(2):
        step()
    bench.synchronize()
    if bench.dry:
        bench.emit("launches", tool=tool, model=model, kernels="needs a GPU")
        return
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        step()
        bench.synchronize()
    names = [event.name for event in profile.events() if str(event.device_type).endswith("CUDA")]
    moved = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    bench.emit("launches", tool=tool, model=model, kernels=len(names) - len(moved), copies=len(moved))


def graph(bench: Bench, backend: BackendName) -> None:
    """The section: steps that are captured in a CUDA graph and replayed."""
    for dtype, choice, strategy in itertools.product((torch.float32, torch.bfloat16), CHOICES, STRATEGIES):
        bench.check(
            backend,
            "CUDA graph",
            f"{strategy}, {choice}, {dtype}",
            lambda s=strategy, c=choice, d=dtype: _captured(bench, backend, s, c, d),  # type: ignore[misc]
        )
    bench.check(backend, "CUDA graph", "a whole training step", lambda: _captured_training(bench, backend))


def _warmed_up(step: Callable[[], object]) -> None:
    """Takes a few steps on another stream, as PyTorch asks for before a capture."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


def _some_layers(dtype: torch.dtype, magnitude: float, seed: int) -> Layers:
    return {
        f"l{i}": {
            "weight": (drawn((33, 65), dtype, magnitude, seed + i), "plain"),
            "bias": (drawn((65,), dtype, magnitude, seed + 50 + i), "plain"),
        }
        for i in range(5)
    }


def _captured(bench: Bench, backend: BackendName, strategy: Strategy, choice: OnNonfinite, dtype: torch.dtype) -> None:
    model = model_of(_some_layers(dtype, 1.0, 0), bench.device)
    gradients: list[Any] = [parameter.grad for parameter in model.parameters()]
    normalizer = GradientNormalizer(model, strategy, backend=backend, on_nonfinite=choice)
    _warmed_up(normalizer.normalize_)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        report = normalizer.normalize_()
    for turn in range(3):
        fresh = _some_layers(dtype, 10.0 ** (turn - 1), 100 * turn)
        if turn == 2:  # noqa: PLR2004  the last
            fresh["l1"]["weight"][0][0, 0] = math.nan
        plain = model_of(fresh, torch.device("cpu"))
        for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
            gradient.copy_(parameter.grad)
        recorded.replay()
        bench.synchronize()
        GradientNormalizer(plain, strategy, backend="foreach", on_nonfinite=choice).normalize_()
        for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
            torch.testing.assert_close(gradient.cpu(), parameter.grad, equal_nan=True)
    finite = report.norms.isfinite().tolist()
    if finite != [True, False, True, True, True]:
        raise AssertionError(f"the report after a replay says that these groups are finite: {finite}")
    # Outside of the graph it goes on.
    normalizer.normalize_()
    bench.synchronize()


def _captured_training(bench: Bench, backend: BackendName) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).to(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    attach(model, optimizer, Clip(1e-2), backend=backend)
    inputs = torch.randn(16, 32, device=bench.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(inputs).square().mean().backward()
        optimizer.step()

    _warmed_up(step)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        step()
    for _ in range(5):
        inputs.normal_()
        recorded.replay()
    bench.synchronize()
    norm = math.hypot(*(float(p.grad.norm()) for p in model[0].parameters() if p.grad is not None))
    if norm > 1.01e-2:  # noqa: PLR2004  the threshold
        raise AssertionError(f"the norm after a replay is {norm}")


def hazard(bench: Bench, backend: BackendName) -> None:
    """The section: memory that moves or is freed while the device is behind, streams, the same bits, all dtypes."""
    turns = 2 if bench.dry else 40
    checks = {
        "addresses that move": lambda: _moving(bench, backend, turns),
        "gradients that are freed": lambda: _freed(bench, backend, turns),
        "other gradients in every step": lambda: _alternating(bench, backend, turns),
        "the same bits": lambda: _repeated(bench, backend, turns),
        "all dtypes, some not aligned": lambda: _mixed(bench, backend),
    }
    if not bench.dry:
        checks["two streams"] = lambda: _streams(bench, backend)
    for what, function in checks.items():
        bench.check(backend, "hazards", what, function)


def _parameters(bench: Bench, count: int, *shape: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, device=bench.device)) for _ in range(count)]


def _normalizer_of(parameters: list[nn.Parameter], backend: BackendName) -> GradientNormalizer:
    named = [(f"l{index}.weight", parameter) for index, parameter in enumerate(parameters)]
    return GradientNormalizer(named, Clip(0.5), backend=backend)


def _clipped(bench: Bench, kept: list[tuple[Tensor, Tensor]]) -> None:
    """Raises unless gradients are what they were before, with a norm of 0.5 at most."""
    bench.synchronize()
    for gradient, before in kept:
        scale = min(1.0, 0.5 / before.double().norm().item())
        torch.testing.assert_close(gradient, (before.double() * scale).to(gradient.dtype), rtol=1e-6, atol=1e-9)


def _moving(bench: Bench, backend: BackendName, turns: int) -> None:
    parameters, kept = _parameters(bench, 3 if bench.dry else 20, 40, 30), []
    normalizer = _normalizer_of(parameters, backend)
    for _ in range(turns):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
            kept.append((parameter.grad, parameter.grad.clone()))
        bench.sleep(0.002)
        normalizer.normalize_()
        # Takes memory of the size of the tables, so that one that was freed too early is overwritten.
        for _ in range(8):
            torch.full((20,), -1, dtype=torch.int64, device=bench.device)
    _clipped(bench, kept)


def _freed(bench: Bench, backend: BackendName, turns: int) -> None:
    parameters = _parameters(bench, 10, 1000)
    normalizer = _normalizer_of(parameters, backend)
    found, wanted = [], []
    for _ in range(turns):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        wanted.append(torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]))
        bench.sleep(0.001)
        found.append(normalizer.normalize_().norms)
        for parameter in parameters:
            parameter.grad = None
    bench.synchronize()
    for norms, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(norms.cpu(), expected.cpu(), rtol=1e-10, atol=0)


def _alternating(bench: Bench, backend: BackendName, turns: int) -> None:
    """As in a mixture of experts; after each set was there twice, the host must not wait any more."""
    parameters, kept = _parameters(bench, 3 if bench.dry else 12, 40, 30), []
    normalizer = _normalizer_of(parameters, backend)
    for turn in range(turns):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter) if (index + turn) % 3 else None
            if parameter.grad is not None:
                kept.append((parameter.grad, parameter.grad.clone()))
        with no_waiting(bench) if turn > 6 else contextlib.nullcontext():  # noqa: PLR2004  twice three sets
            normalizer.normalize_()
    _clipped(bench, kept)


def _streams(bench: Bench, backend: BackendName) -> None:
    parameters, kept = _parameters(bench, 20, 300, 30), []
    normalizer = _normalizer_of(parameters, backend)
    streams = torch.cuda.default_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for turn in range(20):
        stream, other = streams[turn % 2], streams[1 - turn % 2]
        stream.wait_stream(other)
        with torch.cuda.stream(stream):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
                kept.append((parameter.grad, parameter.grad.clone()))
            bench.sleep(0.001)
            normalizer.normalize_()
    _clipped(bench, kept)


def _repeated(bench: Bench, backend: BackendName, turns: int) -> None:
    shapes = [(700, 301), (5000,), (64, 64), (9,), (1,), (123, 77), (2, 3, 5, 7)]
    source = [torch.randn(shape, device=bench.device) * 10 ** (place - 3) for place, shape in enumerate(shapes)]
    seen = set()
    for _ in range(turns):
        parameters = [nn.Parameter(torch.zeros_like(values)) for values in source]
        for parameter, values in zip(parameters, source, strict=True):
            parameter.grad = values.clone()
        named = [(f"l.{index}", parameter) for index, parameter in enumerate(parameters)]
        norms = GradientNormalizer(named, Clip(0.5), backend=backend).normalize_().norms
        gradient: Any = parameters[0].grad
        seen.add((norms.cpu().numpy().tobytes(), gradient.cpu().numpy().tobytes()))
    if len(seen) > 1:
        raise AssertionError(f"{len(seen)} different results of one input")


def _mixed(bench: Bench, backend: BackendName) -> None:
    layers: Layers = {}
    for place, name in enumerate(DTYPES):
        dtype = getattr(torch, name)
        weight = (drawn((30, 41), dtype, 1.0, place), "offset" if place % 2 else "plain")
        layers[f"l{place}"] = {"weight": weight, "bias": (drawn((9,), dtype, 1.0, place), "plain")}
    wrong = compare(layers, Clip(0.5), backend, "keep", bench.device)
    if wrong:
        raise AssertionError("; ".join(wrong))


def fsdp(bench: Bench, backend: BackendName) -> None:
    """The section: FSDP2 in one process, over NCCL."""
    bench.check(backend, "FSDP2", "Clip per layer, one process", lambda: _sharded(bench, backend))


def _sharded(bench: Bench, backend: BackendName) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29_500 + os.getpid() % 500)}
    dist.init_process_group("gloo" if bench.dry else "nccl", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).to(bench.device)
        mesh = init_device_mesh(bench.device.type, (1,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        normalizer = GradientNormalizer(model, Clip(0.01), backend=backend)
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(torch.randn(8, 64, device=bench.device)).square().sum().backward()
            before = _whole(model)
            normalizer.normalize_()
            after = _whole(model)
            for place in range(0, len(before), 2):
                scale = min(1.0, 0.01 / math.hypot(*(float(g.norm()) for g in before[place : place + 2])))
                for one, other in zip(before[place : place + 2], after[place : place + 2], strict=True):
                    torch.testing.assert_close(other, one * scale, rtol=1e-5, atol=1e-9)
    finally:
        dist.destroy_process_group()


def _whole(model: nn.Module) -> list[Tensor]:
    gradients: list[Any] = [parameter.grad for parameter in model.parameters()]
    return [gradient.full_tensor().double().cpu() for gradient in gradients]
