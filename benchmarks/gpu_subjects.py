"""What the sections of the GPU check share: a device, records, models with gradients, and GPU time."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from speed_models import gpt2, linears, resnet50
from torch import Tensor, nn

__all__ = ["Bench", "Subject", "is_lost", "make_model"]

# Cycles of the clock a second, about: for a kernel that waits so that launches do not count.
CLOCK = 1.8e9


@dataclass
class Bench:
    """What a section works with.

    Args:
        path: Where its records go.
        seconds: How long it may take.
        dry: Whether it runs on the CPU.
    """

    path: Path
    seconds: float
    dry: bool
    _began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The device."""
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - 3 - (time.monotonic() - self._began)

    def emit(self, kind: str, **facts: Any) -> None:  # noqa: ANN401  whatever JSON takes
        """Writes a record."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **facts}, default=str) + "\n")

    def check(self, backend: str, topic: str, what: str, function: Callable[[], None]) -> None:
        """Runs a check that raises if something is wrong, and writes down how it went."""
        try:
            function()
            result = "ok"
        except Exception as error:  # noqa: BLE001  everything is reported
            result = f"{type(error).__name__}: {str(error).strip()[:300]}"
        self.emit("check", backend=backend, topic=topic, what=what, result=result)
        if is_lost(result):
            raise SystemExit(result)

    def synchronize(self) -> None:
        """Waits for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def sleep(self, seconds: float) -> None:
        """Makes the device busy, so that the host runs ahead of it."""
        if not self.dry:
            torch.cuda._sleep(int(seconds * CLOCK))  # type: ignore[no-untyped-call]  # noqa: SLF001

    def gpu_ms(self, function: Callable[[], object], behind: float = 0.0) -> float:
        """Returns the milliseconds that the device takes, between two events.

        Args:
            function: What to time.
            behind: Seconds that the device is busy before, so that launches do not count.
        """
        if self.dry:
            began = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - began)
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        if behind:
            self.sleep(behind)
        first.record()
        function()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))


def is_lost(message: str) -> bool:
    """Returns whether an error leaves a process without its GPU."""
    fatal = ("illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address")
    return any(part in message for part in fatal)


def make_model(name: str, *, tiny: bool) -> nn.Module:
    """Makes a model of `TITLES` on the default device.

    Args:
        name: Its name; "xl" is GPT-2 with 1.5 billion parameters, "tiny" has 10,000 small layers.
        tiny: Whether to make it small.
    """
    if name in {"gpt2", "xl"} and tiny:
        return gpt2(width=8, blocks=1, words=50, positions=4)
    if name == "resnet50":
        return resnet50(width=4, blocks=(1, 1), classes=10) if tiny else resnet50()
    if name == "gpt2":
        return gpt2()
    if name == "xl":
        return gpt2(width=1600, blocks=48)
    return linears(*((5, 4) if tiny else (1000, 64) if name == "linears" else (10_000, 16)))


class Subject:
    """A model with gradients, and a copy of them to write anew.

    Args:
        bench: The device.
        name: As in `make_model`. "xl" is in bfloat16, all others in float32.
    """

    def __init__(self, bench: Bench, name: str) -> None:
        dtype = torch.bfloat16 if name == "xl" else torch.float32
        with bench.device:
            self.model = make_model(name, tiny=bench.dry).to(dtype)
            generator = torch.Generator(bench.device).manual_seed(0)
        self.parameters = list(self.model.parameters())
        owned = (list(module.parameters(recurse=False)) for module in self.model.modules())
        self.layers = [parameters for parameters in owned if parameters]
        self.saved: list[Tensor] = [
            torch.empty_like(p, requires_grad=False).normal_(0, 0.01, generator=generator) for p in self.parameters
        ]
        self.bytes = sum(values.nbytes for values in self.saved)
        self.renew()

    def refill(self) -> None:
        """Writes the gradients anew."""
        torch._foreach_copy_(self.gradients, self.saved)

    def renew(self) -> None:
        """Gives every parameter a gradient in new memory, as a backward pass after `zero_grad` does."""
        self.gradients = [values.clone() for values in self.saved]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
