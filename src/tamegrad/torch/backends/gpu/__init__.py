"""The backend for GPUs: Triton kernels over a table of addresses, four launches a step for any number of tensors.

Measuring takes two launches (`measure_chunk`, `add_chunks`), deciding one (`decide_groups`), applying one
(`apply_chunk`). If some groups have a limit on elements and others have none, measuring and applying take one more
each; if a group has more than 67 million values, adding up takes one more. Where an element may grow past the largest
number of its dtype, two more: `peak_chunk`, and `decide_groups` again. With gradients on several devices each device
measures and applies its own, and the device of the first gradient decides for all. The host never waits for a device.

Nothing that a kernel is compiled for depends on an address, so a step that ran once compiles nothing when it is
captured in a CUDA graph. All arithmetic is in float64, of which consumer GPUs do little: pairs of float32 would be
faster there, but are left until a run on a GPU can show what they are worth.

Checked in Triton's interpreter, which runs the kernels on the CPU, and by compiling them for several GPUs. The kernels
have not run on a GPU yet, and nothing here has been tuned or timed: `make gpu` does that. Before they are first used on
a device, `trial` tries them there.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import COLUMNS, Decision
from tamegrad.errors import SettingError
from tamegrad.groups import Plan
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.backends.base import Backend, on_device
from tamegrad.torch.backends.gpu.decide import NUMBERS, decide_groups, target_bounds
from tamegrad.torch.backends.gpu.kernels import INTERPRETED, add_chunks, apply_chunk, measure_chunk, peak_chunk
from tamegrad.torch.backends.gpu.layout import BLOCK, CHUNK, Layout, facts_of
from tamegrad.torch.backends.kept import Kept
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.memory import Memory

__all__ = ["GpuBackend"]

# `add_chunks` reads this many rows at a time, in columns padded to a power of two.
_ROWS, _WIDTH = 64, 16
# `decide_groups` decides on this many groups a program, one a thread, and adds up this many at a time.
_GROUPS, _GROUP_SUMS = 128, 512


class GpuBackend(Backend):
    """Measures and changes the gradients of one plan on GPUs.

    Gradients of all dtypes and sizes share the launches.

    A step can be captured in a CUDA graph, after a step outside of it with gradients of the same shapes and dtypes. The
    graph reads tables that live as long as this object, so replay it only while this object is alive. A copy of this
    object (`copy.deepcopy`, pickle) starts without tables.

    Args:
        plan: The plan.
        counted: As in `Backend`.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        super().__init__(plan, counted)
        self._bounds = target_bounds(plan.groups)
        self._bounds_on: dict[torch.device, Tensor] = {}
        self._limited = np.isfinite(self.rules.limits)[self.group_of]
        self._layouts: Kept[Layout] = Kept()

    def measure(self, gradients: Gradients, loss_scale: Tensor | None) -> Tensor:
        """Measures all groups in two launches a device.

        Raises:
            SettingError: If a gradient is not on a GPU, or a CUDA graph is captured before a step outside of it.
        """
        parts = self._parts(gradients, gradients.memory)
        if not parts:
            return torch.zeros(len(self.plan.groups), COLUMNS, dtype=torch.float64, device="cpu")
        first, *others = [self._measured(part, loss_scale) for part in parts]
        for other in others:
            first += other.to(first.device)
        return first

    def peaks(self, gradients: Gradients, decision: Decision[Any], loss_scale: Tensor | None) -> Tensor:
        """Measures the largest magnitudes in one launch a device; gradients that cannot overflow are not read."""
        norms = on_device(decision.norms, torch.device("cpu") if INTERPRETED else decision.norms.device)
        peaks = torch.zeros_like(norms, dtype=torch.int64)
        for part in self._parts(gradients, gradients.memory):
            layout, device = part.layout, part.layout.device
            if chunks := len(layout.measured):
                here = peaks if device == peaks.device else torch.zeros_like(peaks, device=device)
                vectors = (on_device(vector, device) for vector in (decision.norms, decision.norms_after))
                with _launching_on(device):
                    tables = part.addresses, layout.facts_on_device, layout.measured
                    peak_chunk[(chunks,)](*tables, *vectors, _readable(loss_scale, device), here, **part.constants)
                if here is not peaks:
                    peaks = torch.maximum(peaks, here.to(peaks.device))
        return peaks.view(torch.float64)

    def decide(
        self,
        table: Tensor,
        *,
        on_nonfinite: OnNonfinite,
        nonfinite_steps: Tensor | None,
        loss_scale: Tensor | None,
        total: Tensor | None,
        peaks: Tensor | None = None,
        middle_only: bool = False,
    ) -> Decision[Any]:
        """Decides on every group: in one launch if all strategies are built in, else by plain operations.

        The decision of a launch is tensors, in Triton's interpreter too.
        """
        # Compiled kernels cannot read the host's memory, interpreted ones no other.
        if self._bounds is None or (table.device.type == "cpu") != INTERPRETED:
            return super().decide(
                table,
                on_nonfinite=on_nonfinite,
                nonfinite_steps=nonfinite_steps,
                loss_scale=loss_scale,
                total=total,
                peaks=peaks,
                middle_only=middle_only,
            )
        device, groups = table.device, len(table)
        if device not in self._bounds_on:
            # The host waits for this copy, once, so that any stream may read it.
            self._bounds_on[device] = torch.from_numpy(self._bounds).to(device)
        with _launching_on(device):
            numbers = torch.empty(len(NUMBERS), groups, dtype=torch.float64, device=device)
            nonfinite = torch.empty(groups, dtype=torch.int64, device=device)
            flags = torch.empty(2, groups, dtype=torch.bool, device=device)
            decide_groups[(1 + triton.cdiv(groups, _GROUPS),)](
                table.contiguous(),
                self._bounds_on[device],
                self.limits_on(device),
                _readable(loss_scale, device),
                None if total is None else total.to(table).contiguous(),
                None if peaks is None else peaks.to(table).contiguous(),
                numbers,
                nonfinite,
                flags,
                nonfinite_steps,
                groups,
                ZEROES=on_nonfinite == "zero",
                BLOCK=_GROUPS,
                ROWS=_GROUP_SUMS,
                enable_fp_fusion=True,
            )
        rows: dict[str, Any] = dict(zip(NUMBERS, numbers.unbind(), strict=True))
        rows["total_norm"] = rows["total_norm"][0]
        clipped, zeroed = flags.unbind()
        if not self.rules.has_limits:
            rows["limits"] = None
        return Decision(**rows, clipped=clipped, nonfinite=nonfinite, zeroed=zeroed if on_nonfinite == "zero" else None)

    def apply_(self, gradients: Gradients, decision: Decision[Any], changed: NDArray[np.bool_]) -> None:
        """Applies a decision in place, in one launch a device; groups that keep their values are not even read.

        Raises:
            SettingError: If a gradient changed its size or dtype since it was measured; nothing was changed.
        """
        del changed  # the device alone knows
        held = gradients.to_write(np.ones(len(gradients.values), dtype=np.bool_))
        for part in self._parts(gradients, held.memory):
            self._change_(part, decision)

    def _parts(self, gradients: Gradients, memory: Memory) -> list["_Part"]:
        """Returns what is on each device, that of the first gradient first."""
        present = memory.dtypes >= 0
        facts = facts_of(memory, self.group_of, self.counted, self._limited)[present]
        addresses = memory.addresses[present]
        tensors = [values for values in gradients.values if values is not None]
        numbers = np.fromiter(map(Tensor.get_device, tensors), np.int64, len(tensors))
        parts = []
        for number in dict.fromkeys(numbers.tolist()):
            here = numbers == number
            layout = self._layout_for(tensors[int(here.argmax())].device, facts[here])
            parts.append(_Part(layout, layout.addresses_on_device(addresses[here])))
        return parts

    def _layout_for(self, device: torch.device, facts: NDArray[np.int64]) -> Layout:
        """Returns the layout of gradients, which usually is that of a step before."""
        _refuse_elsewhere(device)
        return self._layouts.get(device, (facts.tobytes(),), lambda: Layout(facts, len(self.plan.groups), device))

    def _measured(self, part: "_Part", loss_scale: Tensor | None) -> Tensor:
        """Returns the sums of what is on one device."""
        layout, device = part.layout, part.layout.device
        with _launching_on(device):
            partial = torch.empty(len(layout.measured), COLUMNS, dtype=torch.float64, device=device)
            for limits, here in _by_limit(self.limits_on(device), len(partial), layout.unlimited_measured):
                tables = part.addresses, layout.facts_on_device, layout.measured[here]
                scale = None if limits is None else _readable(loss_scale, device)
                measure_chunk[(len(tables[-1]),)](*tables, limits, scale, partial[here], **part.constants)
            if layout.spans is not None:
                spans = torch.empty(len(layout.spans), COLUMNS, dtype=torch.float64, device=device)
                add_chunks[(len(spans),)](partial, layout.spans, spans, ROWS=_ROWS, WIDTH=_WIDTH)
                partial = spans
            sums = torch.empty(len(self.plan.groups), COLUMNS, dtype=torch.float64, device=device)
            add_chunks[(len(sums),)](partial, layout.bounds, sums, ROWS=_ROWS, WIDTH=_WIDTH)
        return sums

    def _change_(self, part: "_Part", decision: Decision[Any]) -> None:
        """Changes what is on one device."""
        layout, device = part.layout, part.layout.device
        vectors = decision.first, decision.second, decision.limits, decision.zeroed
        first, second, limits, zeroed = (None if v is None else on_device(v, device) for v in vectors)
        with _launching_on(device):
            for own_limits, here in _by_limit(limits, len(layout.chunks), layout.unlimited):
                tables = part.addresses, layout.facts_on_device, layout.chunks[here]
                apply_chunk[(len(tables[-1]),)](*tables, first, second, own_limits, zeroed, **part.constants)


@dataclass(frozen=True, slots=True)
class _Part:
    """The gradients on one device in one step.

    Args:
        layout: Their tables.
        addresses: `(N,)` on the device: where they are.
    """

    layout: Layout
    addresses: Tensor

    @property
    def constants(self) -> dict[str, int | bool]:
        """What the kernels over chunks are specialized for."""
        return {
            "PRESENT": self.layout.present,
            "CHUNK": CHUNK,
            "BLOCK": BLOCK,
            # Rounds a product and the sum it goes into once; Triton's default for this depends on its version.
            "enable_fp_fusion": True,
        }


def _by_limit(limits: Tensor | None, count: int, unlimited: int) -> Iterator[tuple[Tensor | None, slice]]:
    """Yields which of the chunks are launched together: those without limits on elements, then those with limits."""
    if unlimited:
        yield None, slice(0, unlimited)
    if unlimited < count:
        yield limits, slice(unlimited, count)


def _readable(loss_scale: Tensor | None, device: torch.device) -> Tensor | None:
    """Returns a loss scale as kernels on a device can read it; usually unchanged."""
    if loss_scale is None:
        return None
    readable = loss_scale.dtype in {torch.float32, torch.float64}
    return loss_scale.to(device, loss_scale.dtype if readable else torch.float64)


def _launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one, which launches go to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _refuse_elsewhere(device: torch.device) -> None:
    """Refuses gradients that the kernels cannot read."""
    if device.type != "meta" and (device.type == "cpu") == INTERPRETED:
        return
    move = 'move the model to its GPU with model.to("cuda")'
    raise SettingError(
        'backend="gpu"',
        got="a gradient on the CPU" if device.type == "cpu" else f"a gradient on the device {device}",
        allowed="gradients on the CPU, while TRITON_INTERPRET=1 is set" if INTERPRETED else "gradients on a GPU",
        advice=f'{"unset TRITON_INTERPRET" if INTERPRETED else move}, or pass backend="auto"',
    )
