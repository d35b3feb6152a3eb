"""Deeplearning4j's training runs, reproduced with `torch.nn`, `torch.optim` and `attach`."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.dl4j import Array, Arrays, Run, load, relative_error, training_runs
from support.dl4j_torch import Order, build, parameters_of, set_parameters, to_torch
from tamegrad.torch import attach

STEPS = 20
CHECKED_AFTER = (1, 5, 20)

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "Sgd(learningRate=0.3, learningRateSchedule=null)": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "Nesterovs(learningRate=0.1, learningRateSchedule=null, momentum=0.9, momentumISchedule=null, "
    "momentumSchedule=null)": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    # An epsilon of 1e-30 makes no difference, wherever it is added.
    "RmsProp(learningRate=0.01, learningRateSchedule=null, rmsDecay=0.95, epsilon=1.0E-30)": lambda parameters: (
        torch.optim.RMSprop(parameters, lr=0.01, alpha=0.95, eps=1e-30)
    ),
    "Adam(learningRate=0.01, learningRateSchedule=null, beta1=0.9, beta2=0.999, epsilon=1.0E-30)": lambda parameters: (
        torch.optim.Adam(parameters, lr=0.01, betas=(0.9, 0.999), eps=1e-30)
    ),
}


def oscillates(run: Run) -> bool:
    """Returns whether a run amplifies rounding: renormalized steps never shrink, so momentum makes it oscillate.

    Only the dense network gets that far within 20 steps.
    """
    return run.network == "dense" and run.id.startswith("Nesterovs/Renormalize")


def tolerance(run: Run, step: int) -> float | None:
    """Returns the allowed error of parameters after a step and of losses up to it; None if rounding decides them.

    It is relative to the largest value of an array: near zero, a parameter is the difference of larger numbers. The
    worst of all runs is 1.7e-6 up to step 5 and 4e-6 at step 20 in float32 (losses: 3e-5), 5e-15 and 1.5e-13 in
    float64, and 2.5e-10 if a run oscillates.
    """
    if step <= 5:
        return {"float32": 1e-5, "float64": 1e-12}[run.dtype]
    if oscillates(run):
        return {"float32": None, "float64": 1e-6}[run.dtype]
    return {"float32": 3e-4, "float64": 1e-11}[run.dtype]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Threads only wait for each other on matrices this small.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("run", training_runs(), ids=lambda run: run.label)
def test_run_matches_deeplearning4j(run: Run) -> None:
    model = build(run.layers, run.dtype)
    set_parameters(model, run.layers, run.arrays("start"))
    features, labels = (to_torch(load(run.file)[name], Order.SAME) for name in ("features0", "labels"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[run.updater](trained)
    attach(model, optimizer, run.default.as_strategy, overrides=run.overrides)

    losses = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = _loss(run.network, model, features, labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        optimizer.step()
        losses.append(loss.item())
        if step in CHECKED_AFTER:
            assert_parameters_agree(run, step, parameters_of(model, run.layers))
    assert_losses_agree(run, losses)


def _loss(network: str, model: nn.ModuleDict, features: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy, summed over classes and time steps, divided by the size of the batch."""
    if network == "dense":
        hidden = torch.tanh(model["second"](torch.tanh(model["first"](features))))
        scores = model["out"](hidden)
    else:
        hidden = features.transpose(1, 2)  # (batch, time, values)
        for layer in ("first", "second"):
            hidden, _ = model[layer](hidden)
        scores = model["out"](hidden).transpose(1, 2)
    return -(labels * torch.log_softmax(scores, dim=1)).sum() / len(features)


def assert_parameters_agree(run: Run, step: int, actual: Arrays) -> None:
    """Asserts that all parameters after a step match Deeplearning4j's, unless rounding decides them."""
    allowed = tolerance(run, step)
    if allowed is None:
        return
    for layer, arrays in run.after_step(step).items():
        for kind, expected in arrays.items():
            error = _distance(actual[layer][kind], expected)
            assert error <= allowed, f"{run.label}: {layer}/{kind} after step {step}: relative error {error:.3g}"


def assert_losses_agree(run: Run, actual: list[float]) -> None:
    """Asserts that the losses before each step match Deeplearning4j's, unless rounding decides them."""
    assert len(actual) == len(run.score) == STEPS
    for step, (loss, expected) in enumerate(zip(actual, run.score, strict=True)):
        allowed, error = tolerance(run, step), relative_error(np.array(loss), expected)
        assert allowed is None or error <= allowed, f"{run.label}: loss after step {step}: relative error {error:.3g}"


def test_only_runs_decided_by_rounding_are_left_out() -> None:
    """Two float32 runs after step 5, where Deeplearning4j's own float32 and float64 runs have diverged too."""
    twins = {(run.network, run.id): run for run in training_runs() if run.dtype == "float64"}
    left_out = {(run.label, step) for run in training_runs() for step in CHECKED_AFTER if tolerance(run, step) is None}
    rules = ("RenormalizeL2PerLayer", "RenormalizeL2PerParamType")
    assert left_out == {(f"dense-f32-Nesterovs/{rule}", 20) for rule in rules}
    for run in training_runs():
        if run.dtype == "float32" and tolerance(run, STEPS) is None:
            twin = twins[run.network, run.id]
            assert _apart(run, twin, 5) < 1e-5
            assert _apart(run, twin, 20) > 3e-4


def _apart(first: Run, second: Run, step: int) -> float:
    """Returns the distance between two runs after a step."""
    theirs = second.after_step(step)
    ours = first.after_step(step)
    return max(
        _distance(ours[layer][kind], array) for layer, arrays in theirs.items() for kind, array in arrays.items()
    )


def _distance(actual: Array, expected: Array) -> float:
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    return float(error / np.abs(expected.astype(np.float64)).max())
