"""Times on the device: the tools take turns on the same gradients; medians are written down."""

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_names import BACKENDS
from gpu_subjects import Bench, Subject, is_lost
from torch import Tensor, nn

from tamegrad import Clip, ClipValue
from tamegrad.torch import GradientNormalizer

__all__ = ["times", "train"]

# Thresholds under which nothing is clipped, and everything is.
SHARES = {"nothing clipped": 1e9, "everything clipped": 1e-6}
# With less time left than this no turn is taken.
LEAST_SECONDS = 2.0
# A tool that keeps the host busy for more milliseconds than this is bound by it, whatever the GPU does.
SLOW = 200.0
CLIP, CLIP_VALUE = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_


@dataclass
class Timed:
    """A tool, and what was measured of it, in milliseconds and bytes."""

    run: Callable[[], object]
    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    peak: int = 0


def tools(subject: Subject, model: str, threshold: float) -> dict[str, Callable[[], Callable[[], object]]]:
    """Returns what is timed, each made when its turn comes."""
    parameters, layers = subject.parameters, subject.layers
    found: dict[str, Callable[[], Callable[[], object]]] = {}
    for backend in BACKENDS:
        chosen: dict[str, Any] = {"Clip": Clip(threshold)}
        if model in {"gpt2", "linears"}:
            chosen |= {"Clip per model": Clip(threshold, per="model"), "ClipValue": ClipValue(threshold)}
        for what, strategy in chosen.items():
            settings: Any = {"backend": backend}
            found[f"tamegrad {backend}, {what}"] = lambda s=strategy, k=settings: (  # type: ignore[misc]
                GradientNormalizer(subject.model, s, **k).normalize_
            )
    found["torch clip_grad_norm_"] = lambda: lambda: CLIP(parameters, threshold, foreach=True)
    found["torch loop over layers"] = lambda: lambda: [CLIP(layer, threshold) for layer in layers]
    found["torch clip_grad_value_"] = lambda: lambda: CLIP_VALUE(parameters, threshold)
    return found


def times(bench: Bench, model: str) -> None:
    """The section: one model, with nothing and with everything clipped."""
    subject = Subject(bench, model)
    read, write = _floor(bench, subject)
    facts = {"tensors": len(subject.parameters), "layers": len(subject.layers), "bytes": subject.bytes}
    bench.emit("subject", model=model, read=read, write=write, **facts)
    shares = list(SHARES.items())
    for place, (share, threshold) in enumerate(shares):
        ends = time.monotonic() + bench.left / (len(shares) - place)
        timed: dict[str, Timed] = {}
        for tool, make in tools(subject, model, threshold).items():
            if time.monotonic() > ends:
                bench.emit("time", model=model, tool=tool, share=share, error="no time left")
                continue
            try:
                timed[tool] = _first(bench, subject, make())
            except Exception as error:
                bench.emit("time", model=model, tool=tool, share=share, error=f"{type(error).__name__}: {error}"[:300])
                if is_lost(str(error)):
                    raise
        _take_turns(bench, subject, timed, ends)
        for tool, found in timed.items():
            medians = {name: _median(getattr(found, name)) for name in ("wall", "host", "gpu")}
            bench.emit("time", model=model, tool=tool, share=share, rounds=len(found.wall), peak=found.peak, **medians)


def _median(numbers: Iterable[float]) -> float | None:
    listed = list(numbers)
    return statistics.median(listed) if listed else None


def _floor(bench: Bench, subject: Subject) -> tuple[float, float]:
    """Returns the milliseconds of one read of all gradients, and of one read and write."""
    # Of a part, if all of them at once would take too much memory.
    part: list[Tensor] = []
    for values in subject.saved:
        part.append(values.flatten())
        if sum(one.nbytes for one in part) > 2**30:
            break
    flat = torch.cat(part)
    factor = subject.bytes / flat.nbytes
    reads = (bench.gpu_ms(flat.sum, 0.0005) for _ in range(9))
    writes = (bench.gpu_ms(lambda: flat.mul_(0.999), 0.0005) for _ in range(9))
    return statistics.median(reads) * factor, statistics.median(writes) * factor


def _first(bench: Bench, subject: Subject, run: Callable[[], object]) -> Timed:
    """Takes the first steps, which compile and allocate, and looks at the memory that one takes."""
    for _ in range(2):
        subject.refill()
        run()
    bench.synchronize()
    if bench.dry:
        return Timed(run)
    subject.refill()
    bench.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    bench.synchronize()
    return Timed(run, peak=torch.cuda.max_memory_allocated() - held)


def _take_turns(bench: Bench, subject: Subject, timed: dict[str, Timed], ends: float) -> None:
    order = list(timed.values())
    for turn in range(2 if bench.dry else 25):
        random.Random(turn).shuffle(order)  # noqa: S311
        for tool in order:
            if turn and time.monotonic() > ends:
                return
            subject.refill()
            bench.synchronize()
            began = time.perf_counter()
            tool.run()
            tool.host.append(1e3 * (time.perf_counter() - began))
            bench.synchronize()
            tool.wall.append(1e3 * (time.perf_counter() - began))
            if tool.host[-1] < SLOW:
                subject.refill()
                # Behind a kernel that waits for as long as the host needs to launch everything.
                tool.gpu.append(bench.gpu_ms(tool.run, 1.3e-3 * tool.host[-1] + 2e-4))


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the residual stream after this block."""
        batch, length, width = x.shape
        parts = self.attention(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        changed: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return changed


class Gpt(nn.Module):
    """GPT-2."""

    def __init__(self, width: int, blocks: int, heads: int, words: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits."""
        x = self.words(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(self.norm(x), self.words.weight)


def train(bench: Bench) -> None:
    """The section: the share of a real training step of GPT-2 124M, in bfloat16 with float32 gradients."""
    torch.manual_seed(0)
    width, blocks, heads, words, length, batch = (16, 1, 2, 50, 8, 2) if bench.dry else (768, 12, 12, 50_257, 1024, 8)
    with bench.device:
        model = Gpt(width, blocks, heads, words, length)
        tokens = torch.randint(words, (batch, length + 1))
    parameters = list(model.parameters())
    owned = [list(module.parameters(recurse=False)) for module in model.modules()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=not bench.dry)

    def step(clip: Callable[[], object]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        clip()
        optimizer.step()

    clips: dict[str, Callable[[], object]] = {"nothing": lambda: None}
    for backend in BACKENDS:
        for share, threshold in SHARES.items():
            settings: Any = {"backend": backend}
            clips[f"tamegrad {backend}, {share}"] = GradientNormalizer(model, Clip(threshold), **settings).normalize_
    clips["torch clip_grad_norm_"] = lambda: CLIP(parameters, 1.0)
    clips["torch loop over layers"] = lambda: [CLIP(layer, 1.0) for layer in owned if layer]
    for clip in clips.values():
        for _ in range(2):
            step(clip)
    for tool, milliseconds in _blocks_of_steps(bench, step, clips).items():
        bench.emit("train", tool=tool, ms=_median(milliseconds))


def _blocks_of_steps(
    bench: Bench, step: Callable[[Callable[[], object]], None], clips: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    """Returns the milliseconds of a step with each tool, in turns of several steps."""
    found: dict[str, list[float]] = {tool: [] for tool in clips}
    rounds, steps = (2, 1) if bench.dry else (9, 10)
    for turn in range(rounds):
        order = list(clips)
        random.Random(turn).shuffle(order)  # noqa: S311
        for tool in order:
            if turn and bench.left < LEAST_SECONDS:
                return found
            bench.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                step(clips[tool])
            bench.synchronize()
            found[tool].append(1e3 * (time.perf_counter() - began) / steps)
    return found
