"""Stepping inside backward gives the same bits as normalizing after backward and stepping then."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from support.transformer import Gpt, batches, equal_parameters, trained
from tamegrad import Clip, ClipValue, GradientNormalization, Keep, Policy, Renormalize, Strategy
from tamegrad.study.text import read_text
from tamegrad.torch import StepInBackward, attach

TEXT = inspect.getsource(inspect).encode()
DATA = batches(TEXT, 3)


@dataclass(frozen=True)
class Soften(Strategy):
    threshold: float
    per: Any = "layer"

    def target(self, norms: Any, xp: ModuleType) -> Any:
        return self.threshold * xp.tanh(norms / self.threshold)


def both_ways(
    make_model: Callable[[], Any], make_optimizer: Any, policy: Any, data: Any = DATA, **settings: Any
) -> tuple[Any, Any]:
    """Trains one model in each way, and returns the reports after comparing losses, parameters and states."""
    after, inside = make_model(), make_model()
    optimizer = make_optimizer(list(after.parameters()))
    normalizer = attach(after, optimizer, policy, **settings)
    stepper = StepInBackward(inside, make_optimizer, policy, **settings)

    def step_after() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def step_inside() -> None:
        assert all(parameter.grad is None for parameter in inside.parameters())
        stepper.step()
        stepper.zero_grad()

    assert trained(after, step_after, data) == trained(inside, step_inside, data)
    assert equal_parameters(after, inside)
    assert equal_states(optimizer.state_dict(), stepper.state_dict())
    assert stepper.steps == normalizer.steps == len(data)
    return normalizer.report, stepper.report


def equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return bool(one.keys() == other.keys()) and all(equal_states(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_states, one, other))
    return bool(one == other)


WORKING = [
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]
# These need parameters of one kind, or a closure; they have tests of their own.
SPECIAL = ["LBFGS", "Muon", "SparseAdam"]


def test_every_optimizer_of_torch_has_a_test() -> None:
    classes = [name for name, of in vars(torch.optim).items() if isinstance(of, type)]
    assert set(classes) - {"Optimizer"} <= {*WORKING, *SPECIAL}


@pytest.mark.parametrize("name", [name for name in WORKING if hasattr(torch.optim, name)])
def test_optimizers(name: str) -> None:
    both_ways(Gpt, lambda params: getattr(torch.optim, name)(params, lr=0.01), Clip(0.1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("AdamW", {"amsgrad": True, "foreach": True}),
        ("AdamW", {"fused": True}),
        ("AdamW", {"maximize": True, "foreach": False}),
    ],
)
def test_options(name: str, options: Any) -> None:
    both_ways(Gpt, lambda params: getattr(torch.optim, name)(params, lr=0.01, **options), Clip(0.1))


class Matrices(nn.Module):
    """Layers of one matrix each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(17, 17, bias=False) for _ in range(3)))

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(tokens / 100)
        return out.square().mean()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has none")
def test_muon() -> None:
    both_ways(Matrices, lambda params: torch.optim.Muon(params, lr=0.01), Clip(0.1))


class Bag(nn.Module):
    """A sparse embedding; without `only`, followed by a dense layer."""

    def __init__(self, *, only: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, 5, sparse=True)
        self.head: nn.Module = nn.Identity() if only else nn.Linear(5, 1)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(tokens))
        return out.square().sum()


@pytest.mark.parametrize(
    ("name", "only"), [("SparseAdam", True), ("SGD", False), ("Adagrad", False)], ids=["SparseAdam", "SGD", "Adagrad"]
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of Adagrad
def test_sparse_gradients(name: str, *, only: bool) -> None:
    report, inside = both_ways(
        lambda: Bag(only=only), lambda params: getattr(torch.optim, name)(params, lr=0.01), Clip(0.1)
    )
    assert report.clipped.all()
    assert str(report) == str(inside)


@pytest.mark.parametrize(
    "policy",
    [
        Clip(0.1),
        Clip(0.02, per="param_type"),
        Clip(0.02, per="tensor"),
        ClipValue(0.001),
        Renormalize(),
        Renormalize(per="param_type"),
        Keep(),
        Soften(0.1),
        Soften(0.1, per="tensor"),
        GradientNormalization.CLIP_L2_PER_LAYER,
        Policy(Clip(0.1), {nn.LayerNorm: None, "*/bias": ClipValue(0.001), "blocks.1.*": Renormalize(per="tensor")}),
    ],
    ids=str,
)
def test_strategies(policy: Any) -> None:
    report, inside = both_ways(Gpt, lambda params: torch.optim.AdamW(params, lr=0.01), policy, DATA[:2])
    assert report.groups == inside.groups
    for column in ("norms", "scales", "norms_after", "clipped", "nonfinite"):
        assert torch.equal(getattr(report, column), getattr(inside, column)), column
    assert report.total_norm.item() == pytest.approx(inside.total_norm.item(), rel=1e-15)


@pytest.mark.parametrize("layers", [["blocks.*"], ["blocks"], ["embedding", "blocks.0"], [""]], ids=str)
def test_merged_layers(layers: list[str]) -> None:
    report, inside = both_ways(Gpt, lambda params: torch.optim.AdamW(params, lr=0.01), Clip(0.1), layers=layers)
    assert str(report) == str(inside)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shares_block", [False, True])
@pytest.mark.parametrize("reentrant", [None, False])
def test_tied_weights_shared_modules_and_checkpoints(*, tied: bool, shares_block: bool, reentrant: Any) -> None:
    def make() -> Gpt:
        return Gpt(3, tied=tied, shares_block=shares_block, reentrant=reentrant)

    both_ways(make, lambda params: torch.optim.AdamW(params, lr=0.01), Clip(0.1))


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "skip_group"])
def test_non_finite_gradients(on_nonfinite: Any) -> None:
    class Broken(Gpt):
        def loss(self, tokens: torch.Tensor) -> Any:
            weight: Any = self.norm.weight
            weight.register_hook(lambda gradient: gradient * torch.nan)
            return super().loss(tokens)

    report, inside = both_ways(
        Broken, lambda params: torch.optim.Adam(params, lr=0.01), Clip(0.1), DATA[:1], on_nonfinite=on_nonfinite
    )
    assert report["norm"].nonfinite == 16
    assert str(report) == str(inside)


def test_the_plain_backend() -> None:
    policy = Policy(Clip(0.1), {"blocks.1.*": ClipValue(0.001)})
    both_ways(Gpt, lambda params: torch.optim.AdamW(params, lr=0.01), policy, backend="foreach")


def decaying(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Weight decay for matrices only, as most training scripts have it."""
    matrices = [parameter for parameter in params if parameter.ndim > 1]
    others = [parameter for parameter in params if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01
    )


def test_groups_with_options_of_their_own() -> None:
    both_ways(Gpt, decaying, Clip(0.1))


def test_a_gpt_on_real_text_ends_at_the_same_bits() -> None:
    data = batches(read_text(None).data[:100_000], 20)
    both_ways(lambda: Gpt(3, 32, tied=True), decaying, Clip(0.1), data)
