"""Collects the gradients of a step as plain tensors that a backend can read and write in place, each once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tamegrad.errors import SettingError
from tamegrad.torch.kernels.memory import DTYPES, Located, Memory, holds_lazy, is_lazy, locate
from tamegrad.torch.partial import settled
from tamegrad.torch.sharding import local_part, mesh_of, with_local_part

__all__ = ["DTYPES", "Collector", "Gradients", "collect"]


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of one step.

    Args:
        values: One a parameter of the plan, dense, in one of `DTYPES`: the gradient itself, the values of a sparse one,
            what this process has of a sharded one, or a copy of what cannot be read or written in place. None where
            there is no gradient, or it came before.
        copies: For each position in `values` that holds a copy: what the gradient becomes if the values change, and
            the parameters whose gradient it is.
    """

    values: list[Tensor | None]
    copies: dict[int, tuple[Tensor, list[nn.Parameter]]] = field(default_factory=dict)

    def write_back(self, changed: Sequence[bool]) -> None:
        """Gives the parameters the copies that were changed; `changed` has one entry a parameter of the plan."""
        for position, (gradient, parameters) in self.copies.items():
            if changed[position]:
                for parameter in parameters:
                    parameter.grad = gradient if mesh_of(parameter) is None else with_local_part(parameter, gradient)


class Collector:
    """Collects the gradients of one plan, step after step.

    It keeps no gradient. Nor does it remember what gradients were like: `zero_grad` mostly makes every gradient a new
    tensor, so asking has to be fast anyway, and what is asked anew cannot be out of date.

    Args:
        parameters: The parameters in the order of the plan.
        names: Their names, for messages.
        located: Whether to find out where in memory the gradients are, for a backend that works on addresses.

    Attributes:
        objects: `(P,)`: the `id` of each parameter, for compiled code that walks over them; None where that cannot be
            done.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Iterable[str], *, located: bool) -> None:
        self._parameters = tuple(parameters)
        self._names = tuple(names)
        self._located = located
        self.objects: NDArray[np.int64] | None = None
        if located and not any(map(_hides_gradient, parameters)):
            self.objects = np.array([id(parameter) for parameter in parameters], dtype=np.int64)

    def collect(self) -> Gradients:
        """Collects the gradients that the parameters have now.

        Returns:
            The gradients.

        Raises:
            SettingError: If a gradient is of a kind that cannot be normalized; nothing was changed.
        """
        plain = self._collect_plain(self.objects) if self.objects is not None else None
        if plain is not None:
            return Gradients(plain)
        collected = collect(self._parameters, self._names)
        if not self._located:
            return collected
        values = Located(collected.values)
        values.memory = locate(values)
        return Gradients(values, collected.copies)

    def _collect_plain(self, parameters: NDArray[np.int64]) -> Located | None:
        """Returns the gradients if all are plain tensors on the CPU that share no memory, which one look can tell."""
        # Numba takes a while to import, and another backend does not need it.
        from tamegrad.torch.kernels import objects  # noqa: PLC0415

        values, table = Located([None] * len(parameters)), np.empty((len(parameters), 3), dtype=np.int64)
        if not objects.AVAILABLE:
            return None
        plain, some_may_be_lazy = objects.gather(parameters, values, table)
        if not plain or (some_may_be_lazy and holds_lazy(values, table)):
            return None
        values.memory = Memory(table)
        return values


def collect(parameters: Sequence[nn.Parameter], names: Iterable[str]) -> Gradients:
    """Collects the gradients that parameters have now.

    A gradient that two parameters share, as one tensor or as the same memory, is collected for the first alone. Of a
    sharded one the part of this process is collected.

    Args:
        parameters: The parameters in the order of the plan.
        names: Their names, for messages.

    Returns:
        The gradients.

    Raises:
        SettingError: If a gradient is of a kind that cannot be normalized; nothing was changed.
    """
    names = tuple(names)
    collected = Gradients([None] * len(parameters))
    parts, moved = _local_parts(parameters, names)
    seen: dict[tuple[int, int], int] = {}
    for position, (parameter, gradient) in enumerate(zip(parameters, parts, strict=True)):
        if gradient is None:
            continue
        _check(names[position], gradient)
        memory = gradient._values() if gradient.is_sparse else gradient  # noqa: SLF001  whether coalesced or not
        first = seen.setdefault((memory.data_ptr(), memory.numel()), position) if memory.numel() else position
        if first != position:
            if first in collected.copies:
                collected.copies[first][1].append(parameter)
        elif gradient.is_sparse and gradient.is_coalesced():
            collected.values[position] = memory
        elif gradient.is_sparse:
            merged = gradient.coalesce()
            collected.values[position] = merged.values()
            collected.copies[position] = merged, [parameter]
        elif is_lazy(gradient) or _overlaps_itself(gradient):
            dense = gradient.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            collected.values[position] = dense
            collected.copies[position] = dense, [parameter]
        else:
            collected.values[position] = gradient
            if position in moved:
                collected.copies[position] = gradient, [parameter]
    return collected


def _local_parts(parameters: Sequence[nn.Parameter], names: Sequence[str]) -> tuple[list[Tensor | None], set[int]]:
    """Returns the gradients, or what this process has of them, and where that is no part of the gradient itself."""
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    unlike: dict[int, Any] = {}
    for position, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        mesh = None if gradient is None else mesh_of(gradient)
        if gradient is None or mesh is mesh_of(parameter) is None:
            continue
        _check_mesh(names[position], parameter, mesh)
        if gradient.placements == parameter.placements:  # type: ignore[attr-defined]  # a DTensor
            gradients[position] = local_part(gradient)
        else:
            unlike[position] = gradient
    if unlike:
        for position, gradient in settled(unlike, {position: parameters[position] for position in unlike}).items():
            gradients[position] = local_part(gradient)
    return gradients, set(unlike)


def _hides_gradient(parameter: nn.Parameter) -> bool:
    """Says whether what `parameter.grad` gives is not simply what autograd keeps: parts, or what a subclass makes."""
    kind: Any = type(parameter)
    own = kind.grad is Tensor.grad and kind.__getattribute__ is object.__getattribute__
    return not own or mesh_of(parameter) is not None


def _overlaps_itself(gradient: Tensor) -> bool:
    """Says whether two indices may name one place in memory, as in an expanded tensor, which no one can write to."""
    if gradient.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(gradient.shape, gradient.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_mesh(name: str, parameter: nn.Parameter, mesh: object) -> None:
    home = mesh_of(parameter)
    if mesh == home:
        return
    kinds = ["a plain tensor" if of is None else f"sharded over {of}" for of in (mesh, home)]
    raise SettingError(
        f"gradient of {name}",
        got=f"a gradient that is {kinds[0]} of a parameter that is {kinds[1]}",
        allowed="a gradient on the mesh of its parameter",
        advice="leave it to backward() to make the gradients",
    )


def _check(name: str, gradient: Tensor) -> None:
    if gradient.layout not in {torch.strided, torch.sparse_coo}:
        kind = f"a gradient in the layout {gradient.layout}"
    elif gradient.dtype not in DTYPES:
        kind = f"a gradient of {gradient.dtype}"
    else:
        return
    raise SettingError(
        f"gradient of {name}",
        got=kind,
        allowed=f"dense and sparse COO gradients of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}",
        advice="leave this parameter out: parameters=[...], or give it an optimizer of its own",
    )
