"""Compares the gradients that an optimizer's update finds with those of the reference."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tamegrad import Clip, normalize

# Far below the norms of these models, so that every step changes every layer.
POLICY = Clip(0.01, per="layer")
# Float32 keeps seven digits; the norm and the scale are computed in float64 on both sides.
TOLERANCE = 1e-6

Gradients = dict[str, NDArray[Any]]


def a_model(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))


def a_batch() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def loss_of(model: Callable[..., Any]) -> Any:
    return (50 * model(a_batch())).square().mean()


def by_reference(gradients: Gradients, policy: object = POLICY) -> Gradients:
    """Normalizes gradients as tamegrad defines it, each module's parameters as one layer."""
    layers: dict[str, dict[str, NDArray[Any]]] = {}
    for name, gradient in gradients.items():
        layer, _, param_type = name.rpartition(".")
        layers.setdefault(layer, {})[param_type] = gradient
    after, _ = normalize(layers, policy)
    return {
        f"{layer}.{param_type}" if layer else param_type: array
        for layer, types_ in after.items()
        for param_type, array in types_.items()
    }


class Recorder:
    """Keeps the gradients of every step of an optimizer: those that backward made, and those that the update found.

    Made after `attach`, so that its hook runs after that of tamegrad.

    Args:
        parameters: The parameters and their names in the plan, such as `0.weight`.
        optimizer: The optimizer whose update counts: the inner one.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> None:
        self._parameters = dict(parameters)
        self._raw: Gradients = {}
        self.steps: list[tuple[Gradients, Gradients]] = []
        optimizer.register_step_pre_hook(self._before_step)

    def backward_is_done(self) -> None:
        """Called by a test after every backward pass, inside its closure if it has one."""
        self._raw = self._gradients()

    def check(self, steps: int, policy: object = POLICY) -> None:
        """Asserts that so many updates found the gradients of the reference, and not those that backward made."""
        assert len(self.steps) == steps
        for raw, found in self.steps:
            assert raw
            expected = by_reference(raw, policy)
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                np.testing.assert_allclose(gradient, expected[name], rtol=TOLERANCE, atol=1e-12, err_msg=name)
            assert any(not np.array_equal(raw[name], found[name]) for name in raw)

    def _before_step(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.steps.append((self._raw, self._gradients()))
            return None

        def recorded() -> object:
            loss = closure()
            self.steps.append((self._raw, self._gradients()))
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": recorded}
        return (args[0], recorded, *args[2:]), kwargs

    def _gradients(self) -> Gradients:
        return {
            name: parameter.grad.detach().numpy().copy()
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }


def step_by_hand(model: nn.Module, optimizer: Any, recorder: Recorder, *, closure: bool = False) -> None:
    """Takes a step as a training loop does, with or without a closure."""

    def evaluate() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        recorder.backward_is_done()
        return loss

    if closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


def timm_optim() -> Any:
    """Imports timm's optimizers without its vision models, which need torchvision. Each call makes new classes."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    package.__path__ = list(spec.submodule_search_locations)
    vars(models)["group_parameters"] = None  # only layer-wise learning rates use it
    sys.modules |= {"timm": package, "timm.models": models}
    try:
        return importlib.import_module("timm.optim")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]


def optimizer_classes(members: Mapping[str, Any]) -> dict[str, Any]:
    """Every optimizer among a library's members, found rather than listed, so that a new one is tested at once."""
    return {
        name: member
        for name, member in sorted(members.items())
        if isinstance(member, type)
        and issubclass(member, torch.optim.Optimizer)
        and not member.__module__.startswith("torch.")
    }
