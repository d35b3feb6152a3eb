"""Modules that are not quite PyTorch's: TorchScript, older signatures, modules without shapes."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tamegrad import Clip, Policy
from tamegrad.torch import GradientNormalizer, attach
from tamegrad.torch.model.layers import find_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
    # nn.MultiheadAttention asks for shapes while it is traced.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 3, num_layers=2)
        self.norm = nn.LayerNorm(3)
        self.cell = nn.GRUCell(3, 3)
        self.attention = nn.MultiheadAttention(3, 1)
        self.many = nn.ParameterList([torch.ones(1), torch.ones(1)])
        self.again = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(x)
        x = self.again(self.norm(x))
        x, _ = self.attention(x, x, x)
        scaled: Tensor = 100 * self.cell(x[0]) * self.many[0] + self.many[1]
        return scaled


INPUTS = torch.ones(4, 1, 2)


def loaded(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)  # type: ignore[no-untyped-call]


class Part(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = torch.jit.script(part)

    def forward(self, x: Tensor) -> Any:
        return self.part(x)


COMPILED: dict[str, Callable[[nn.Module], Any]] = {
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, INPUTS),  # type: ignore[no-untyped-call]
    "loaded": loaded,
}


@pytest.mark.parametrize("compiled", COMPILED)
def test_a_torchscript_model_has_the_layers_of_the_model_it_was_made_from(compiled: str) -> None:
    model = Everything()
    found, expected = find_layers(COMPILED[compiled](model)), find_layers(model)
    assert [(layer.name, layer.types, layer.owner) for layer in found.layers] == [
        (layer.name, layer.types, layer.owner) for layer in expected.layers
    ]
    policy = Policy(Clip(1.0), {nn.LayerNorm: None, nn.LSTM: Clip(2.0)})
    plan = GradientNormalizer(COMPILED[compiled](model), policy).plan
    assert plan.groups == GradientNormalizer(model, policy).plan.groups


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
@pytest.mark.parametrize("compiled", [*COMPILED, "part"])
def test_a_torchscript_model_is_normalized_step_by_step(compiled: str, backend: Any) -> None:
    torch.manual_seed(0)
    model: Any = {**COMPILED, "part": Part}[compiled](Everything())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    normalizer = attach(model, optimizer, Clip(1e-3, per="tensor"), backend=backend)
    plan = normalizer.plan
    for _ in range(3):
        optimizer.zero_grad()
        model(INPUTS).square().sum().backward()
        optimizer.step()
        norms = [float(parameter.grad.norm()) for parameter in model.parameters()]
        assert max(norms) == pytest.approx(1e-3)
        assert normalizer.report is not None
        assert sum(norm == pytest.approx(1e-3) for norm in norms) == int(normalizer.report.clipped.sum()) > 10
    # A plan that is made anew in each step would be slow.
    assert normalizer.plan is plan


class OldSignature(nn.Linear):
    """As modules written for PyTorch 1 have it."""

    def named_parameters(  # type: ignore[override]
        self,
        prefix: str = "",
        recurse: bool = True,  # noqa: FBT001, FBT002
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from nn.Module.named_parameters(self, prefix=prefix, recurse=recurse)


class Hides(nn.Module):
    """A fused table is updated in its own backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 3))
        self.scale = nn.Parameter(torch.ones(3))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, own) for name, own in super().named_parameters(*args, **kwargs) if not name.endswith("table"))


def test_a_module_with_the_signature_of_pytorch_1_is_read() -> None:
    model = nn.Sequential(OldSignature(3, 3), nn.Linear(3, 2))
    assert [layer.types for layer in find_layers(model).layers] == [("weight", "bias")] * 2


def test_a_parameter_that_its_module_hides_is_left_as_it_is() -> None:
    model = nn.Sequential(Hides(), nn.Linear(3, 2))
    normalizer = GradientNormalizer(model, Clip(1.0))
    for module in model:
        for parameter in module._parameters.values():
            assert parameter is not None
            parameter.grad = torch.full_like(parameter, 3.0)
    normalizer.normalize_()
    assert model[0].table.grad.eq(3.0).all()  # type: ignore[union-attr, operator]
    assert [layer.types for layer in normalizer.plan.layers] == [("scale",), ("weight", "bias")]


def test_a_method_of_one_module_may_hide_parameters() -> None:
    model = nn.Linear(3, 2)
    model.named_parameters = lambda *_, **__: iter([("bias", model.bias)])  # type: ignore[method-assign]
    assert [layer.types for layer in find_layers(model).layers] == [("bias",)]


def test_a_lazy_module_gets_its_shape_while_a_normalizer_is_attached() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normalizer = attach(model, optimizer, Clip(1e-3))
    model(torch.ones(4, 5)).square().sum().backward()
    optimizer.step()
    assert normalizer.report is not None
    assert normalizer.report.norms_after.tolist() == pytest.approx([1e-3] * 2)


def test_tables_with_empty_entries_are_read() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model.register_module("nothing", None)
    normalizer = GradientNormalizer(model, Clip(1.0))
    assert [layer.types for layer in normalizer.plan.layers] == [("weight",), ("weight", "bias")]
    model.nothing = nn.Linear(1, 1)
    with pytest.warns(UserWarning, match="nothing to normalize"):
        assert normalizer.normalize_().groups == ("0", "1", "nothing")
