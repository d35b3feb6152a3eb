"""The backends: what measures, decides and applies. One file each, with a class `Kernels` of the same three methods."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.errors import MissingExtraError, SettingError, quoted
from tamegrad.groups import Plan
from tamegrad.strategies import OnNonfinite
from tamegrad.torch.decide import Decision, Thresholds
from tamegrad.torch.kernels import eager
from tamegrad.torch.kernels.memory import Located, ModuleTables

__all__ = ["BACKENDS", "Backend", "BackendName", "Choice", "StepTaker", "choose"]

BackendName: TypeAlias = Literal["auto", "cpu", "gpu", "eager"]


class Backend(Protocol):
    """What is made once for a plan and measures and changes gradients in every step.

    It is made with the plan and, for each parameter, whether it is measured: what another process measures is only
    changed here.

    `gradients` has one entry a parameter of the plan, in its order, and None where there is none.
    """

    def measure(self, gradients: Sequence[Tensor | None], thresholds: Thresholds) -> Tensor:
        """Returns the `(G, COLUMNS)` float64 table of sums that `decide` reads, on the device of the first gradient.

        The thresholds are those of the step, which under a loss scale are not the plan's.
        """

    def decide(self, table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, steps: Tensor) -> Decision:
        """Decides what `tamegrad.torch.decide.decide` does from a table that `measure` gave, or a sum of such."""

    def apply_(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Changes the gradients that were measured, in place, as was decided."""


@runtime_checkable
class StepTaker(Backend, Protocol):
    """A backend that works on addresses, and takes a step like the last one at once, up to where gradients change."""

    def take_step(
        self,
        parameters: NDArray[np.int64],
        modules: ModuleTables,
        thresholds: Thresholds,
        on_nonfinite: OnNonfinite,
        steps: Tensor,
    ) -> tuple[Located, Decision] | None:
        """Collects gradients, measures and decides.

        Args:
            parameters: `(P,)`: the `id` of each parameter, in the order of the plan.
            modules: The modules of the model as they were when the plan was made.
            thresholds: Of the step.
            on_nonfinite: As in `decide`.
            steps: As in `decide`.

        Returns:
            The gradients, and what becomes of them. None if the step is unlike the last one, the modules included;
            then nothing was done.
        """


def _from_file(name: str) -> Callable[[Plan, Sequence[bool]], Backend]:
    """Returns the backend of a file whose imports take an extra, and are made when it is first used."""

    def make(plan: Plan, counted: Sequence[bool]) -> Backend:
        kernels: Backend = import_module(f"tamegrad.torch.kernels.{name}").Kernels(plan, counted)
        return kernels

    return make


BACKENDS: dict[str, Callable[[Plan, Sequence[bool]], Backend]] = {
    "cpu": _from_file("cpu"),
    "gpu": _from_file("gpu"),
    "eager": eager.Kernels,
}

# What a backend needs beyond PyTorch: the extra and the library in it.
_NEEDS = {"cpu": ("cpu", "Numba"), "gpu": ("gpu", "Triton")}


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that is used, and why.

    Args:
        name: A key of `BACKENDS`.
        reason: Why.

    Example:
        >>> print(Choice("cpu", "all 148 parameters are on the CPU"))
        cpu (all 148 parameters are on the CPU)
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(name: str, parameters: Iterable[Tensor]) -> Choice:
    """Returns the backend that a setting stands for.

    Args:
        name: A backend's name, or `"auto"`.
        parameters: What is to be normalized.

    Returns:
        The choice.

    Raises:
        SettingError: If there is no such backend.
        MissingExtraError: If what a backend needs that was asked for by name is not installed.

    Example:
        >>> print(choose("eager", []))
        eager (as asked)
    """
    if name == "auto":
        return _best_for(list(parameters))
    if name not in BACKENDS:
        raise SettingError(
            "backend", got=repr(name), allowed=quoted(["auto", *BACKENDS]), advice='"auto" takes the best there is'
        )
    problem = _problem_with(name)
    if problem is not None:
        extra, library = _NEEDS[name]
        raise MissingExtraError(
            f'backend="{name}"',
            got=f"a Python in which {library} cannot be imported ({problem})",
            allowed=f'{library}, or backend="eager", which needs nothing',
            advice=f"pip install 'tamegrad[{extra}]'",
        ) from problem
    return Choice(name, "as asked")


def _best_for(parameters: list[Tensor]) -> Choice:
    devices = sorted({str(parameter.device) for parameter in parameters})
    if devices != ["cpu"]:
        # The GPU backend is only taken by name as long as nobody has run it on a GPU.
        return Choice("eager", f"the {len(parameters)} parameters are on {', '.join(devices) or 'no device'}")
    where = "the only parameter is" if len(parameters) == 1 else f"all {len(parameters)} parameters are"
    problem = _problem_with("cpu")
    if problem is not None:
        why = f"Numba cannot be imported: {problem}; pip install 'tamegrad[cpu]'"
        return Choice("eager", f"{where} on the CPU, but {why}")
    return Choice("cpu", f"{where} on the CPU")


def _problem_with(name: str) -> ImportError | None:
    """Returns why a backend cannot be imported, or None if it can."""
    try:
        import_module(f"tamegrad.torch.kernels.{name}")
    except ImportError as error:
        return error
    return None
