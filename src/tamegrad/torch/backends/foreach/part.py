"""The gradients on one device in one step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.torch.gradients import Gradients

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some gradients on one device, none of them empty, in the order of their groups.

    Args:
        device: The device.
        values: The gradients.
        groups: `(N,)`: the group of each.
        dtypes: `(N,)`: their positions in `DTYPES`.
        counts: `(N,)`: how many values each has.
    """

    device: torch.device
    values: Sequence[Tensor]
    groups: NDArray[np.int64]
    dtypes: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def key(self) -> tuple[bytes, ...]:
        """What a layout of these gradients follows from."""
        return self.groups.tobytes(), self.dtypes.tobytes(), self.counts.tobytes()


def parts_of(
    gradients: Gradients, chosen: NDArray[np.bool_], group_of: NDArray[np.int64], in_order: NDArray[np.int64]
) -> Iterator[Part]:
    """Returns the chosen gradients, device by device.

    Args:
        gradients: The gradients.
        chosen: `(P,)`: whether each is wanted.
        group_of: `(P,)`: the group of each.
        in_order: `(P,)`: the positions of gradients in the order of their groups.
    """
    memory = gradients.memory
    positions = in_order[(chosen & (memory.dtypes >= 0) & (memory.counts > 0))[in_order]]
    values = [tensor for tensor in map(gradients.values.__getitem__, positions.tolist()) if tensor is not None]
    devices = [tensor.device for tensor in values]
    for device in dict.fromkeys(devices):
        here = np.arange(len(values))
        if devices.count(device) < len(devices):
            here = np.flatnonzero([other == device for other in devices])
        at = positions[here]
        yield Part(device, [values[i] for i in here.tolist()], group_of[at], memory.dtypes[at], memory.counts[at])
