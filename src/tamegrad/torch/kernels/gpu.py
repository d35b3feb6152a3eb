"""The backend for GPUs: Triton kernels over a table of addresses, three launches a step for any number of tensors.

Measuring takes two launches (`measure_chunk`, `add_chunks`), applying one (`apply_chunk`); with gradients on several
devices, three on each. The arithmetic on the small table in between, `decide`, is PyTorch's and is launched operation
by operation. Nothing makes the host wait for the device.

Checked in Triton's interpreter, which runs the kernels on the CPU, and by compiling them for several GPUs. No GPU was
at hand: they have not run on one, and nothing here was tuned or timed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tamegrad.errors import SettingError
from tamegrad.groups import Plan
from tamegrad.strategies import ClipValue, OnNonfinite
from tamegrad.torch.decide import COLUMNS, Decision, Thresholds, decide
from tamegrad.torch.kernels.gpu_kernels import INTERPRETED, KINDS, add_chunks, apply_chunk, measure_chunk
from tamegrad.torch.kernels.memory import is_dense

__all__ = ["BLOCK", "CHUNK", "Kernels"]

# Not tuned on a device. A block of 1024 values is eight a thread with Triton's default of four warps, few enough for
# three float64 sums of each in registers. A chunk of 16 blocks makes thousands of programs of a hundred million values,
# and its row of sums, 80 bytes, is little beside what was read for it.
BLOCK = 1024
CHUNK = 16 * BLOCK
# `add_chunks` reads this many rows at a time, in columns padded to a power of two.
_ROWS, _WIDTH = 64, 16
# The widest loads of a thread, in bytes, need addresses that this divides.
_ALIGNMENT = 16

_KIND_OF: dict[torch.dtype, int] = {getattr(torch, name): kind for kind, name in enumerate(KINDS)}


class Kernels:
    """Measures and changes the gradients of one plan on a GPU.

    Gradients of any dtype and of any size share the launches. A gradient whose values do not lie next to each other in
    memory, in whatever order, is copied to be measured and copied back when applied.

    Both methods can be captured in a CUDA graph, after a step outside of it with gradients of the same shapes and
    dtypes. A replay reads tables that are kept as long as this object is.

    Args:
        plan: The plan.
        counted: For each parameter whether it is measured; all are changed.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        self._plan = plan
        self._counted = counted
        self._devices: dict[torch.device, _Device] = {}
        self._copies: dict[int, Tensor] = {}
        self._measured: list[_Device] = []

    def measure(self, gradients: Sequence[Tensor | None], thresholds: Thresholds) -> Tensor:
        """Measures all groups in two launches a device.

        Args:
            gradients: One a parameter of the plan, of any shape; None where there is none.
            thresholds: Of the step; inside a CUDA graph on the device already, where the step before it left them.

        Returns:
            `(G, COLUMNS)` float64 on the device of the first gradient, or on the CPU if there is none.

        Raises:
            SettingError: If a gradient is not on a GPU, or a CUDA graph is captured before a step outside of it.
        """
        self._copies = {
            place: gradient.contiguous()
            for place, gradient in enumerate(gradients)
            if gradient is not None and not is_dense(gradient)
        }
        by_device: dict[torch.device, list[tuple[Tensor, int]]] = {}
        for place, (gradient, group) in enumerate(zip(gradients, self._plan.group_of, strict=True)):
            if gradient is not None:
                by_device.setdefault(gradient.device, []).append((self._copies.get(place, gradient), group))
        for device in by_device.keys() - self._devices.keys():
            self._devices[device] = _Device(self._plan, device)
        self._measured = [self._devices[device] for device in by_device]
        if not by_device:
            return torch.zeros(len(self._plan.groups), COLUMNS, dtype=torch.float64)
        first, *others = [self._devices[device].measure(placed, thresholds) for device, placed in by_device.items()]
        for other in others:
            first += other.to(first.device)
        return first

    def decide(self, table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite) -> Decision:
        """Decides on every group.

        Args:
            table: As `measure` gave it, or a sum of such.
            thresholds: Of the step, on the table's device.
            on_nonfinite: What happens to a group with NaN or infinity.

        Returns:
            The decision.
        """
        return decide(table, thresholds, on_nonfinite)

    def apply_(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Applies a decision in place, in one launch a device; groups that keep their values are not even read.

        Args:
            gradients: As they were measured.
            decision: What to do with each group.
        """
        for device in self._measured:
            device.apply_(decision)
        for place, copy in self._copies.items():
            if (gradient := gradients[place]) is not None:
                gradient.copy_(copy)
        self._copies.clear()


@dataclass(frozen=True, slots=True)
class _Layout:
    """The tables on a device that follow from the sizes and dtypes of its gradients.

    Args:
        facts: For each gradient how many real values it has, its group and its dtype.
        chunks: For each chunk which gradient it is of and where in it it starts; ordered by group.
        ends: Where in `chunks` each group starts, and the last one ends.
        present: A bit for each dtype that there is.
    """

    facts: Tensor
    chunks: Tensor
    ends: Tensor
    present: int

    @classmethod
    def of(cls, facts: list[tuple[int, int, int]], groups: int, device: torch.device) -> "_Layout":
        """Cuts the gradients into chunks."""
        table = torch.tensor(facts, dtype=torch.int64).reshape(-1, 3)
        counts = (table[:, 0] + CHUNK - 1) // CHUNK
        by_group = table[:, 1].argsort(stable=True)
        gradient = by_group.repeat_interleave(counts[by_group])
        before = (counts[by_group].cumsum(0) - counts[by_group]).repeat_interleave(counts[by_group])
        chunks = torch.stack([gradient, (torch.arange(len(gradient)) - before) * CHUNK], 1)
        ends = torch.zeros(groups + 1, dtype=torch.int64).index_add_(0, table[:, 1] + 1, counts).cumsum(0)
        present = sum({1 << kind for _, _, kind in facts})
        return cls(_uploaded(table, device), _uploaded(chunks, device), _uploaded(ends, device), present)


class _Device:
    """What is kept on one device from step to step, and made anew only where gradients are other than before."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        if device.type == "cpu" and not INTERPRETED:
            raise SettingError(
                'backend="gpu"',
                got="a gradient on the CPU",
                allowed="gradients on a GPU",
                advice='move the model to its GPU with model.to("cuda"), or pass backend="auto"',
            )
        _refuse_capture("the first step")
        self._device = device
        self._groups = len(plan.groups)
        self._limited = any(isinstance(group.strategy, ClipValue) for group in plan.groups)
        self._facts: list[tuple[int, int, int]] = []
        self._layout = _Layout.of([], self._groups, device)
        self._known: list[int] = []
        self._addresses = self._table = self._layout.ends
        self._spare: Tensor | None = None
        self._aligned = True
        self._replayed: list[object] = []

    def measure(self, placed: Sequence[tuple[Tensor, int]], thresholds: Thresholds) -> Tensor:
        """Measures dense gradients, each with the position of its group."""
        self._follow(placed)
        layout = self._layout
        chunks = len(layout.chunks)
        with _on(self._device):
            partial = torch.empty(chunks, COLUMNS, dtype=torch.float64, device=self._device)
            sums = torch.empty(self._groups, COLUMNS, dtype=torch.float64, device=self._device)
            if chunks:
                tables = self._addresses, layout.facts, layout.chunks, thresholds.values.to(self._device)
                measure_chunk[(chunks,)](*tables, partial, **self._compiled_for())
            add_chunks[(self._groups,)](partial, layout.ends, sums, ROWS=_ROWS, WIDTH=_WIDTH)
        return sums

    def apply_(self, decision: Decision) -> None:
        """Changes what was measured last."""
        layout = self._layout
        vectors = (decision.first, decision.second, decision.limits, decision.zeroed)
        if chunks := len(layout.chunks):
            with _on(self._device):
                tables = self._addresses, layout.facts, layout.chunks
                moved = (vector.to(self._device) for vector in vectors)
                apply_chunk[(chunks,)](*tables, *moved, **self._compiled_for())

    def _compiled_for(self) -> dict[str, int | bool]:
        """Returns what the kernels are compiled for: only the dtypes and the strategies that there are."""
        return {
            "PRESENT": self._layout.present,
            "LIMITED": self._limited,
            "ALIGNED": self._aligned,
            "CHUNK": CHUNK,
            "BLOCK": BLOCK,
            # A product and the sum it goes into are rounded once; Triton's default for this changes with its versions.
            "enable_fp_fusion": True,
        }

    def _follow(self, placed: Sequence[tuple[Tensor, int]]) -> None:
        """Brings the tables up to date."""
        facts = [
            (gradient.numel() * (2 if gradient.is_complex() else 1), group, _KIND_OF[gradient.dtype])
            for gradient, group in placed
        ]
        if facts != self._facts:
            _refuse_capture("a step with gradients of other shapes or dtypes than the last one's")
            self._facts, self._layout = facts, _Layout.of(facts, self._groups, self._device)
            self._known, self._spare = [], None
        addresses = [gradient.data_ptr() for gradient, _ in placed]
        self._aligned = not any(address % _ALIGNMENT for address in addresses)
        if _capturing():
            self._address_in_graph(addresses)
            return
        if addresses != self._known:
            self._known, self._table = addresses, _uploaded(torch.tensor(addresses), self._device)
        self._addresses = self._table
        if self._spare is None:
            self._spare = _pinned(torch.zeros(len(addresses), dtype=torch.int64), self._device)

    def _address_in_graph(self, addresses: list[int]) -> None:
        """Takes the addresses that a graph will use at every replay, without allocating pinned memory in its capture.

        Nothing runs while a graph is captured: the table that it fills is not there yet for a step outside of it.
        """
        self._addresses = self._table
        if addresses != self._known:
            if self._spare is None:
                _refuse_capture("a second step with other addresses")
            assert self._spare is not None
            self._spare.copy_(torch.tensor(addresses))
            self._addresses = self._spare.to(self._device, non_blocking=True)
        # A replay copies from the spare again, and reads the tables: they stay as they are from now on.
        self._replayed.append((self._layout, self._addresses, self._spare))
        self._spare = None


def _uploaded(host: Tensor, device: torch.device) -> Tensor:
    """Copies to a device from pinned memory, which PyTorch keeps until the copy is done; the host does not wait."""
    return _pinned(host, device).to(device, non_blocking=True)


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host if device.type == "cpu" else host.pin_memory()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that launches go to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _capturing() -> bool:
    # A PyTorch without CUDA raises when asked for its stream.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # PyTorch has no type there
    return initialized and torch.cuda.is_current_stream_capturing()


def _refuse_capture(what: str) -> None:
    """Refuses, while a CUDA graph is captured, what needs tables that are not on the device yet."""
    if _capturing():
        raise SettingError(
            'backend="gpu"',
            got=f"{what}, while a CUDA graph is captured",
            allowed="a capture after a step outside of it, with gradients of the same shapes and dtypes",
            advice="run a few steps before the capture, as torch.cuda.graph asks for anyway",
        )
