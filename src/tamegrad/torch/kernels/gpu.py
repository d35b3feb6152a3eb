"""The backend for GPUs: Triton kernels over a table of addresses, four launches a step for any number of tensors.

Measuring takes two launches (`measure_chunk`, `add_chunks`), deciding one (`decide_groups`), applying one
(`apply_chunk`). With gradients on several devices, each measures and applies its own, and the first decides for all.
Nothing makes the host wait for the device.

Checked in Triton's interpreter, which runs the kernels on the CPU, and by compiling them for several GPUs. No GPU was
at hand: they have not run on one, and nothing here was tuned or timed.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.errors import SettingError
from tamegrad.groups import Plan
from tamegrad.strategies import ClipValue, OnNonfinite
from tamegrad.torch.decide import COLUMNS, Decision, Thresholds, decide
from tamegrad.torch.kernels.gpu_decide import NUMBERS, decide_groups
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
# `decide_groups` decides on this many groups a program, one a thread, and adds up this many at a time.
_GROUPS, _GROUP_SUMS = 128, 512
# The widest loads of a thread, in bytes, need addresses that this divides.
_ALIGNMENT = 16

_KIND_OF: dict[torch.dtype, int] = {getattr(torch, name): kind for kind, name in enumerate(KINDS)}
# How many real values a value is.
_PARTS = np.array([2 if dtype.is_complex else 1 for dtype in _KIND_OF])


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
        self._roles = np.stack([np.array(plan.group_of), np.array(counted)], 1).astype(np.int64)
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
        present = [gradient for gradient in gradients if gradient is not None]
        roles = self._roles
        if len(present) < len(gradients):
            roles = roles[[gradient is not None for gradient in gradients]]
        # Most gradients are contiguous: to ask for that first spares them a call of Python's own.
        self._copies = {
            place: gradient.contiguous()
            for place, gradient in enumerate(present)
            if not gradient.is_contiguous() and not is_dense(gradient)
        }
        for place, copy in self._copies.items():
            present[place] = copy
        by_device = _by_device(present, roles)
        for device in by_device.keys() - self._devices.keys():
            self._devices[device] = _Device(self._plan, device)
        self._measured = [self._devices[device] for device in by_device]
        if not by_device:
            return torch.zeros(len(self._plan.groups), COLUMNS, dtype=torch.float64)
        first, *others = [self._devices[device].measure(*placed, thresholds) for device, placed in by_device.items()]
        for other in others:
            first += other.to(first.device)
        return first

    def decide(self, table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, steps: Tensor) -> Decision:
        """Decides on every group, as `Backend` says, in one launch; the decision is views of what that writes."""
        if table.device.type == "cpu" and not INTERPRETED:
            return decide(table, thresholds, on_nonfinite, steps)
        groups = len(table)
        with _on(table.device):
            numbers = torch.empty(len(NUMBERS), groups, dtype=torch.float64, device=table.device)
            nonfinite = torch.empty(groups, dtype=torch.int64, device=table.device)
            flags = torch.empty(2, groups, dtype=torch.bool, device=table.device)
            decide_groups[(1 + triton.cdiv(groups, _GROUPS),)](
                table.contiguous(),
                thresholds.norms,
                thresholds.values,
                thresholds.renormalizes,
                numbers,
                nonfinite,
                flags,
                steps,
                groups,
                ZEROES=on_nonfinite == "zero",
                BLOCK=_GROUPS,
                ROWS=_GROUP_SUMS,
                enable_fp_fusion=True,
            )
        vectors: dict[str, Any] = dict(zip(NUMBERS, numbers.unbind(), strict=True))
        total_norm = vectors.pop("total_norm")[0]
        clipped, zeroed = flags.unbind()
        return Decision(**vectors, total_norm=total_norm, nonfinite=nonfinite, clipped=clipped, zeroed=zeroed)

    def apply_(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Applies a decision in place, in one launch a device; groups that keep their values are not even read.

        Args:
            gradients: As they were measured.
            decision: What to do with each group.
        """
        for device in self._measured:
            device.apply_(decision)
        if self._copies:
            present = [gradient for gradient in gradients if gradient is not None]
            for place, copy in self._copies.items():
                present[place].copy_(copy)
        self._copies.clear()


@dataclass(frozen=True, slots=True)
class _Layout:
    """The tables on a device that follow from the sizes and dtypes of its gradients.

    Args:
        facts: For each gradient how many real values it has, its group and its dtype.
        chunks: For each chunk which gradient it is of and where in it it starts; ordered by group.
        measured: Those of the chunks that are measured here.
        ends: Where in `measured` each group starts, and the last one ends.
        present: A bit for each dtype that there is.
    """

    facts: Tensor
    chunks: Tensor
    measured: Tensor
    ends: Tensor
    present: int

    @classmethod
    def of(cls, facts: NDArray[np.int64], groups: int, device: torch.device) -> "_Layout":
        """Cuts the gradients into chunks; `facts` are as `_facts` gives them."""
        table = torch.from_numpy(facts)
        counts = (table[:, 0] + CHUNK - 1) // CHUNK
        by_group = table[:, 1].argsort(stable=True)
        counted = counts * table[:, 3]
        chunks, measured = (_uploaded(_chunks(by_group, of[by_group]), device) for of in (counts, counted))
        ends = torch.zeros(groups + 1, dtype=torch.int64).index_add_(0, table[:, 1] + 1, counted).cumsum(0)
        present = sum(1 << kind for kind in set(facts[:, 2].tolist()))
        return cls(_uploaded(table[:, :3].contiguous(), device), chunks, measured, _uploaded(ends, device), present)


def _chunks(gradients: Tensor, counts: Tensor) -> Tensor:
    """Returns gradient by gradient as many chunks as it is counted for."""
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    starts = (torch.arange(len(before)) - before) * CHUNK
    return torch.stack([gradients.repeat_interleave(counts), starts], 1)


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
        self._facts = np.empty((0, 4), dtype=np.int64)
        self._layout = _Layout.of(self._facts, self._groups, device)
        self._known = np.empty(0, dtype=np.int64)
        self._addresses = self._table = self._layout.ends
        self._spare: Tensor | None = None
        self._aligned = True
        self._replayed: list[object] = []

    def measure(self, gradients: list[Tensor], roles: NDArray[np.int64], thresholds: Thresholds) -> Tensor:
        """Measures dense gradients, each with the position of its group and whether it is measured at all."""
        self._follow(gradients, roles)
        layout = self._layout
        chunks = len(layout.measured)
        with _on(self._device):
            partial = torch.empty(chunks, COLUMNS, dtype=torch.float64, device=self._device)
            sums = torch.empty(self._groups, COLUMNS, dtype=torch.float64, device=self._device)
            if chunks:
                tables = self._addresses, layout.facts, layout.measured, thresholds.values.to(self._device)
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

    def _follow(self, gradients: list[Tensor], roles: NDArray[np.int64]) -> None:
        """Brings the tables up to date."""
        facts = _facts(gradients, roles)
        if not np.array_equal(facts, self._facts):
            _refuse_capture("a step with gradients of other shapes or dtypes than the last one's")
            self._facts, self._layout = facts, _Layout.of(facts, self._groups, self._device)
            self._known, self._spare = np.empty(0, dtype=np.int64), None
        addresses = _asked(Tensor.data_ptr, gradients)
        self._aligned = not (addresses % _ALIGNMENT).any()
        if _capturing():
            self._address_in_graph(addresses)
            return
        if not np.array_equal(addresses, self._known):
            self._known, self._table = addresses, _uploaded(torch.from_numpy(addresses), self._device)
        self._addresses = self._table
        if self._spare is None:
            self._spare = _pinned(torch.zeros(len(addresses), dtype=torch.int64), self._device)

    def _address_in_graph(self, addresses: NDArray[np.int64]) -> None:
        """Takes the addresses that a graph will use at every replay, without allocating pinned memory in its capture.

        Nothing runs while a graph is captured: the table that it fills is not there yet for a step outside of it.
        """
        self._addresses = self._table
        if not np.array_equal(addresses, self._known):
            if self._spare is None:
                _refuse_capture("a second step with other addresses")
            assert self._spare is not None
            self._spare.copy_(torch.from_numpy(addresses))
            self._addresses = self._spare.to(self._device, non_blocking=True)
        # A replay copies from the spare again, and reads the tables: they stay as they are from now on.
        self._replayed.append((self._layout, self._addresses, self._spare))
        self._spare = None


def _by_device(
    gradients: list[Tensor], roles: NDArray[np.int64]
) -> dict[torch.device, tuple[list[Tensor], NDArray[np.int64]]]:
    """Returns the gradients of each device, and their roles."""
    # Almost always it is one device. To compare numbers takes half as long as to hash what `device` makes anew.
    if len(set(map(Tensor.get_device, gradients))) == 1:
        return {gradients[0].device: (gradients, roles)}
    places: dict[torch.device, list[int]] = {}
    for place, gradient in enumerate(gradients):
        places.setdefault(gradient.device, []).append(place)
    return {device: ([gradients[place] for place in there], roles[there]) for device, there in places.items()}


def _facts(gradients: list[Tensor], roles: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns for each gradient how many real values it has, its group, its dtype, and whether it is measured."""
    facts = np.empty((len(gradients), 4), dtype=np.int64)
    facts[:, 0] = _asked(Tensor.numel, gradients)
    facts[:, [1, 3]] = roles
    facts[:, 2] = [_KIND_OF[gradient.dtype] for gradient in gradients]
    facts[:, 0] *= _PARTS[facts[:, 2]]
    return facts


def _asked(method: Callable[[Tensor], int], gradients: list[Tensor]) -> NDArray[np.int64]:
    """Calls a method of every gradient, without the steps that Python takes for a loop."""
    return np.fromiter(map(method, gradients), np.int64, len(gradients))


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
