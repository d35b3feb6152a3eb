"""The front doors for PyTorch against Deeplearning4j's results for the same gradients."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.dl4j import (
    DTYPES,
    GRADIENT_TOLERANCE,
    Case,
    assert_gradients_agree,
    gradient_cases,
    relative_error,
    same_bits,
)
from support.dl4j_edges import (
    ALIKE,
    UNLIKE,
    EdgeGroup,
    assert_as_deeplearning4j,
    assert_as_defined,
    assert_deeplearning4j_is_wrong_as_told,
    assert_finite_layers_are_renormalized,
    mixed,
)
from support.dl4j_torch import build, gradients_of, set_gradients
from tamegrad import GradientNormalization, GroupReport, Renormalize, Report
from tamegrad.torch import GradientNormalizer, attach, normalize_grad_


def _by_hand(case: Case, model: nn.ModuleDict) -> Report[Tensor]:
    return GradientNormalizer(model, case.policy).normalize_()


def _once(case: Case, model: nn.ModuleDict) -> Report[Tensor]:
    """As a Deeplearning4j user would write it: the name of the strategy, and a threshold."""
    return normalize_grad_(
        model,
        GradientNormalization(case.default.strategy),
        threshold=case.default.threshold,
        overrides=case.overrides,
    )


def _attached(case: Case, model: nn.ModuleDict) -> Report[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    normalizer = attach(model, optimizer, case.default.as_strategy, overrides=case.overrides)
    optimizer.step()
    assert normalizer.report is not None
    return normalizer.report


DOORS: dict[str, Callable[[Case, nn.ModuleDict], Report[Tensor]]] = {
    "GradientNormalizer": _by_hand,
    "normalize_grad_": _once,
    "attach": _attached,
}


def _loaded(case: Case) -> nn.ModuleDict:
    model = build(case.layers, case.dtype)
    set_gradients(model, case.layers, case.before)
    return model


# All doors in one test: collecting and reporting a case costs as much as checking it.
@pytest.mark.parametrize("case", gradient_cases(), ids=lambda case: case.label)
def test_gradients_match_deeplearning4j(case: Case) -> None:
    model = build(case.layers, case.dtype)
    for door, normalize_ in DOORS.items():
        set_gradients(model, case.layers, case.before)
        normalize_(case, model)
        assert_gradients_agree(case, door, gradients_of(model, case.layers))


@pytest.mark.parametrize("case", ALIKE, ids=lambda case: case.label)
@pytest.mark.parametrize("door", DOORS)
def test_edge_where_deeplearning4j_is_right(door: str, case: Case) -> None:
    model = _loaded(case)
    report = DOORS[door](case, model)
    after = gradients_of(model, case.layers)
    assert_as_deeplearning4j(case, after)
    assert_as_defined(case, after, lambda group: _row(report, group))


@pytest.mark.parametrize("case", UNLIKE, ids=lambda case: case.label)
@pytest.mark.parametrize("door", DOORS)
def test_edge_where_tamegrad_differs_on_purpose(door: str, case: Case) -> None:
    assert_deeplearning4j_is_wrong_as_told(case)
    model = _loaded(case)
    report = DOORS[door](case, model)
    after = gradients_of(model, case.layers)
    assert_as_defined(case, after, lambda group: _row(report, group))
    with pytest.raises(AssertionError):
        assert_as_deeplearning4j(case, after)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("fill", ["nan", "infinite"])
def test_a_nonfinite_layer_does_not_stop_others_from_being_normalized(fill: str, dtype: str) -> None:
    layers, before = ALIKE[0].layers, mixed(fill, dtype)
    model = build(layers, dtype)
    set_gradients(model, layers, before)
    report = normalize_grad_(model, Renormalize(per="layer"))
    assert_finite_layers_are_renormalized(before, gradients_of(model, layers))
    assert [row.nonfinite for row in report.rows()] == [1, 0, 0]


_LSTM = ("weight", "recurrent_weight", "bias")
_PLANS = {
    "dense": {"first": ("weight", "bias"), "second": ("weight", "bias"), "out": ("weight", "bias")},
    "lstm": {"first.l0": _LSTM, "second.l0": _LSTM, "out": ("weight", "bias")},
    "bidirectional": {
        "layer0.l0": (*_LSTM, *(f"reverse_{kind}" for kind in _LSTM)),
        "out": ("weight", "bias"),
    },
    "convolution": {
        "convolution": ("weight", "bias"),
        "normalization": ("gamma", "beta", "mean", "log10stdev"),
        "dense": ("weight", "bias"),
        "out": ("weight", "bias"),
    },
    "attention": {"attention": ("Wq", "Wk", "Wv", "Wo"), "out": ("weight", "bias")},
    "graph": dict.fromkeys(("left", "right", "joint", "out"), ("weight", "bias")),
}


@pytest.mark.parametrize("network", _PLANS)
def test_layers_and_parameter_types_match_deeplearning4j(network: str) -> None:
    case = next(case for case in gradient_cases() if case.network == network)
    plan = GradientNormalizer(build(case.layers, case.dtype), case.policy).plan
    assert {layer.name: layer.types for layer in plan.layers} == _PLANS[network]
    # One type for each of Deeplearning4j's parameters, though an LSTM's bias is two tensors here.
    assert [len(layer.types) for layer in plan.layers] == [len(layer.shapes) for layer in case.layers]


def test_an_lstm_trained_with_two_biases_counts_its_bias_twice() -> None:
    """Deeplearning4j has one bias; PyTorch's two have equal gradients, so training both clips earlier."""
    case = next(case for case in gradient_cases() if case.network == "lstm")
    model = _loaded(case)
    one = GradientNormalizer(model, Renormalize(per="param_type")).normalize_()["first.l0/bias"].norm
    set_gradients(model, case.layers, case.before)
    gradient = model["first"].get_parameter("bias_ih_l0").grad
    assert gradient is not None
    model["first"].get_parameter("bias_hh_l0").requires_grad_().grad = gradient.clone()
    both = GradientNormalizer(model, Renormalize(per="param_type")).normalize_()["first.l0/bias"].norm
    assert both == pytest.approx(one * math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("case", [c for c in gradient_cases() if c.network == "convolution"], ids=lambda c: c.label)
def test_real_batch_norm_agrees_except_for_the_running_statistics(case: Case) -> None:
    """A `BatchNorm2d` has no gradients for its statistics, so they are not part of the layer's norm."""
    layer = next(layer for layer in case.layers if layer.kind == "BatchNormalization")
    before, after = case.before[layer.name], case.after[layer.name]
    model = _loaded(case)
    twin = nn.BatchNorm2d(len(before["gamma"]), dtype=getattr(torch, case.dtype))
    twin.weight.grad, twin.bias.grad = (torch.from_numpy(before[kind].copy()) for kind in ("gamma", "beta"))
    model[layer.name] = twin
    buffers = copy.deepcopy(dict(twin.named_buffers()))
    report = _by_hand(case, model)

    assert all(torch.equal(buffer, buffers[name]) for name, buffer in twin.named_buffers())
    wide = {kind: values.astype(np.float64) for kind, values in before.items()}
    theirs = float(np.linalg.norm(np.concatenate(list(wide.values()))))
    ours = float(np.linalg.norm(np.concatenate([wide["gamma"], wide["beta"]])))
    match layer.strategy:
        case "RenormalizeL2PerLayer":
            factor = theirs / ours
        case "ClipL2PerLayer":
            factor = min(1.0, layer.threshold / ours) / min(1.0, layer.threshold / theirs)
        case _:
            factor = 1.0
    for kind, parameter in (("gamma", twin.weight), ("beta", twin.bias)):
        assert parameter.grad is not None
        got, expected = parameter.grad.numpy(), after[kind].astype(np.float64) * factor
        if layer.strategy in {"None", "ClipElementWiseAbsoluteValue"}:
            assert same_bits(got, after[kind]), f"{case.label}: {kind}"
        error = relative_error(got, expected)
        assert error <= GRADIENT_TOLERANCE[case.dtype], f"{case.label}: {kind}: relative error {error:.3g}"
    if layer.strategy == "RenormalizeL2PerLayer":
        assert report[layer.name].norm == pytest.approx(ours, rel=1e-12)


def _row(report: Report[Tensor], group: EdgeGroup) -> GroupReport:
    types = {"W": "weight", "b": "bias"}
    return report[group.layer if group.param_type is None else f"{group.layer}/{types[group.param_type]}"]
