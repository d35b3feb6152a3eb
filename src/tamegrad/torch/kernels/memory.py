"""Where the gradients of a step are in memory, for backends that work on addresses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DTYPES", "Located", "Memory", "is_dense", "locate"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


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
    """The gradients of a step and where they are; None if one of them is not on the CPU."""

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
