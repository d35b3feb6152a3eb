"""Where the gradients of a step are in memory, for backends that work on addresses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DTYPES", "Located", "Memory", "ModuleTables", "holds_lazy", "is_dense", "is_lazy", "locate"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class ModuleTables(NamedTuple):
    """The dictionaries of modules, in which they have their parameters and each other; all objects must be alive.

    Args:
        tables: `(T, 2)`: the `id` of each dictionary, and how many entries it has.
        entries: `(N, 2)`: the `id`s of all their keys and values.
    """

    tables: NDArray[np.int64]
    entries: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Where gradients are, as long as nothing but their values changes and they live.

    Args:
        table: `(P, 3)` int64, of each gradient the address, how many values, and the position of its dtype in `DTYPES`;
            -1 where there is no gradient.
        stand_ins: Copies that the table means, for gradients whose values are not side by side in memory.
    """

    table: NDArray[np.int64]
    stand_ins: dict[int, Tensor] = field(default_factory=dict)


class Located(list[Tensor | None]):
    """The gradients of a step and where they are; None if one of them is not on the CPU, or none will change."""

    memory: Memory | None = None


def locate(gradients: Sequence[Tensor | None]) -> Memory | None:
    """Finds gradients in memory.

    Args:
        gradients: Strided, in `DTYPES`, with nothing put off; None where there is none.

    Returns:
        Where they are, or None if one of them is not on the CPU.
    """
    memory = Memory(np.zeros((len(gradients), 3), dtype=np.int64))
    for position, gradient in enumerate(gradients):
        if gradient is None:
            memory.table[position, 2] = -1
            continue
        if gradient.device.type != "cpu":
            return None
        values = gradient
        if not is_dense(gradient):
            values = memory.stand_ins[position] = gradient.clone(memory_format=torch.contiguous_format)
        memory.table[position] = values.data_ptr(), values.numel(), DTYPES.index(values.dtype)
    return memory


def is_dense(gradient: Tensor) -> bool:
    """Says whether the values fill their memory, in whatever order the dimensions lie."""
    if gradient.is_contiguous():
        return True
    reached = 1
    for stride, size in sorted(zip(gradient.stride(), gradient.shape, strict=True)):
        if size > 1 and stride != reached:
            return False
        reached *= size
    return True


def is_lazy(gradient: Tensor) -> bool:
    """Says whether memory holds the conjugate or the negative of what a gradient means."""
    return gradient.is_neg() or gradient.is_conj()


def holds_lazy(gradients: Sequence[Tensor | None], table: NDArray[np.int64]) -> bool:
    """Says whether a gradient is lazy, of plain ones that fill memory of their own.

    Only those are asked that can be: complex ones and, since `x.conj().imag` is the only way to a real one and leaves
    gaps in memory, single values.

    Args:
        gradients: The gradients.
        table: Where they are, as in `Memory`.

    Returns:
        Whether one is.
    """
    candidates = np.flatnonzero((table[:, 1] == 1) | (table[:, 2] >= DTYPES.index(torch.complex64)))
    asked = (gradients[index] for index in candidates.tolist())
    return any(gradient is not None and is_lazy(gradient) for gradient in asked)
