"""Counts the launches of PyTorch's operations on an accelerator, and what makes the host wait for it.

Nothing is launched on the meta device, where this is used. What an operation launches there is read off PyTorch's
sources for CUDA 13: multi-tensor operations take so many tensors a launch, `cat` and `stack` 128.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The tensors that a launch takes, for one list and for two, and the blocks of 65,536 values.
ONE_LIST, TWO_LISTS, BLOCKS, BLOCK = 770, 448, 2240, 65_536
JOINED = 128
# Reads of the device: the host waits for all that was launched before.
READS = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "unique", "masked_select")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no types there
    """Lists operations by name, once a launch, and the operations that make the host wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        returns = func._schema.returns
        is_view = bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
        if name in READS or (name in {"_to_copy", "copy_"} and _crosses(name, args, result)):
            self.waits.append(name)
        if not is_view and not name.startswith("empty"):
            self.names += [name] * _launches(name, args)
        return result


def _launches(name: str, args: Sequence[Any]) -> int:
    if name in {"cat", "stack"}:
        return math.ceil(len(args[0]) / JOINED)
    if name == "_foreach_norm":
        # Then one that adds up what the blocks of each tensor found.
        return _in_lists(args[0], ONE_LIST) + math.ceil(len(args[0]) / ONE_LIST)
    if name == "_foreach_copy_":
        return _in_lists(args[0], TWO_LISTS)
    if name.startswith("_foreach"):
        same = len(args) < 2 or not isinstance(args[1], list) or all(map(_are_alike, args[0], args[1]))
        return _in_lists(args[0], TWO_LISTS) if same else len(args[0])
    # The sum of the sizes before each, and what it is for.
    return 2 if name == "repeat_interleave" else 1


def _in_lists(tensors: Sequence[Tensor], in_a_launch: int) -> int:
    blocks = sum(math.ceil(tensor.numel() / BLOCK) for tensor in tensors)
    return math.ceil(len(tensors) / in_a_launch) + blocks // BLOCKS


def _are_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _crosses(name: str, args: Sequence[Any], result: Tensor) -> bool:
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and source.device != result.device
