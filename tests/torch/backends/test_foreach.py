"""The plain backend: multi-tensor operations, bounded temporaries, exact where they are not."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from support.gradients import model_with, random_gradients
from tamegrad import Clip, ClipValue, Keep, Policy, Renormalize
from tamegrad.torch import GradientNormalizer, normalize_grad_
from tamegrad.torch.backends import tensorwise
from tamegrad.torch.memory import DTYPES

PIECE = 2**12
LENGTHS = (0, 1, 63, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 7)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorwise, "HOST_PIECE", PIECE)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no types there
    """Remembers the largest result of an operation, and counts the operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append(str(func))
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        if not is_view and isinstance(result, Tensor):
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", [Clip(1.0), Clip(1.0, per="tensor"), ClipValue(0.5), Renormalize()], ids=str)
def test_pieces_give_what_whole_tensors_give(
    strategy: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces, whole = (model_with(random_gradients(LENGTHS, dtype)) for _ in range(2))
    report = normalize_grad_(in_pieces, strategy, backend="foreach")
    monkeypatch.setattr(tensorwise, "HOST_PIECE", 2**40)
    expected = normalize_grad_(whole, strategy, backend="foreach")
    torch.testing.assert_close(report.norms, expected.norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(report.norms_after, expected.norms_after, rtol=1e-13, atol=0)
    for parameter, other in zip(in_pieces.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=16 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("strategy", [Clip(1.0), ClipValue(0.5), Renormalize(per="model")], ids=str)
def test_temporaries_are_bounded(strategy: Any, dtype: torch.dtype) -> None:
    model = model_with(random_gradients((40 * PIECE, 7, 30 * PIECE), dtype))
    normalizer = GradientNormalizer(model, strategy, backend="foreach")
    with Allocations() as allocations:
        assert normalizer.normalize_().clipped.all()
    # Float64 values of one piece, whatever the size of the tensor.
    assert allocations.largest <= 8 * PIECE


def test_temporaries_would_be_seen() -> None:
    with Allocations() as allocations:
        torch.ones(1000, dtype=torch.float64) * 2
    assert allocations.largest == 8000


def test_the_same_gradients_give_the_same_bits() -> None:
    model = model_with(random_gradients((300, 7, PIECE + 5) * 40, torch.float32))
    normalizer = GradientNormalizer(model, Clip(1e9, per="model"), backend="foreach")
    first, *others = (normalizer.normalize_().norms for _ in range(3))
    assert all(map(first.equal, others))


def test_the_tensors_of_a_dtype_share_an_operation() -> None:
    gradients = [*random_gradients((5,) * 200, torch.float32), *random_gradients((5,) * 200, torch.bfloat16)]
    normalizer = GradientNormalizer(model_with(gradients), Clip(1e-3), backend="foreach")
    with Allocations() as allocations:
        normalizer.normalize_()
    counted = Counter(name for name in allocations.operations if "_foreach" in name)
    # Each goes through the buffer to be measured, and again and back to be changed.
    assert counted == {"aten._foreach_copy_.default": 6, "aten._foreach_mul_.List": 2}


def test_groups_whose_members_are_not_next_to_each_other() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(place + 1))
    policy = Policy(Clip(1e9, per="model"), {"*/bias": Clip(1e9, per="model")})
    report = GradientNormalizer(model, policy, backend="foreach").normalize_()
    assert report.groups == ("model", "*/bias")
    assert report.norms.tolist() == pytest.approx([math.sqrt(4 * (1 + 9 + 25)), math.sqrt(2 * (4 + 16 + 36))])


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
@pytest.mark.parametrize("threshold", [1e-300, 1e-45, 1e-38, 1e38, 1e300])
def test_scales_outside_of_the_range_of_float32(threshold: float, magnitude: float) -> None:
    gradient = torch.tensor([3.0, 4.0, 0.0]) * magnitude
    wide = gradient.double()
    report = normalize_grad_(model_with([gradient]), Clip(threshold), backend="foreach")
    scale = min(1.0, threshold / wide.norm().item())
    assert report.scales.item() == pytest.approx(scale, rel=1e-14)
    torch.testing.assert_close(gradient, (wide * scale).float(), rtol=2e-7, atol=2e-45)


def test_no_group_is_written_that_keeps_its_values() -> None:
    model = model_with([torch.tensor([0.3, 0.4]), torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]).double()])
    versions = [parameter.grad._version for parameter in model.parameters()]
    normalize_grad_(model, Clip(1.0, per="tensor"), backend="foreach")
    changed = [
        parameter.grad._version > version for parameter, version in zip(model.parameters(), versions, strict=True)
    ]
    assert changed == [False, True, False]


def test_nothing_to_measure() -> None:
    model = model_with([torch.ones(0), torch.ones(0, 3, dtype=torch.float64)])
    assert normalize_grad_(model, Keep(), backend="foreach").norms.tolist() == [0.0]
