"""Follows backward passes: which one runs, which units it has finished, and whether it ended."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tamegrad.errors import SettingError, quoted, warn
from tamegrad.torch.backward.refusals import (
    is_nested,
    refuse_compiled_autograd,
    refuse_create_graph,
    refuse_retain_graph,
)
from tamegrad.torch.backward.units import Unit

__all__ = ["Passes"]

_WHERE = "loss.backward() with StepInBackward"
_MOST_NAMED = 5


class Passes:
    """What has happened in the backward pass that runs, or in one that raised half way.

    Args:
        units: The units, in the order of the plan.

    Attributes:
        holds: Whether gradients are there that `accumulate` held back.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.holds = False
        self._units = units
        self._accumulating = 0
        # PyTorch's number of the backward pass; it never comes twice.
        self._task: int | None = None
        # In the order in which they were finished.
        self._finished: dict[Unit, None] = {}
        self._is_said = False

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Holds all steps back inside of the context."""
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    @property
    def accumulates(self) -> bool:
        """Whether steps are held back now."""
        return self._accumulating > 0

    def begin_if_new(self) -> bool:
        """Looks, inside a hook, which backward pass this is.

        Returns:
            Whether a pass that steps begins.

        Raises:
            SettingError: If stepping inside of it cannot be right.
        """
        task = torch._C._current_graph_task_id()  # noqa: SLF001  torch has no other name
        if task == self._task:
            return False
        nested = not self.accumulates and is_nested()
        if self._task is not None and not nested:
            raise SettingError(
                _WHERE,
                got=f"gradients that are left of an earlier backward pass, which did not end; in it {self._progress()}",
                allowed="a backward pass from its beginning to its end",
                advice="call zero_grad() after a backward pass that raised, which drops what is left of it",
            )
        if self.accumulates:
            refuse_create_graph()
            self.holds = True
            return False
        if self._task is None:
            self._begin(task)
        if nested:
            raise SettingError(
                _WHERE,
                got="a backward pass inside another one, as a checkpoint with use_reentrant=True makes it: whether "
                "more gradients come for a layer cannot be known",
                allowed="checkpoints that are not reentrant",
                advice="pass use_reentrant=False to torch.utils.checkpoint.checkpoint(); in transformers, "
                'gradient_checkpointing_enable({"use_reentrant": False})',
            )
        refuse_create_graph()
        refuse_retain_graph()
        refuse_compiled_autograd()
        return True

    def completes(self, unit: Unit) -> bool:
        """Counts a gradient that has arrived; returns whether the unit has all of its gradients now.

        Raises:
            SettingError: If the unit is finished already.
        """
        if unit in self._finished:
            raise SettingError(
                f"layer {unit.name!r} with StepInBackward",
                got="a gradient after the layer was stepped in the same backward pass",
                allowed="one gradient for each parameter in one backward pass",
                advice="step after backward() with attach()",
            )
        return unit.is_complete_with_one_more()

    def unfinished(self) -> list[Unit]:
        """Returns the units that have not been finished in this pass."""
        return [unit for unit in self._units if unit not in self._finished]

    def finished(self, unit: Unit) -> None:
        """Notes that a unit is finished."""
        self._finished[unit] = None

    @property
    def finished_units(self) -> list[Unit]:
        """The units that have been finished in this pass, in that order."""
        return list(self._finished)

    def end(self) -> None:
        """Notes that the pass has ended."""
        self._task = None
        self.holds = False

    def explain(self, error: BaseException) -> None:
        """Adds to an error what has been stepped before it."""
        error.add_note(
            f"tamegrad: in this backward pass {self._progress()}. Call zero_grad() before the next one, to drop the "
            "gradients that are left"
        )
        self._is_said = True

    def drop(self) -> None:
        """Forgets a pass that raised half way, whose gradients are dropped, and what was held back.

        Warns:
            TamegradWarning: If it did, and no error of tamegrad's has said what it left.
        """
        if self._task is not None and not self._is_said:
            warn(
                f"the last backward pass raised half way: in it {self._progress()}. What was stepped stays, and the "
                "gradients that are left are dropped; load a checkpoint if all layers have to be of the same step"
            )
        self.end()

    def _begin(self, task: int) -> None:
        self._task = task
        self._is_said = False
        self._finished = {}
        for unit in self._units:
            unit.expect()

    def _progress(self) -> str:
        names = [unit.name for unit in self._finished]
        if not names:
            return f"none of {len(self._units)} layers was stepped"
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return (
            f"{len(names)} of {len(self._units)} layers were stepped ({quoted(names[:_MOST_NAMED])}{more}), and the "
            "others were not"
        )
