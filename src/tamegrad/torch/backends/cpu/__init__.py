"""The backend for CPUs: loops compiled by Numba, over all gradients of all groups at once, on several threads.

The work is cut into chunks whose bounds depend on the gradients alone, and their sums are added up in order: the same
gradients give the same bits on any number of threads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.decide import AFTER, BEFORE, COLUMNS, Decision
from tamegrad.groups import Plan
from tamegrad.torch.backends.base import Backend
from tamegrad.torch.backends.cpu import threads
from tamegrad.torch.backends.cpu.compiler import CONVERTS_FLOAT16
from tamegrad.torch.backends.cpu.loops import change_chunks, measure_chunks
from tamegrad.torch.backends.cpu.work import Work, share_out
from tamegrad.torch.backends.foreach import ForeachBackend
from tamegrad.torch.gradients import Gradients
from tamegrad.torch.memory import DTYPES, Memory

__all__ = ["CpuBackend"]

_HOST = torch.device("cpu")
_FLOAT16 = DTYPES.index(torch.float16)
_MIDDLE_BEFORE, _MIDDLE_AFTER = BEFORE.start + 1, AFTER.start + 1


class CpuBackend(Backend):
    """Measures and changes the gradients of one plan on the CPU.

    If a gradient is not on the CPU, or is float16 where no instruction converts it, all go through `ForeachBackend`.

    Args:
        plan: The plan.
        counted: As in `Backend`.
    """

    def __init__(self, plan: Plan, counted: Sequence[bool]) -> None:
        super().__init__(plan, counted)
        self._fallback = ForeachBackend(plan, counted)
        self._work = Work.of(Memory.of([]), self.counted, self.group_of)

    def measure(self, gradients: Gradients, loss_scale: Tensor | None) -> Tensor:
        """Measures all groups in one call for each dtype."""
        if not _can_read(gradients):
            return self._fallback.measure(gradients, loss_scale)
        work = self._work_for(gradients.memory)
        limits = self.limits_on(_HOST, loss_scale)
        limits_of = None if limits is None else limits.numpy()[self.group_of]
        # Loops write one number a chunk, and a row where there is more to report.
        sums, rows = np.empty(len(work.measured)), np.empty((len(work.measured), COLUMNS))
        for format_, bounds in work.measuring:
            args = work.measured, gradients.memory.addresses, limits_of, format_.pairs, format_.like, sums, rows
            threads.run(measure_chunks, (format_.like.dtype, limits_of is None), bounds, *args, alive=gradients)
        return torch.from_numpy(self._added_up(work, sums, rows))

    def apply_(self, gradients: Gradients, decision: Decision[Any], changed: NDArray[np.bool_]) -> None:
        """Changes gradients in one call for each dtype; a group that keeps its values is not touched.

        Raises:
            SettingError: If a gradient changed its size or dtype since it was measured; nothing was changed.
        """
        if not _can_read(gradients):
            self._fallback.apply_(gradients, decision, changed)
            return
        held = gradients.to_write(changed)
        work = self._work_for(gradients.memory)
        chosen = changed[work.chunks[:, 0]]
        chunks = work.chunks[chosen]
        decided = np.empty((len(decision.norms), 4))
        decided[:, 0], decided[:, 1] = decision.first, decision.second
        decided[:, 2] = np.inf if decision.limits is None else decision.limits
        decided[:, 3] = False if decision.zeroed is None else decision.zeroed
        for format_, bounds in share_out(chunks, work.chunk_dtypes[chosen]):
            args = chunks, held.memory.addresses, self.group_of, decided, format_.pairs, format_.like
            threads.run(change_chunks, format_.like.dtype, bounds, *args, alive=held)

    def _added_up(self, work: Work, sums: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Adds up the sums of chunks by group, always in the same order."""
        table = np.zeros((len(self.plan.groups), COLUMNS))
        is_short = sums >= 0.0
        if is_short.all():
            table[:, _MIDDLE_BEFORE] = table[:, _MIDDLE_AFTER] = np.bincount(work.groups, sums, len(table))
        else:
            rows[is_short] = 0.0
            rows[is_short, _MIDDLE_BEFORE] = rows[is_short, _MIDDLE_AFTER] = sums[is_short]
            np.add.at(table, work.groups, rows)
        return table

    def _work_for(self, memory: Memory) -> Work:
        """Returns the work for gradients of these sizes, which usually are those of the last step."""
        work = self._work
        if not work.fits(memory):
            work = self._work = Work.of(memory, self.counted, self.group_of)
        return work


def _can_read(gradients: Gradients) -> bool:
    return gradients.on_host() and (CONVERTS_FLOAT16 or not (gradients.memory.dtypes == _FLOAT16).any())
