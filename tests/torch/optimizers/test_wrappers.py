"""Which optimizer `attach` attaches to, and what it says where it cannot."""

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import optim as distributed_optim

from support.processes import run_python
from support.training import a_model, backward
from tamegrad import Clip, SettingError
from tamegrad.torch import attach
from tamegrad.torch.optimizers.wrappers import _REFUSED, _TRANSPARENT


def norms(model: nn.Module) -> list[float]:
    groups = [[p.grad for p in layer.parameters() if p.grad is not None] for layer in model.children()]
    return [torch.cat([gradient.flatten() for gradient in group]).norm().item() for group in groups]


def sgd(model: nn.Module, lr: float = 1e-9) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def a_class(path: str, *bases: type) -> Any:
    """Makes a class that has the path of one in a library that is not installed."""
    module, _, name = path.rpartition(".")
    return type(name, bases or (object,), {"__module__": module, "__qualname__": name})


class Wrapper(torch.optim.Optimizer):
    """As many libraries write it: `Optimizer.__init__` is never called."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class WrapperWithTables(Wrapper):
    """Has the tables of hooks, as PyTorch 2 asked for, but never calls them."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self._optimizer_step_pre_hooks: Any = OrderedDict()
        self._optimizer_step_post_hooks: Any = OrderedDict()


class Around(torch.optim.Optimizer):
    """Runs hooks, and steps another optimizer for the same parameters."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def second_step(self) -> None:
        self.inner.step()


@pytest.mark.parametrize("path", _TRANSPARENT)
def test_attaches_to_the_optimizer_inside_a_wrapper(path: str) -> None:
    model = a_model()
    inner = sgd(model)
    # Lightning and Fabric make a class of their own for each optimizer.
    wrapper = type("Wrapped", (a_class(path),), {})()
    setattr(wrapper, _TRANSPARENT[path], inner)
    normalizer = attach(model, wrapper, Clip(1.0))
    for again in (wrapper, inner):
        with pytest.raises(SettingError, match="got a SGD that has a normalizer already"):
            attach(model, again, Clip(1.0))
    backward(model)
    inner.step()
    assert norms(model) == pytest.approx([1.0, 1.0])
    assert normalizer.steps == 1
    normalizer.detach()
    attach(model, inner, Clip(1.0)).detach()


def test_attaches_through_several_wrappers() -> None:
    model = a_model()
    outer: Any = a_class("accelerate.optimizer.AcceleratedOptimizer")()
    outer.optimizer = a_class("lightning.fabric.wrappers._FabricOptimizer")()
    outer.optimizer.optimizer = sgd(model)
    assert "attached to SGD" in repr(attach(model, outer, Clip(1.0)))


def test_attaches_to_the_optimizer_inside_post_local_sgd() -> None:
    model = a_model()
    averager = SimpleNamespace(step=0, average_parameters=lambda **_: None)
    optimizer: Any = distributed_optim.PostLocalSGDOptimizer(sgd(model), averager)  # type: ignore[arg-type]
    attach(model, optimizer, Clip(1.0))
    backward(model)
    optimizer.step()
    assert norms(model) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("path", _REFUSED)
def test_refuses_classes_that_no_normalizer_can_work_with(path: str) -> None:
    # Some of them derive from a wrapper that is attached to otherwise.
    optimizer = a_class(path, a_class("accelerate.optimizer.AcceleratedOptimizer"))()
    optimizer.optimizer = sgd(a_model())
    with pytest.raises(SettingError, match=f"got a {path.rpartition('.')[2]}, .*; next: (set|choose)"):
        attach(a_model(), optimizer, Clip(1.0))


def test_the_advice_names_the_path_from_what_the_user_has() -> None:
    outer: Any = a_class("accelerate.optimizer.AcceleratedOptimizer")()
    outer.optimizer = Wrapper(sgd(a_model()))
    with pytest.raises(SettingError, match=r"next: attach to optimizer\.optimizer\.inner, the SGD that it wraps"):
        attach(a_model(), outer, Clip(1.0))


@pytest.mark.parametrize("wrap", [Wrapper, WrapperWithTables])
def test_refuses_a_wrapper_that_bypasses_hooks_and_names_the_optimizer_inside(wrap: Any) -> None:
    model = a_model()
    wrapper = wrap(sgd(model))
    with pytest.raises(SettingError, match=r"next: attach to optimizer\.inner, the SGD that it wraps"):
        attach(model, wrapper, Clip(1.0))
    attach(model, wrapper.inner, Clip(1.0))
    backward(model)
    wrapper.step()
    assert norms(model) == pytest.approx([1.0, 1.0])


def test_names_the_optimizer_inside_a_wrapper_that_is_no_optimizer() -> None:
    model = a_model()
    with pytest.raises(SettingError, match=r"got a SimpleNamespace; .* attach to optimizer\.base, the SGD"):
        attach(model, SimpleNamespace(base=sgd(model)), Clip(1.0))  # type: ignore[arg-type]


def test_names_all_optimizers_inside_a_wrapper_of_several() -> None:
    model = a_model()
    both = SimpleNamespace(parts={"first": sgd(model[0]), "second": sgd(model[1])})
    with pytest.raises(
        SettingError, match=r"attach\(model, \[optimizer.parts\['first'\], optimizer.parts\['second'\]\]"
    ):
        attach(model, both, Clip(1.0))  # type: ignore[arg-type]


def test_refuses_an_optimizer_that_never_called_its_base_and_wraps_nothing() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            self.param_groups = [{"params": list(parameters)}]

    model = a_model()
    with pytest.raises(SettingError, match=r"call super\(\).__init__\(params, defaults\) in Bare.__init__"):
        attach(model, Bare(model.parameters()), Clip(1.0))


@pytest.mark.parametrize("steps", ["step", "second_step"])
def test_attaches_to_an_optimizer_and_the_one_inside_it(steps: str) -> None:
    model = a_model()
    optimizer = Around(sgd(model))
    normalizer = attach(model, optimizer, Clip(1.0))
    with pytest.raises(SettingError, match="has a normalizer already"):
        attach(model, optimizer.inner, Clip(1.0))
    for _ in range(3):
        model.zero_grad()
        backward(model)
        getattr(optimizer, steps)()
        assert norms(model) == pytest.approx([1.0, 1.0])
    assert normalizer.steps == 3
    normalizer.detach()
    attach(model, optimizer.inner, Clip(1.0))
    with pytest.raises(SettingError, match="has a normalizer already"):
        attach(model, optimizer, Clip(1.0))


def test_optimizers_that_hold_each_other_end_the_search() -> None:
    model = a_model()
    one, two = sgd(model), sgd(model)
    one.other, two.other = two, one  # type: ignore[attr-defined]
    attach(model, one, Clip(1.0))
    with pytest.raises(SettingError, match="has a normalizer already"):
        attach(model, two, Clip(1.0))


def test_an_optimizer_of_deepspeed_that_is_one_of_pytorch_is_attached_to() -> None:
    fused = a_class("deepspeed.ops.adam.fused_adam.FusedAdam", torch.optim.SGD)
    model = a_model()
    optimizer = fused(model.parameters(), lr=0.1)
    attach(model, optimizer, Clip(1.0))
    backward(model)
    optimizer.step()
    assert norms(model) == pytest.approx([1.0, 1.0])


def test_refuses_parameters_that_step_in_backward() -> None:
    model = a_model()
    apply: Any = distributed_optim._apply_optimizer_in_backward  # type: ignore[attr-defined]
    apply(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(SettingError, match="with an optimizer of their own, which steps during backward"):
        attach(model, sgd(model), Clip(1.0))


def test_whether_an_inherited_step_is_noticed_does_not_depend_on_the_past() -> None:
    code = """
import torch
from torch import nn
from tamegrad import Clip
from tamegrad.torch import attach

class Doubling(torch.optim.Adagrad):
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(2)
        return super().step()

model = nn.Linear(2, 2)
optimizer = Doubling(model.parameters())
normalizer = attach(model, optimizer, Clip(1.0), normalize="innermost")
model(torch.ones(3, 2)).square().sum().mul(100).backward()
optimizer.step()
print(normalizer.report.norms_after.tolist())
"""
    assert run_python(code).stdout.strip() == "[1.0]"
