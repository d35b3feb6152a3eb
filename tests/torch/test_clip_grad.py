"""Clipping with the signatures of torch.nn.utils: what PyTorch's own tests check, and where ours differs."""

import gc
import inspect
import math
import pickle
import threading
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from support.compiling import compile_counter, reset_compiler
from tamegrad import NonFiniteGradientError, SettingError, TamegradWarning
from tamegrad.torch import clip_grad, clip_grad_norm_, clip_grad_value_
from tamegrad.torch.model.planning import Planner

NAN, INF = math.nan, math.inf
FOREACH = (None, False, True)


def parameter_with(gradient: Any, dtype: torch.dtype = torch.float32) -> Any:
    gradient = torch.as_tensor(gradient, dtype=dtype)
    parameter = torch.zeros(gradient.shape, dtype=dtype)
    parameter.grad = gradient
    return parameter


def norm_of(parameters: Iterable[Any]) -> float:
    return float(torch.cat([one.grad.double().flatten() for one in parameters]).norm())


def test_the_signatures_are_those_of_torch() -> None:
    pairs: list[tuple[Any, Any]] = [
        (clip_grad_norm_, nn.utils.clip_grad_norm_),
        (clip_grad_value_, nn.utils.clip_grad_value_),
    ]
    for ours, theirs in pairs:
        own, other = (inspect.signature(function).parameters.values() for function in (ours, theirs))
        assert [(one.name, one.default, one.kind) for one in own] == [
            (one.name, one.default, one.kind) for one in other
        ]


class TestWhatPyTorchTests:
    """What PyTorch's test/test_nn.py checks of both functions."""

    @pytest.mark.parametrize("foreach", FOREACH)
    def test_large_gradients_end_at_the_norm_with_one_scale(self, *, foreach: bool | None) -> None:
        layer = nn.Linear(10, 10)
        before = torch.arange(1.0, 101).view(10, 10), torch.ones(10) / 1000
        for parameter, gradient in zip(layer.parameters(), before, strict=True):
            parameter.grad = gradient.clone()
        norm_before = norm_of(layer.parameters())
        norm = clip_grad_norm_(layer.parameters(), 2, norm_type=2, foreach=foreach)
        assert norm.item() == pytest.approx(norm_before, rel=1e-6)
        assert norm_of(layer.parameters()) == pytest.approx(2, rel=1e-6)
        pairs = zip(layer.parameters(), before, strict=True)
        scales = torch.cat([(one.grad / gradient).flatten() for one, gradient in pairs if one.grad is not None])
        torch.testing.assert_close(scales, scales[:1].expand_as(scales), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("foreach", FOREACH)
    def test_small_gradients_keep_their_bits(self, *, foreach: bool | None) -> None:
        torch.manual_seed(0)
        parameters = [parameter_with(torch.rand(10, 10) / 10_000), parameter_with(torch.ones(10) / 500)]
        before = [one.grad.clone() for one in parameters]
        norm = clip_grad_norm_(parameters, 2, foreach=foreach)
        assert all(map(torch.equal, [one.grad for one in parameters], before))
        assert norm.item() == pytest.approx(norm_of(parameters), rel=1e-6)

    @pytest.mark.parametrize("foreach", FOREACH)
    def test_one_tensor_is_a_list_of_one(self, *, foreach: bool | None) -> None:
        alone, listed = (parameter_with(torch.arange(1.0, 101).view(10, 10)) for _ in range(2))
        clip_grad_norm_(alone, 2, foreach=foreach)
        clip_grad_norm_([listed], 2, foreach=foreach)
        assert torch.equal(alone.grad, listed.grad)
        assert norm_of([alone]) == pytest.approx(2)

    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    @pytest.mark.parametrize("only_one", [True, False])
    @pytest.mark.parametrize("finite_first", [True, False])
    def test_a_nonfinite_norm_raises_if_asked_to_and_changes_nothing(
        self, *, bad: float, only_one: bool, finite_first: bool
    ) -> None:
        values = torch.ones(10, dtype=torch.float64) if only_one else torch.full((10,), bad, dtype=torch.float64)
        values[5] = bad
        parameters = [parameter_with(values, torch.float64), parameter_with(torch.ones(10), torch.float64)]
        parameters = parameters[::-1] if finite_first else parameters
        before = [one.grad.clone() for one in parameters]
        with pytest.raises(RuntimeError, match="clip_grad_norm_"):
            clip_grad_norm_(parameters, 1, error_if_nonfinite=True)
        for one, gradient in zip(parameters, before, strict=True):
            torch.testing.assert_close(one.grad, gradient, rtol=0, atol=0, equal_nan=True)
        assert not clip_grad_norm_(parameters, 1, error_if_nonfinite=False).isfinite()

    def test_a_finite_norm_does_not_raise(self) -> None:
        # The second one overflows in torch's function, which then raises.
        for value in (2e22, 2e200):
            parameter = parameter_with([value] * 10, torch.float64)
            norm = clip_grad_norm_(parameter, 1, error_if_nonfinite=True)
            assert norm.item() == pytest.approx(value * math.sqrt(10))
            assert norm_of([parameter]) == pytest.approx(1)

    @pytest.mark.parametrize("foreach", FOREACH)
    @pytest.mark.parametrize("without_bias", [False, True])
    def test_no_value_is_past_the_limit(self, *, foreach: bool | None, without_bias: bool) -> None:
        layer = nn.Linear(10, 10)
        layer.weight.grad = torch.arange(-50.0, 50).view(10, 10) / 5
        layer.bias.grad = None if without_bias else torch.full((10,), 2.0)
        wanted = layer.weight.grad.clamp(-2.5, 2.5)
        clip_grad_value_(layer.parameters(), 2.5, foreach=foreach)
        assert torch.equal(layer.weight.grad, wanted)
        assert layer.bias.grad is None or torch.equal(layer.bias.grad, torch.full((10,), 2.0))

    def test_one_tensor_may_be_limited(self) -> None:
        alone, listed = (parameter_with(torch.arange(-50.0, 50) / 5) for _ in range(2))
        clip_grad_value_(alone, 2.5)
        clip_grad_value_([listed], 2.5)
        assert torch.equal(alone.grad, listed.grad)
        assert alone.grad.abs().max() == 2.5

    @pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
    def test_an_iterator_that_was_read_before_is_warned_about(self, clip: Any) -> None:
        parameters = nn.Linear(2, 2).parameters()
        list(parameters)
        with pytest.warns(TamegradWarning, match=r"without anything left in it.*model.parameters\(\) again"):
            clip(parameters, 1.0)

    def test_an_empty_list_and_no_gradients_have_the_norm_zero(self) -> None:
        for parameters in ([], list(nn.Linear(2, 2).parameters())):
            norm, theirs = (clip(parameters, 1.0) for clip in (clip_grad_norm_, nn.utils.clip_grad_norm_))
            assert (norm, norm.dtype, norm.device) == (theirs, theirs.dtype, theirs.device)
        assert clip_grad_value_([], 1.0) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float16],
        [torch.bfloat16],
        [torch.float32],
        [torch.float64],
        [torch.complex64],
        [torch.complex128],
        [torch.float16, torch.bfloat16],
        [torch.bfloat16, torch.float32],
        [torch.float32, torch.complex128],
    ],
    ids=str,
)
def test_the_norm_is_a_tensor_like_torchs(dtypes: list[torch.dtype]) -> None:
    parameters = [parameter_with([3.0, 4.0], dtype) for dtype in dtypes]
    norm, theirs = (clip(parameters, INF) for clip in (clip_grad_norm_, nn.utils.clip_grad_norm_))
    assert (norm.dtype, norm.device, norm.shape, norm.requires_grad) == (theirs.dtype, theirs.device, (), False)
    torch.testing.assert_close(norm, theirs)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([3e38, -3e38], torch.float32),
        ([1e-40, 2e-40], torch.float32),
        ([6e4] * 100, torch.float16),
        ([1e300, 1e300], torch.float64),
        ([1e-300, 1e-300], torch.float64),
    ],
    ids=["float32 near its end", "float32 subnormal", "float16", "float64 huge", "float64 tiny"],
)
def test_nothing_overflows_or_underflows(values: list[float], dtype: torch.dtype) -> None:
    parameter = parameter_with(values, dtype)
    wide = [float(value) for value in parameter.grad]
    threshold = math.hypot(*wide) / 4 if math.hypot(*wide) < 1 else 1.0
    norm = clip_grad_norm_(parameter, threshold)
    assert norm.item() == pytest.approx(min(math.hypot(*wide), torch.finfo(dtype).max), rel=1e-3)
    assert norm.isfinite()
    assert math.hypot(*map(float, parameter.grad)) == pytest.approx(threshold, rel=1e-3)


def test_a_group_at_the_norm_keeps_its_bits_and_there_is_no_epsilon() -> None:
    parameter = parameter_with([3e-7, 4e-7])
    before = parameter.grad.clone()
    assert clip_grad_norm_(parameter, 5.1e-7).item() == pytest.approx(5e-7)
    assert torch.equal(parameter.grad, before)
    clip_grad_norm_(parameter, 1e-7)
    assert norm_of([parameter]) == pytest.approx(1e-7, rel=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gradients_stay_as_they_are_if_one_is_not_finite(bad: float) -> None:
    parameters = [parameter_with([30.0, 40.0]), parameter_with([bad])]
    norm = clip_grad_norm_(parameters, 1.0)
    assert norm.isnan() if math.isnan(bad) else norm.isposinf()
    assert parameters[0].grad.tolist() == [30.0, 40.0]


def test_the_error_names_positions_and_shapes() -> None:
    bad, good = parameter_with([[NAN, INF], [-INF, 1.0]]), parameter_with([1.0])
    with pytest.raises(NonFiniteGradientError) as raised:
        clip_grad_norm_([good, bad, good, bad], 1.0, error_if_nonfinite=True)
    assert str(raised.value) == (
        "clip_grad_norm_(error_if_nonfinite=True): got parameters[1] of shape (2, 2): 1 NaN, 1 +inf, 1 -inf; allowed: "
        "finite values; next: look at the loss and the inputs of this step, or pass error_if_nonfinite=False and leave "
        "out the optimizer step when the returned norm is not finite; no gradient was changed"
    )
    assert isinstance(raised.value, RuntimeError)
    assert isinstance(raised.value, ValueError)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # noqa: S301  from this test


def test_infinity_becomes_the_limit_and_nan_stays() -> None:
    parameters = [parameter_with(values) for values in ([INF, -INF, 0.25, -9.0], [NAN, 7.0, -0.0])]
    wanted = [one.grad.clamp(-1.0, 1.0) for one in parameters]
    clip_grad_value_(parameters, 1.0)
    for one, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(one.grad, gradient, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_infinity_becomes_the_limit_in_every_dtype(dtype: torch.dtype) -> None:
    parameter = parameter_with([INF, -INF, NAN, 7.0], dtype)
    clip_grad_value_(parameter, 1.0)
    wanted = torch.tensor([1.0, -1.0, NAN, 1.0], dtype=dtype)
    torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_other_backend_limits_infinity_too() -> None:
    parameter = parameter_with([INF, -INF, NAN, 7.0])
    with mock.patch("tamegrad.torch.backends.selection._problem_with", return_value=ImportError("no Numba")):
        clip_grad_value_(parameter, 1.0)
        other = parameter_with([30.0, 40.0])
        assert clip_grad_norm_(other, 1.0) == 50.0
    torch.testing.assert_close(parameter.grad, torch.tensor([1.0, -1.0, NAN, 1.0]), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(other.grad, torch.tensor([0.6, 0.8]))


class TestUnusualGradients:
    def test_sparse(self) -> None:
        table = nn.Embedding(5, 2, sparse=True)
        table(torch.tensor([1, 1, 3])).sum().backward()
        assert clip_grad_norm_(table.parameters(), 1.0).item() == pytest.approx(math.sqrt(10))
        assert table.weight.grad is not None
        assert table.weight.grad.to_dense().norm().item() == pytest.approx(1.0)

    def test_expanded(self) -> None:
        parameter = torch.zeros(4, 3)
        parameter.grad = torch.tensor([2.0]).expand(4, 3)
        assert clip_grad_norm_(parameter, 1.0).item() == pytest.approx(math.sqrt(48))
        assert norm_of([parameter]) == pytest.approx(1.0)

    def test_shared_and_listed_twice(self) -> None:
        first, second = parameter_with([3.0, 4.0]), torch.zeros(2)
        second.grad = first.grad
        for listed in ([first, second], [first, first, second]):
            first.grad[:] = torch.tensor([3.0, 4.0])
            assert clip_grad_norm_(listed, 1.0) == 5.0
            torch.testing.assert_close(first.grad, torch.tensor([0.6, 0.8]))

    def test_complex_values_keep_their_direction(self) -> None:
        parameter = parameter_with([3 + 4j, 0.3j], torch.complex64)
        clip_grad_value_(parameter, 1.0)
        torch.testing.assert_close(parameter.grad, torch.tensor([0.6 + 0.8j, 0.3j]))


class TestRefusals:
    @pytest.mark.parametrize("limit", [0, -1.0, NAN, None, "1", True, torch.ones(2)])
    def test_limits(self, limit: Any) -> None:
        parameter = parameter_with([3.0, 4.0])
        doors: list[tuple[Any, str]] = [(clip_grad_norm_, "max_norm"), (clip_grad_value_, "clip_value")]
        for clip, where in doors:
            with pytest.raises(SettingError, match=rf"\({where}\): got .*; allowed: a number above 0.*float\('inf'\)"):
                clip(parameter, limit)
        assert parameter.grad.tolist() == [3.0, 4.0]

    @pytest.mark.parametrize("norm_type", [1, INF, "inf", 0.5, None, "two"])
    def test_other_norms(self, norm_type: Any) -> None:
        with pytest.raises(SettingError, match=r"norm_type.*allowed: 2; next: .*torch.nn.utils.clip_grad_norm_"):
            clip_grad_norm_(parameter_with([1.0]), 1.0, norm_type)

    @pytest.mark.parametrize("norm_type", [2, 2.0, "2"])
    def test_the_euclidean_norm_is_taken_as_torch_takes_it(self, norm_type: Any) -> None:
        assert clip_grad_norm_(parameter_with([3.0, 4.0]), torch.tensor(1.0), norm_type) == 5.0  # type: ignore[arg-type]

    @pytest.mark.parametrize("make", [lambda model: model, lambda model: model.named_parameters(), lambda _: [None]])
    def test_what_is_no_parameter(self, make: Any) -> None:
        with pytest.raises(SettingError, match=r"\(parameters\): got a (Linear|tuple|NoneType).*model.parameters\(\)"):
            clip_grad_norm_(make(nn.Linear(2, 2)), 1.0)

    def test_a_gradient_that_cannot_be_clipped_is_named_by_its_position(self) -> None:
        odd = torch.zeros(2, dtype=torch.int64)
        odd.grad = torch.ones(2, dtype=torch.int64)
        good = parameter_with([3.0, 4.0])
        with pytest.raises(SettingError, match=r"gradient of parameters\[1\]: got a gradient of torch.int64"):
            clip_grad_norm_([good, odd], 1.0)
        assert good.grad.tolist() == [3.0, 4.0]


class TestWhatIsRemembered:
    def test_nothing_is_planned_anew_for_the_same_parameters(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        parameters = list(model.parameters())
        with mock.patch.object(Planner, "first_plan", autospec=True, side_effect=Planner.first_plan) as planned:
            for step in range(1, 20):
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
                clip_grad_norm_(model.parameters(), 1.0)
                clip_grad_norm_(parameters, 1.0 / step, error_if_nonfinite=True)
                clip_grad_value_(parameters, 0.5)
                clip_grad_norm_(model[0].parameters(), 1.0)
                clip_grad_norm_(model[1].parameters(), 1.0)
        assert planned.call_count == 3
        assert norm_of(parameters) <= 1 / 19 * (1 + 1e-6)

    def test_other_parameters_are_planned_for(self) -> None:
        first = parameter_with([3.0, 4.0])
        assert clip_grad_norm_([first], 10.0) == 5.0
        assert clip_grad_norm_([first, parameter_with([12.0])], 20.0) == 13.0
        assert clip_grad_norm_([first, parameter_with([12.0])], 20.0) == 13.0
        assert clip_grad_norm_([first], 10.0) == 5.0

    def test_parameters_that_moved_to_another_device_are_planned_for(self) -> None:
        # `Module.to` moves parameters in place. There is no second device here, so the plan says it was elsewhere.
        parameter = parameter_with([3.0, 4.0])
        clip_grad_norm_(parameter, 10.0)
        (known,) = clip_grad._cache._known[parameter]
        known.planned = replace(known.planned, device=torch.device("meta"))
        with mock.patch.object(Planner, "first_plan", autospec=True, side_effect=Planner.first_plan) as planned:
            assert clip_grad_norm_(parameter, 10.0) == 5.0
            assert clip_grad_norm_(parameter, 10.0) == 5.0
        assert planned.call_count == 1

    def test_no_parameter_is_kept_alive(self) -> None:
        model = nn.Linear(2, 2)
        model(torch.ones(1, 2)).sum().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        clip_grad_value_(model.parameters(), 1.0)
        held: list[Any] = [tensor for one in model.parameters() for tensor in (one, one.grad)]
        alive = [weakref.ref(tensor) for tensor in held]
        del held
        del model
        gc.collect()
        assert [one() for one in alive] == [None] * 4

    def test_threads_may_clip_the_same_and_other_parameters(self) -> None:
        shared = [parameter_with([0.3, 0.4]) for _ in range(3)]
        problems: list[object] = []

        def work(seed: int) -> None:
            own = parameter_with([3.0 * seed, 4.0 * seed])
            for repeat in range(50):
                own.grad = torch.tensor([3.0 * seed, 4.0 * seed])
                norms = clip_grad_norm_(own, 1.0 + repeat), clip_grad_norm_(shared, 1.0 + repeat)
                if norms[0] != 5.0 * seed or abs(norms[1] - math.sqrt(0.75)) > 1e-6:
                    problems.append(norms)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems


def test_a_compiled_training_step_runs_it_as_it_is() -> None:
    reset_compiler()
    model, counter = nn.Linear(3, 2), compile_counter()

    def step(inputs: Tensor) -> Tensor:
        model(inputs).square().sum().backward()
        return clip_grad_norm_(model.parameters(), 0.1)

    compiled: Any = torch.compile(step, backend=counter)
    for _ in range(2):
        model.zero_grad()
        norm = compiled(torch.ones(4, 3))
        assert norm_of(model.parameters()) == pytest.approx(min(0.1, norm.item()))
    assert counter.frame_count <= 2
    reset_compiler()
