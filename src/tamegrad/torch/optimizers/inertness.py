"""Notices that parameters change without a step of the optimizer that a normalizer is attached to."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from tamegrad.errors import Line, warn

__all__ = ["InertnessWatch"]

# Changes without a step after which a backward pass warns. Attacks and sharpness-aware optimizers change parameters a
# few times between two steps.
_MANY_CHANGES = 10
# The same when the user asks for the report, and so expects that there were steps.
_FEW_CHANGES = 2


class InertnessWatch:
    """Warns once if parameters keep changing from one backward pass to the next, and no step is seen.

    It looks at the version counters of three parameters, in every backward pass and when a report is read. Changes
    through `parameter.data` are not counted by PyTorch, and not noticed.

    Args:
        optimizer: The class of the optimizer, for the message.
        attached_at: The user's line that attached to it.
    """

    def __init__(self, optimizer: str, attached_at: Line) -> None:
        self._optimizer = optimizer
        self._attached_at = attached_at
        self._watched: list[_Watched] = []
        self._steps = 0
        self._warned = False

    @property
    def is_watching(self) -> bool:
        """Whether there is a parameter to look at."""
        return bool(self._watched)

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watches some of the parameters: the first, the middle and the last that are trained."""
        self.stop()
        trained = [
            parameter
            for parameter in parameters
            # A lazy one has no memory before the first forward pass.
            if parameter.requires_grad and parameter.is_leaf and not is_lazy(parameter)
        ]
        places = {0, len(trained) // 2, len(trained) - 1} if trained else set[int]()
        self._watched = [_Watched(trained[place], self) for place in places]

    def step_seen(self) -> None:
        """Notes that a step begins."""
        self._steps += 1

    def look(self) -> None:
        """Warns if parameters changed without a step, when the user expects that there were steps."""
        if any(watched.changes_since(self._steps) >= _FEW_CHANGES for watched in self._watched):
            self._warn()

    def backward_passed(self, watched: "_Watched") -> None:
        """Counts a backward pass that reached one of the parameters."""
        watched.count(self._steps)
        if watched.changes >= _MANY_CHANGES:
            self._warn()

    def stop(self) -> None:
        """Stops watching."""
        for watched in self._watched:
            watched.hook.remove()
        self._watched = []

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"the parameters have changed, but no step() of the {self._optimizer} that tamegrad is attached to was "
                "seen, so gradients were not normalized. Attach to the optimizer whose step() changes them; or, if no "
                "step() does, call GradientNormalizer.normalize_() before they change (tamegrad warns once)",
                at=self._attached_at,
            )


class _Watched:
    """One parameter, and how often it changed since the last step."""

    def __init__(self, parameter: nn.Parameter, watch: InertnessWatch) -> None:
        self._parameter = weakref.ref(parameter)
        self._version: int | None = None
        self._steps = 0
        self.changes = 0
        owner = weakref.ref(watch)

        def passed(_: object) -> None:
            # A parameter must not keep a normalizer alive.
            watching = owner()
            if watching is not None:
                watching.backward_passed(self)

        register: Any = parameter.register_post_accumulate_grad_hook
        self.hook = register(passed)

    def count(self, steps: int) -> None:
        """Counts the change since the last backward pass, if there was one and no step."""
        self.changes = self.changes_since(steps)
        parameter = self._parameter()
        self._version = None if parameter is None else parameter._version  # noqa: SLF001  torch has no other name
        self._steps = steps

    def changes_since(self, steps: int) -> int:
        """Returns how often the parameter has changed, given how many steps there were in all."""
        parameter = self._parameter()
        if steps != self._steps or parameter is None:
            return 0
        return self.changes + (self._version is not None and parameter._version != self._version)  # noqa: SLF001
