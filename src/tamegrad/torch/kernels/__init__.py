"""The backends: what touches the big arrays. One file each, with the same two functions.

`measure(gradients, plan)` returns the table of sums that `decide` reads; `apply_(gradients, plan, decision)` changes
the gradients in place. `gradients` has one entry a parameter of the plan, in its order, and None where there is none.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, cast

from tamegrad.errors import SettingError, quoted
from tamegrad.groups import Plan
from tamegrad.torch.decide import Decision
from tamegrad.torch.kernels import eager
from torch import Tensor

__all__ = ["BACKENDS", "Backend", "BackendName", "choose"]

BackendName: TypeAlias = Literal["auto", "eager"]


class Backend(Protocol):
    """The functions that every file of this folder has."""

    def measure(self, gradients: Sequence[Tensor | None], plan: Plan) -> Tensor:
        """Returns the `(G, COLUMNS)` float64 table of sums, on the device of the first gradient."""

    def apply_(self, gradients: Sequence[Tensor | None], plan: Plan, decision: Decision) -> None:
        """Changes the gradients in place as was decided."""


BACKENDS: dict[str, Backend] = {"eager": cast("Backend", eager)}


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
