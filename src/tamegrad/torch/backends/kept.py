"""What follows from the sizes and dtypes of a step's gradients, and is kept on their device for the next steps."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from tamegrad.errors import SettingError

__all__ = ["Kept", "is_capturing", "refuse_capture", "uploaded"]

# How many sets of gradients are remembered: a mixture of experts gives gradients to other experts in every step.
SETS = 16

ValueT = TypeVar("ValueT")


class Kept(Generic[ValueT]):
    """Values made of tensors on a device, one for each set of gradients and each stream that uses it.

    A value is used only on the stream that uploaded it, so no step reads a table before it is there, or after its
    memory is taken for something else. In a CUDA graph, which replays on any stream, those of other streams will do,
    and are kept as long as this object. A copy of this object (`copy.deepcopy`, pickle) starts empty.
    """

    def __init__(self) -> None:
        self._sets: OrderedDict[tuple[Any, ...], dict[int, ValueT]] = OrderedDict()
        self._captured: list[ValueT] = []

    def __getstate__(self) -> dict[str, Any]:
        # Pinned memory does not stay pinned in a copy, and a captured graph goes on reading the original's tables.
        return {"_sets": OrderedDict(), "_captured": []}

    def get(self, device: torch.device, key: tuple[Any, ...], make: Callable[[], ValueT]) -> ValueT:
        """Returns the value of a set of gradients, which is made if it is not there.

        Args:
            device: Where its tensors are.
            key: What it follows from.
            make: Makes it.

        Raises:
            SettingError: If it is not there while a CUDA graph is captured.
        """
        by_stream = self._sets.get((device, *key), {})
        if is_capturing():
            if not by_stream:
                refuse_capture("a step with gradients of other shapes or dtypes" if self._sets else "the first step")
            value = next(reversed(by_stream.values()))
            if not any(value is held for held in self._captured):
                self._captured.append(value)
            return value
        stream = _stream_on(device)
        if stream not in by_stream:
            by_stream = {**by_stream, stream: make()}
        self._sets[device, *key] = by_stream
        self._sets.move_to_end((device, *key))
        while len(self._sets) > SETS:
            self._sets.popitem(last=False)
        return by_stream[stream]


def is_capturing() -> bool:
    """Returns whether a CUDA graph is being captured on the current stream."""
    # PyTorch without CUDA raises when asked for the stream.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # PyTorch has no type there
    return initialized and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str) -> None:
    """Refuses, while a CUDA graph is captured, what needs tables that are not on the device yet.

    Args:
        what: What was tried, for the message.

    Raises:
        SettingError: If a graph is being captured.
    """
    if is_capturing():
        raise SettingError(
            "normalize_()",
            got=f"{what}, while a CUDA graph is captured",
            allowed="a capture after a step outside of it, with gradients of the same shapes and dtypes",
            advice="run a few steps before the capture, as torch.cuda.graph asks for anyway",
        )


def uploaded(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copies an array to a device, from pinned memory where there is some; then the host does not wait."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _stream_on(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
