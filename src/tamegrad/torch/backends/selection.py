"""Which backend a model gets, and why."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from tamegrad.errors import MissingExtraError, SettingError, quoted
from tamegrad.groups import Plan
from tamegrad.torch.backends.base import Backend
from tamegrad.torch.backends.foreach import ForeachBackend
from tamegrad.torch.backends.foreach.float32 import has_float64

__all__ = ["BACKENDS", "SelectedBackend", "select"]


def _imported_late(name: str, class_name: str) -> Callable[[Plan, Sequence[bool]], Backend]:
    """Returns a backend whose module needs an extra, and is imported when the backend is first made."""

    def make(plan: Plan, counted: Sequence[bool]) -> Backend:
        backend: Backend = getattr(import_module(_module(name)), class_name)(plan, counted)
        return backend

    return make


def _module(name: str) -> str:
    return f"tamegrad.torch.backends.{name}"


BACKENDS: dict[str, Callable[[Plan, Sequence[bool]], Backend]] = {
    "cpu": _imported_late("cpu", "CpuBackend"),
    "gpu": _imported_late("gpu", "GpuBackend"),
    "foreach": ForeachBackend,
}

# Whether "auto" may take the Triton kernels on a GPU that they pass their trial on. They have been checked in Triton's
# interpreter and compiled for several GPUs, but no run on a GPU has shown yet that they are right and fast there.
AUTO_TAKES_TRITON = False

# What a backend needs beyond PyTorch: the extra and the library in it.
_NEEDS = {"cpu": ("cpu", "Numba"), "gpu": ("gpu", "Triton")}


@dataclass(frozen=True, slots=True)
class SelectedBackend:
    """The backend that is used, and why.

    Args:
        name: A key of `BACKENDS`.
        reason: Why.

    Example:
        >>> print(SelectedBackend("cpu", "all 148 parameters are on the CPU"))
        cpu (all 148 parameters are on the CPU)
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def select(name: str, parameters: Iterable[Tensor]) -> SelectedBackend:
    """Returns the backend that a setting stands for.

    Args:
        name: A backend's name, or `"auto"`.
        parameters: What is to be normalized.

    Returns:
        The backend's name, and why it was selected.

    Raises:
        SettingError: If there is no such backend, or the Triton kernels were requested and fail their trial.
        MissingExtraError: If the requested backend's dependency is missing, or cannot be used here.

    Example:
        >>> print(select("foreach", []))
        foreach (as asked)
    """
    if name == "auto":
        return _best_for(list(parameters))
    if name not in BACKENDS:
        raise SettingError(
            "backend", got=repr(name), allowed=quoted(["auto", *BACKENDS]), advice='"auto" picks the best one available'
        )
    problem = _problem_with(name)
    if problem is not None:
        extra, library = _NEEDS[name]
        raise MissingExtraError(
            f'backend="{name}"',
            got=f"a Python in which {library} cannot be used ({problem})",
            allowed=f'{library}, or backend="foreach", which needs PyTorch alone',
            advice=f"pip install 'tamegrad[{extra}]'",
        ) from problem
    parameters = list(parameters)
    failure = _failed_trial(parameters) if name == "gpu" else None
    if failure is not None:
        raise SettingError(
            'backend="gpu"',
            got=f"Triton kernels that failed their trial: {failure}",
            allowed="a GPU for which Triton, which needs a C compiler, makes kernels that give right numbers",
            advice='pass backend="foreach", which needs PyTorch alone, or backend="auto"',
        )
    return SelectedBackend(name, f"as asked{_without_float64(parameters) if name == 'foreach' else ''}")


def _best_for(parameters: list[Tensor]) -> SelectedBackend:
    devices = sorted({str(parameter.device) for parameter in parameters})
    what = "the only parameter is" if len(parameters) == 1 else f"the {len(parameters)} parameters are"
    where = f"{what} on {', '.join(devices) or 'no device'}"
    if parameters and all(parameter.device.type == "cuda" for parameter in parameters):
        if not AUTO_TAKES_TRITON:
            return SelectedBackend("foreach", f"{where}, and no run on a GPU has confirmed the Triton kernels yet")
        failure = _problem_with("gpu") or _failed_trial(parameters)
        if failure is None:
            return SelectedBackend("gpu", where)
        return SelectedBackend("foreach", f"{where}, but the Triton kernels cannot be used: {failure}")
    if devices != ["cpu"]:
        return SelectedBackend("foreach", where + _without_float64(parameters))
    where = "the only parameter is" if len(parameters) == 1 else f"all {len(parameters)} parameters are"
    problem = _problem_with("cpu")
    if problem is not None:
        why = f"Numba cannot be used: {problem}; pip install 'tamegrad[cpu]'"
        return SelectedBackend("foreach", f"{where} on the CPU, but {why}")
    return SelectedBackend("cpu", f"{where} on the CPU")


def _failed_trial(parameters: Iterable[Tensor]) -> str | None:
    """Returns why the Triton kernels failed their trial on a GPU that holds parameters, or None if they passed it."""
    problem_on: Callable[[torch.device], str | None] = import_module(f"{_module('gpu')}.trial").problem_on
    devices = dict.fromkeys(parameter.device for parameter in parameters if parameter.device.type == "cuda")
    return next((f"{problem} (on {device})" for device in devices if (problem := problem_on(device))), None)


def _without_float64(parameters: Iterable[Tensor]) -> str:
    """Returns what there is to say about devices without float64."""
    devices = sorted({str(one.device) for one in parameters if not has_float64(one.device)})
    return f"; there is no float64 on {', '.join(devices)}: norms are right to 1e-6" if devices else ""


def _problem_with(name: str) -> ImportError | None:
    """Returns why a backend cannot be imported, or None if it can."""
    try:
        import_module(_module(name))
    except ImportError as error:
        return error
    return None
