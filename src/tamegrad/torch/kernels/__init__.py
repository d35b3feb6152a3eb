"""The backends: what touches the big arrays. One file each, with a class `Kernels` of the same two methods."""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from tamegrad.errors import SettingError, quoted
from tamegrad.groups import Plan
from tamegrad.torch.decide import Decision, Thresholds
from tamegrad.torch.kernels import eager

__all__ = ["BACKENDS", "Backend", "BackendName", "choose"]

BackendName: TypeAlias = Literal["auto", "eager"]


class Backend(Protocol):
    """What is made once for a plan and measures and changes gradients in every step.

    `gradients` has one entry a parameter of the plan, in its order, and None where there is none.
    """

    def measure(self, gradients: Sequence[Tensor | None], thresholds: Thresholds) -> Tensor:
        """Returns the `(G, COLUMNS)` float64 table of sums that `decide` reads, on the device of the first gradient.

        The thresholds are those of the step, which under a loss scale are not the plan's.
        """

    def apply_(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Changes the gradients that were measured, in place, as was decided."""


BACKENDS: dict[str, Callable[[Plan], Backend]] = {"eager": eager.Kernels}


def choose(name: str) -> str:
    """Returns the backend that a setting stands for.

    Args:
        name: A backend's name, or `"auto"`.

    Returns:
        A key of `BACKENDS`.

    Raises:
        SettingError: If there is no such backend.

    Example:
        >>> choose("auto")
        'eager'
    """
    if name == "auto":
        return "eager"
    if name not in BACKENDS:
        raise SettingError(
            "backend", got=repr(name), allowed=quoted(["auto", *BACKENDS]), advice='"auto" takes the best there is'
        )
    return name
