"""Steps after the first: whatever changes between them is noticed, and nothing is kept that could be stale."""

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.contract import QUICK_BACKENDS
from support.gradients import model_with, random_gradients
from tamegrad import Clip, NonFiniteGradientError
from tamegrad.torch import GradientNormalizer, attach


@pytest.fixture(params=QUICK_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("position", [0, 600, 1200])
def test_a_gradient_of_another_kind_than_in_the_last_step(position: int, backend: Any) -> None:
    model = model_with(random_gradients((300, 100, 7) * 400 + (65_537,), torch.float32))
    parameters = list(model.parameters())
    normalizer = GradientNormalizer(model, Clip(1e9, per="tensor"), backend=backend)
    changed = parameters[position]
    usual = changed.grad
    unlike: list[Tensor | None] = [
        torch.ones(changed.shape),
        None,
        torch.ones(changed.shape, dtype=torch.float64),
        torch.ones(changed.shape).to_sparse(),
        torch.ones(1).expand(changed.shape),
        torch.ones(2, *changed.shape).movedim(0, -1)[..., 0],
    ]
    if hasattr(changed, "grad_dtype"):
        changed.grad_dtype = None
    else:
        unlike.pop(2)
    for gradient in unlike:
        changed.grad = usual
        before = normalizer.normalize_().norms
        changed.grad = gradient
        after = normalizer.normalize_().norms
        assert after[position].item() == (0.0 if gradient is None else math.sqrt(changed.numel()))
        others = torch.arange(len(parameters)) != position
        assert torch.equal(before[others], after[others])


LAZY: dict[str, Callable[[], Tensor]] = {
    "conjugate": lambda: torch.tensor([3.0 + 4.0j]).conj(),
    "negative": lambda: torch.tensor([3.0 + 4.0j]).conj().imag,
    "negative conjugate": lambda: torch._neg_view(torch.tensor([3.0 + 4.0j]).conj()),
}


@pytest.mark.parametrize("lazy", LAZY)
def test_a_lazily_conjugated_or_negated_gradient(lazy: str, backend: Any) -> None:
    model = model_with([LAZY[lazy]().resolve_conj().resolve_neg()])
    normalizer = GradientNormalizer(model, Clip(1.0), backend=backend)
    normalizer.normalize_()
    wanted = model.p0.grad.clone()
    model.p0.grad = LAZY[lazy]()
    normalizer.normalize_()
    assert model.p0.grad.is_conj() == model.p0.grad.is_neg() is False
    assert torch.equal(model.p0.grad, wanted)


def test_memory_that_is_shared_from_the_second_step_on_is_changed_once(backend: Any) -> None:
    model = model_with([torch.ones(4), torch.ones(4)])
    normalizer = GradientNormalizer(model, Clip(1.0, per="model"), backend=backend)
    normalizer.normalize_()
    model.p0.grad = torch.full((4,), 2.0)
    model.p1.grad = model.p0.grad.view(2, 2).view(4)
    assert normalizer.normalize_().total_norm.item() == 4.0
    assert model.p1.grad.tolist() == [0.5] * 4


def test_a_model_that_changed(backend: Any) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    for layer in model:
        layer.weight.grad = torch.ones(2, 2)
    normalizer = GradientNormalizer(model, Clip(1.0), backend=backend)
    normalizer.normalize_()
    model[1] = nn.Linear(2, 2, bias=False)
    model[1].weight.grad = torch.full((2, 2), 4.0)
    assert normalizer.normalize_().norms.tolist() == [1.0, 8.0, 1.0]
    model[2].register_parameter("scale", nn.Parameter(torch.zeros(1)))
    model[2].scale.grad = torch.tensor([5.0])
    assert normalizer.normalize_()["2"].norm == math.sqrt(26)
    assert normalizer.normalize_().norms.tolist() == pytest.approx([1.0, 1.0, 1.0])


def replace_tables(layer: nn.Module, other: nn.Module) -> None:
    layer.__dict__["_parameters"] = other._parameters


def update_state(layer: nn.Module, other: nn.Module) -> None:
    layer.__dict__.update(other.__dict__)


def set_state(layer: Any, other: nn.Module) -> None:
    layer.__setstate__(dict(other.__dict__))


@pytest.mark.parametrize("change", [replace_tables, update_state, set_state])
def test_a_module_whose_tables_were_replaced(change: Callable[[nn.Module, nn.Module], None], backend: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    normalizer = GradientNormalizer(model, Clip(1.0, per="tensor"), backend=backend)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        normalizer.normalize_()
    change(model[1], nn.Linear(6, 4))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    normalizer.normalize_()
    assert [gradient.norm().item() for parameter in model.parameters() if (gradient := parameter.grad) is not None] == (
        pytest.approx([1.0] * 4)
    )


def test_tables_that_are_no_dictionaries(backend: Any) -> None:
    # Dictionaries of their own that users and libraries put in place of the usual ones.
    kind: Any = type("OwnDictionary", (dict,), {})
    model: Any = nn.Linear(6, 4)
    model.__dict__["_parameters"] = kind(model._parameters)
    normalizer = GradientNormalizer(model, Clip(1.0), backend=backend)
    model.bias = nn.Parameter(torch.zeros(7))
    model.bias.grad = torch.full((7,), 3.0)
    assert normalizer.normalize_().total_norm.item() == pytest.approx(3 * math.sqrt(7))


def test_a_parameter_group_that_was_added_to_the_optimizer(backend: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    for layer in model:
        layer.weight.grad = torch.ones(2, 2)
    normalizer = attach(model, optimizer, Clip(1.0), backend=backend)
    optimizer.step()
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.step()
    assert normalizer.report is not None
    assert normalizer.report.norms.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "skip", "raise"])
def test_a_group_that_is_not_finite_from_the_second_step_on(on_nonfinite: Any, backend: Any) -> None:
    model = model_with([torch.ones(4), torch.ones(4)])
    normalizer = GradientNormalizer(model, Clip(1.0, per="tensor"), on_nonfinite=on_nonfinite, backend=backend)
    normalizer.normalize_()
    model.p0.grad, model.p1.grad = torch.tensor([1.0, math.nan, math.inf, 1.0]), torch.ones(4)
    if on_nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError, match="p0"):
            normalizer.normalize_()
    else:
        assert normalizer.normalize_().nonfinite.tolist() == [2, 0]
    assert normalizer.nonfinite_steps == {"p0": 1}
    assert normalizer.skipped_steps == (on_nonfinite == "skip")
    assert model.p0.grad.isnan().any() == (on_nonfinite != "zero")
    assert model.p1.grad.tolist() == [1.0 if on_nonfinite in {"skip", "raise"} else 0.5] * 4


def test_a_parameter_that_makes_its_gradient_itself_is_asked(backend: Any) -> None:
    kind: Any = type("OwnGradient", (nn.Parameter,), {"grad": property(lambda _: torch.full((4,), 2.0))})
    normalizer = GradientNormalizer([("p", kind(torch.zeros(4)))], Clip(1e9), backend=backend)
    assert [normalizer.normalize_().total_norm.item() for _ in range(2)] == [4.0, 4.0]


def test_no_gradient_is_kept_alive_or_released(backend: Any) -> None:
    model = model_with([torch.ones(1000), torch.ones(20, 10)[:, ::2], torch.ones(7)])
    for strided in (True, False):
        normalizer = GradientNormalizer(model, Clip(1.0), backend=backend)
        counts = [sys.getrefcount(parameter.grad) for parameter in model.parameters()]
        for _ in range(5):
            normalizer.normalize_()
        assert [sys.getrefcount(parameter.grad) for parameter in model.parameters()] == counts
        if strided:
            model.p1.grad = torch.ones(20, 5)
    references = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    assert [reference() for reference in references] == [None] * 3
