"""Ways of stepping: scalers, fused optimizers, accumulation, subclasses, closures, schedulers, copies."""

import copy
import datetime as dt
import io
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tamegrad import (
    Clip,
    ClipValue,
    Keep,
    NonFiniteGradientError,
    Renormalize,
    SettingError,
    TamegradWarning,
    normalize,
)
from tamegrad.torch import attach, normalize_grad_

LARGE = 50.0
STRATEGIES = [Clip(0.5), ClipValue(0.05), Renormalize(), Clip(0.5, per="model")]
OPTIMIZERS: dict[str, Any] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
}
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "for loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def a_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (model(torch.randn(8, 3, generator=generator)) * LARGE).square().mean()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(ours: nn.Module, theirs: nn.Module, rtol: float = 0.0) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=0.0)


def stepped_by_hand(strategy: Any, make: Any, steps: int = 1) -> nn.Module:
    """Returns a model trained with gradients that the reference normalized."""
    model: nn.Module = a_model()
    optimizer = make(model.parameters())
    for step in range(steps):
        model.zero_grad()
        loss_of(model, seed=step).backward()
        arrays = {
            name: {
                kind: parameter.grad.numpy()
                for kind, parameter in layer.named_parameters()
                if parameter.grad is not None
            }
            for name, layer in model.named_children()
            if list(layer.parameters())
        }
        after, _ = normalize(arrays, strategy)
        for name, layer in model.named_children():
            for kind, parameter in layer.named_parameters():
                parameter.grad = torch.from_numpy(np.asarray(after[name][kind]))
        optimizer.step()
    return model


class TestGradScaler:
    """The optimizer sees what the reference returns for the gradients without the loss scale."""

    @pytest.mark.parametrize("unscales", [False, True])
    @pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_step(self, name: str, implementation: str, strategy: Any, *, unscales: bool) -> None:
        def make(parameters: Iterator[nn.Parameter]) -> Any:
            return OPTIMIZERS[name](parameters, lr=0.1, **IMPLEMENTATIONS[implementation])

        model = a_model()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        normalizer = attach(model, optimizer, strategy)
        norms = []
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed=step)).backward()
            if unscales:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert normalizer.report is not None
            norms.append(normalizer.report.total_norm.item())
        assert_same(model, stepped_by_hand(strategy, make, steps=3), rtol=1e-4)
        plain = a_model()
        loss_of(plain, seed=0).backward()
        assert norms[0] == pytest.approx(normalize_grad_(plain, Keep()).total_norm.item(), rel=1e-6)
        assert not hasattr(optimizer, "grad_scale")

    @pytest.mark.parametrize("loss_scale", [2.0**-10, 1.0, 1024.0])
    @pytest.mark.parametrize("strategy", [Clip(2.0), ClipValue(2.0), Clip(0.5), ClipValue(0.5), Renormalize()], ids=str)
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_the_report_does_not_depend_on_the_loss_scale(
        self, implementation: str, strategy: Any, loss_scale: float
    ) -> None:
        model = nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **IMPLEMENTATIONS[implementation])
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=loss_scale)
        normalizer = attach(model, optimizer, strategy)
        scaler.scale((model.weight * torch.tensor([0.5, -0.75, 1.0])).sum()).backward()
        scaler.step(optimizer)
        arrays = {"(root)": {"weight": np.array([0.5, -0.75, 1.0], np.float32)}}
        _, expected = normalize(arrays, strategy)
        assert normalizer.report is not None
        row, right = normalizer.report["(root)"], expected["(root)"]
        assert (row.clipped, row.nonfinite) == (right.clipped, right.nonfinite)
        assert (row.norm, row.scale, row.norm_after) == pytest.approx((right.norm, right.scale, right.norm_after))

    @pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "skip", "raise"])
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_step_that_the_scaler_skips(self, implementation: str, on_nonfinite: Any) -> None:
        model = a_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, **IMPLEMENTATIONS[implementation])  # type: ignore[arg-type]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        attach(model, optimizer, Clip(0.5), on_nonfinite=on_nonfinite)
        loss = scaler.scale(loss_of(model))
        loss.backward()
        model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert_same(model, a_model())
        assert scaler.get_scale() == 512.0
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        assert not torch.equal(model[0].weight, a_model()[0].weight)

    def test_an_error_leaves_no_scale_behind(self) -> None:
        model = a_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        attach(model, optimizer, Clip(0.5), on_nonfinite="raise")
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        # Infinite only after the scaler has checked: it does not skip this step.
        model[0].weight.grad[0, 0] = math.inf
        with pytest.raises(NonFiniteGradientError):
            scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        assert not torch.equal(model[0].weight, a_model()[0].weight)


def test_accumulated_gradients_are_normalized_only_at_the_step() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, Clip(0.5, per="model"))
    expected = a_model()
    for seed in range(3):
        loss_of(model, seed).backward()
        loss_of(expected, seed).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(expected), strict=True))
    optimizer.step()
    norm = normalize_grad_(expected, Clip(0.5, per="model"))
    assert norm["model"].clipped
    torch.testing.assert_close(gradients(model), gradients(expected))


class Decaying(torch.optim.SGD):
    """A subclass that changes the gradients itself and leaves the rest to its base."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.add_(parameter, alpha=100.0)
        return super().step(closure)


class Failing(torch.optim.SGD):
    """A subclass that raises in the middle of a step when told to."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("use_closure", [False, True])
def test_a_subclass_that_calls_its_base_is_normalized_once(*, use_closure: bool) -> None:
    model = a_model()
    torch.optim.SGD(model.parameters(), lr=0.1)  # once the base class has an instance, its step calls hooks too
    optimizer = Decaying(model.parameters(), lr=0.1)
    attach(model, optimizer, Clip(0.5, per="model"), normalize="outermost")
    loss_of(model).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if use_closure:
        optimizer.step(lambda: loss_of(model))
    else:
        optimizer.step()
    if not use_closure:
        total = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients(model)))
        assert total > 10 * 0.5, "the decay added after normalizing was clipped"
    assert not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("on_nonfinite", ["keep", "skip"])
def test_steps_after_one_that_raised_are_normalized(on_nonfinite: Any) -> None:
    model = a_model()
    torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Failing(model.parameters(), lr=0.1)
    normalizer = attach(model, optimizer, Clip(0.5), on_nonfinite=on_nonfinite)
    loss_of(model).backward()
    model[0].bias.grad[0] = math.nan
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fails = False
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    assert normalizer.report is not None
    assert normalizer.report["0"].nonfinite == 0
    assert normalizer.report["0"].norm > normalizer.report["0"].norm_after == 0.5
    assert normalizer.nonfinite_steps == {"0": 1}


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_every_evaluation_of_lbfgs_sees_normalized_gradients(search: str | None) -> None:
    model = a_model()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search)
    reports = []
    normalizer = attach(model, optimizer, Renormalize(per="model"))
    by_hand = normalizer._normalizer
    before = by_hand._normalize

    def counted(*args: Any, **kwargs: Any) -> Any:
        reports.append(before(*args, **kwargs))
        return reports[-1]

    by_hand._normalize = counted  # type: ignore[method-assign]
    evaluations = 0

    def closure() -> Any:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert evaluations > 1
    assert len(reports) == evaluations
    total = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients(model)))
    assert total == pytest.approx(1.0)


def test_learning_rate_schedulers_keep_working() -> None:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    normalizer = attach(model, optimizer, Renormalize(per="model"))
    moved = []
    for _ in range(3):
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        scheduler.step()
        moved.append(
            (torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before).norm().item()
        )
    assert moved == pytest.approx([1.0, 0.5, 0.25], rel=1e-4)
    assert normalizer.report is not None


def test_a_compiled_model_has_the_names_of_the_model() -> None:
    model = a_model()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    normalizer = attach(compiled, optimizer, Clip(0.5), overrides={"2": None})
    loss_of(compiled).backward()
    optimizer.step()
    assert normalizer.report is not None
    assert normalizer.report.groups == ("0", "2")
    assert normalizer.report.clipped.tolist() == [True, False]


def test_copies_of_an_optimizer_and_of_its_state_are_not_attached() -> None:
    model = a_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    attach(model, optimizer, Clip(1e-6))
    loss_of(model).backward()
    optimizer.step()
    unhooked: Any = torch.optim.Adam(a_model().parameters(), lr=0.1)
    unhooked.load_state_dict(optimizer.state_dict())
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), unhooked):  # noqa: S301  our own bytes
        for parameter in other.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        other.step()
        assert all(parameter.grad.eq(1).all() for parameter in other.param_groups[0]["params"])


class TestNeverSilent:
    """It never does nothing, or the same thing twice, without a warning or an error."""

    def test_a_step_without_any_gradient(self) -> None:
        model = a_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(model, optimizer, Clip(0.5))
        with pytest.warns(TamegradWarning, match="^nothing to normalize: none of 4 parameters has a gradient"):
            optimizer.step()
        optimizer.step()

    def test_a_parameter_that_no_layer_owns(self) -> None:
        model, other = a_model(), nn.Linear(2, 2)
        optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
        with pytest.warns(TamegradWarning, match="^2 of the optimizer's 6 parameters belong to no layer of the model"):
            normalizer = attach(model, optimizer, Clip(0.5))
        loss_of(model).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        normalizer.detach()

    def test_a_second_attach(self) -> None:
        model = a_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = attach(model, optimizer, Clip(0.5))
        with pytest.raises(SettingError, match=r"^attach\(optimizer\): got a SGD that has a normalizer already; .*det"):
            attach(model, optimizer, Clip(0.5))
        first.detach()
        attach(model, optimizer, Clip(0.5))

    def test_a_layer_that_replaces_another_is_followed(self) -> None:
        model = a_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        normalizer = attach(model, optimizer, Clip(0.5))
        model[2] = nn.Linear(4, 2)
        loss_of(model).backward()
        with pytest.warns(TamegradWarning, match="^2 of the optimizer's 4 parameters belong to no layer"):
            optimizer.step()
        optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.step()
        assert normalizer.report is not None
        assert normalizer.report.groups == ("0", "2")

    def test_an_added_parameter_group_is_followed(self) -> None:
        model = a_model()
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        normalizer = attach(model, optimizer, Clip(0.5), overrides={"2": Clip(0.25)})
        optimizer.add_param_group({"params": model[2].parameters()})
        loss_of(model).backward()
        optimizer.step()
        assert normalizer.report is not None
        assert normalizer.report.norms_after.tolist() == [0.5, 0.25]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of only this process."""
    timeout = dt.timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1, timeout=timeout
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("buckets", [False, True])
def test_a_data_parallel_model_has_the_names_and_the_steps_of_the_model(*, buckets: bool) -> None:
    model, plain = a_model(), a_model()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=buckets)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (parallel, plain))
    normalizer = attach(parallel, optimizer, Clip(0.5), overrides={"2": Renormalize()})
    attach(plain, other, Clip(0.5), overrides={"2": Renormalize()})
    for step in range(3):
        for m, o in ((parallel, optimizer), (plain, other)):
            o.zero_grad()
            loss_of(m, seed=step).backward()
            o.step()
    assert normalizer.report is not None
    assert normalizer.report.groups == ("0", "2")
    assert_same(model, plain, rtol=1e-6)
