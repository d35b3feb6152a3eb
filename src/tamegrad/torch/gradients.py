"""Collects the gradients of a step as plain tensors that a backend can read and write in place, each once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tamegrad.errors import SettingError

__all__ = ["DTYPES", "Gradients", "collect"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of one step.

    Args:
        values: One a parameter of the plan, dense, in one of `DTYPES`: the gradient itself, the values of a sparse one,
            or a copy of what cannot be read or written in place. None where there is no gradient, or it came before.
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
                    parameter.grad = gradient


def collect(parameters: Sequence[nn.Parameter], names: Iterable[str]) -> Gradients:
    """Collects the gradients that parameters have now.

    A gradient that two parameters share, as one tensor or as the same memory, is collected for the first alone.

    Args:
        parameters: The parameters in the order of the plan.
        names: Their names, for messages.

    Returns:
        The gradients.

    Raises:
        SettingError: If a gradient is of a kind that cannot be normalized; nothing was changed.
    """
    collected = Gradients([])
    seen: dict[tuple[int, int], int] = {}
    for parameter, name in zip(parameters, names, strict=True):
        gradient = parameter.grad
        position = len(collected.values)
        collected.values.append(None)
        if gradient is None:
            continue
        _check(name, gradient)
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
        elif gradient.is_conj() or gradient.is_neg() or _overlaps_itself(gradient):
            dense = gradient.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
            collected.values[position] = dense
            collected.copies[position] = dense, [parameter]
        else:
            collected.values[position] = gradient
    return collected


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


def _check(name: str, gradient: Tensor) -> None:
    # A sharded gradient (DTensor) knows its mesh; its local part alone has the wrong norm.
    if hasattr(gradient, "device_mesh"):
        kind = "a gradient that is sharded over a device mesh"
    elif gradient.layout not in {torch.strided, torch.sparse_coo}:
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
