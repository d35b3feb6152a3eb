"""The hostile inputs: gradients that real training produces and that clipping often gets wrong."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["INPUTS", "Gradients", "Input"]

# Layer name to parameter name to gradient; None if there is no gradient.
Gradients: TypeAlias = dict[str, dict[str, Tensor | None]]


@dataclass(frozen=True)
class Input:
    """One row of the table.

    Args:
        name: What is hostile about it.
        threshold: The threshold of every tool.
        make: Makes the gradients, the same in every call.
        needs: What a framework must have for this input: `"sparse"` gradients, `"views"` of other tensors, or a
            gradient that two parameters share `"in place"`.
    """

    name: str
    threshold: float
    make: Callable[[], Gradients]
    needs: str | None = None


def _pattern(*shape: int, size: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns values of mixed signs whose magnitudes are between half of `size` and `size`."""
    factors = torch.tensor([1.0, -0.5, 0.75, -0.875], dtype=torch.float64)
    count = math.prod(shape)
    return (factors.repeat(-(-count // 4))[:count] * size).to(dtype).reshape(shape)


def _layers(size: float, dtype: torch.dtype = torch.float32) -> Callable[[], Gradients]:
    """Two layers with values of the same magnitude."""
    return lambda: {
        "first": {"weight": _pattern(4, 3, size=size, dtype=dtype), "bias": _pattern(4, size=size, dtype=dtype)},
        "second": {"weight": _pattern(2, 4, size=size, dtype=dtype), "bias": _pattern(2, size=size, dtype=dtype)},
    }


def _one(make: Callable[[], Tensor | None]) -> Callable[[], Gradients]:
    """One layer with one parameter."""
    return lambda: {"only": {"weight": make()}}


def _equal(count: int, value: float, dtype: torch.dtype) -> Callable[[], Gradients]:
    return _one(lambda: torch.full((count,), value, dtype=dtype))


def _with(bad: float) -> Callable[[], Gradients]:
    """One bad value in the first of two layers."""
    return lambda: {
        "first": {"weight": torch.tensor([[bad, 3.0], [4.0, -2.0]]), "bias": torch.tensor([2.0, -3.0])},
        "second": {"weight": torch.tensor([[30.0, -40.0]]), "bias": torch.tensor([12.0])},
    }


def _mixed() -> Gradients:
    return {"only": {"weight": torch.tensor([[1e30, -1e-30], [-3e30, 2e-30]]), "bias": torch.tensor([1e-30, 2e30])}}


def _many() -> Gradients:
    return {f"block{index}": {"weight": _pattern(64, 64, size=0.02, dtype=torch.bfloat16)} for index in range(300)}


def _sparse() -> Gradients:
    rows = torch.tensor([[1, 7, 1]])  # not coalesced: row 1 appears twice
    values = torch.tensor([[3.0, -4.0], [6.0, 8.0], [1.0, 1.0]])
    embedding = torch.sparse_coo_tensor(rows, values, (10, 2), check_invariants=True)
    return {"embedding": {"weight": embedding}, "out": {"weight": torch.tensor([[30.0, -40.0]])}}


def _complex() -> Tensor:
    return torch.tensor([3.0 + 4.0j, -6.0 + 8.0j, 5.0j, 12.0 - 5.0j], dtype=torch.complex64)


def _shared() -> Gradients:
    gradient = torch.tensor([3.0, -4.0])
    return {"first": {"weight": gradient}, "second": {"weight": gradient}}


def _zero_size() -> Gradients:
    return {"empty": {"weight": torch.zeros(0, 3)}, "full": {"weight": torch.tensor([3.0, -4.0])}}


INPUTS = (
    Input("ordinary float32, over threshold 1", 1.0, _layers(3.0)),
    Input("ordinary float32, under threshold 100", 100.0, _layers(3.0)),
    Input("float32, values of 1e25, over threshold 1", 1.0, _layers(1e25)),
    Input("float32, values of 1e25, under threshold 1e30", 1e30, _layers(1e25)),
    Input("float32, values of 1e-25, over threshold 1e-30", 1e-30, _layers(1e-25)),
    Input("float32, values of 1e-40, under threshold 1", 1.0, _layers(1e-40)),
    Input("float32, 1e30 and 1e-30 in one layer, over threshold 1e25", 1e25, _mixed),
    Input("float16, 200,000 values of 300, over threshold 1", 1.0, _equal(200_000, 300.0, torch.float16)),
    Input("float16, norm 447, over threshold 1", 1.0, _equal(2_000, 10.0, torch.float16)),
    Input("bfloat16, 300 layers of 64 x 64, over threshold 0.5", 0.5, _many),
    Input("norm 5e-7, under threshold 1e-6", 1e-6, _one(lambda: torch.tensor([3e-7, -4e-7]))),
    Input("norm 2e-6, over threshold 1e-6", 1e-6, _one(lambda: torch.tensor([1.2e-6, -1.6e-6]))),
    Input("float32, 10 million values of 0.3, over threshold 0.1", 0.1, _equal(10_000_000, 0.3, torch.float32)),
    Input("float64, values of 1e200, over threshold 1", 1.0, _layers(1e200, torch.float64)),
    Input("float64, values of 1e-200, over threshold 1e-205", 1e-205, _layers(1e-200, torch.float64)),
    Input("one NaN in one of two layers", 1.0, _with(math.nan)),
    Input("one +inf in one of two layers", 1.0, _with(math.inf)),
    Input("norm 5, exactly at threshold 5", 5.0, _one(lambda: torch.tensor([3.0, -4.0]))),
    Input("sparse gradient of an embedding", 1.0, _sparse, needs="sparse"),
    Input("complex gradient", 1.0, _one(_complex)),
    Input("expanded gradient (stride 0)", 1.0, _one(lambda: torch.tensor(3.0).expand(2, 4)), needs="views"),
    Input("two parameters share one gradient tensor", 1.0, _shared, needs="in place"),
    Input("no gradient at all", 1.0, _one(lambda: None)),
    Input("a parameter of size zero", 1.0, _zero_size),
    Input("threshold -1", -1.0, _layers(3.0)),
    Input("threshold NaN", math.nan, _layers(3.0)),
)
