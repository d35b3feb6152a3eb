"""The GPU backend's kernels, run on the CPU by Triton's interpreter, and compiled for GPUs that need not be there."""

import functools
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.language.core import is_builtin
from triton.runtime import interpreter

from support.contract import (
    DECIDED,
    NORM_TOLERANCE,
    Case,
    Tensors,
    assert_contract,
    assert_huge_complex_cut,
    bits,
    every_strategy,
    huge_complex_case,
)
from tamegrad import Clip, ClipValue, Keep, Policy, Renormalize, SettingError
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.decide import AFTER, BEFORE, COLUMNS, CUT, NONFINITE, Decision, Thresholds, decide
from tamegrad.torch.gradients import DTYPES
from tamegrad.torch.kernels import gpu
from tamegrad.torch.kernels.gpu_kernels import INTERPRETED

# NumPy says in the interpreter what a GPU does silently: a float64 past the range of float16 becomes infinite.
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="on a GPU, gradients of the CPU are refused"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"),
]


GPU: Any = "gpu"


@pytest.fixture(autouse=True, scope="module")
def replaced_once() -> Iterator[None]:
    """Has Triton's interpreter replace what its language offers once a launch, not at each call of a function.

    Half of the tests' time.
    """
    replace = interpreter._patch_lang

    @functools.cache
    def language(function: Any) -> Any:
        return next(one for one in function.__globals__.values() if one is tl or one is tl.core)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(
            interpreter,
            "_patch_lang",
            lambda function: replace(function) if is_builtin(language(function).load) else None,
        )
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, generator=generator, dtype=wide) * magnitude).to(dtype)


def small_case(dtype: torch.dtype, magnitude: float = 1.0) -> Case:
    return Case.of(
        {
            "first": {"weight": drawn(7, 9, dtype=dtype, magnitude=magnitude), "scale": drawn(dtype=dtype)},
            "second": {"weight": drawn(63, dtype=dtype, magnitude=magnitude, seed=2)},
            "empty": {"weight": drawn(0, 3, dtype=dtype)},
        }
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
class TestContract:
    @pytest.mark.parametrize("power", [-0.9, 0.0, 0.85])
    def test_gradients_of_any_magnitude(self, strategy: Strategy, dtype: torch.dtype, power: float) -> None:
        # Triton's interpreter takes milliseconds a program: few values of few tensors.
        assert_contract(small_case(dtype, torch.finfo(dtype).max ** power), strategy, GPU)

    @pytest.mark.parametrize(("value", "on_nonfinite"), [(math.nan, "keep"), (math.inf, "zero"), (-math.inf, "skip")])
    def test_nonfinite_gradients(
        self, strategy: Strategy, dtype: torch.dtype, value: float, on_nonfinite: OnNonfinite
    ) -> None:
        case = small_case(dtype)
        case.gradients["first"]["weight"][3, 4] = value
        case.arrays["first"]["weight"][3, 4] = value
        assert_contract(case, strategy, GPU, on_nonfinite)


@pytest.mark.parametrize("edge", [2.0**-511, 2.0**486])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("strategy", every_strategy(), ids=str)
def test_values_on_both_sides_of_an_edge_between_ranges(strategy: Strategy, dtype: torch.dtype, edge: float) -> None:
    values = torch.tensor([0.5, 0.999, 1.0, 1.001, 2.0], dtype=torch.float64) * edge
    assert_contract(
        Case.of({"out": {"weight": values.to(dtype), "bias": values[:2].to(dtype, copy=True)}}), strategy, GPU
    )


@pytest.mark.parametrize("limit", [2.0, 1.7e308])
def test_complex_values_whose_magnitude_no_float64_holds_keep_their_direction(limit: float) -> None:
    case = huge_complex_case()
    assert_contract(case, ClipValue(limit), GPU)
    assert_huge_complex_cut(case, limit)


LENGTHS = [0, 1, 63, 1000, gpu.BLOCK - 1, gpu.BLOCK, gpu.BLOCK + 1, gpu.CHUNK - 1, gpu.CHUNK, gpu.CHUNK + 1]


@pytest.mark.parametrize("strategy", [Clip(0.5), ClipValue(0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_what_lies_around_a_gradient_is_neither_read_nor_written(
    length: int, dtype: torch.dtype, strategy: Strategy
) -> None:
    # An odd margin also puts the gradient at an address that does not allow for the widest loads.
    margin = 3
    memory = torch.full((length + 2 * margin,), math.nan, dtype=dtype)
    gradient = memory[margin : margin + length]
    gradient.copy_(drawn(length, dtype=dtype))
    before = bits(memory).clone()
    assert_contract(Case.of({"out": {"weight": gradient, "bias": drawn(5, dtype=dtype)}}), strategy, GPU)
    outside = torch.ones(len(before), dtype=torch.bool)
    outside[margin : margin + length] = False
    assert bits(memory)[outside].equal(before[outside])


@pytest.mark.parametrize("power", [-0.995, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rounds_to_the_same_bits_as_pytorch(dtype: torch.dtype, power: float) -> None:
    # The contract allows for a spacing; rounding down instead of to the nearest would pass it.
    magnitude = float(torch.finfo(dtype).max ** power)
    # A factor with no pattern in its bits: no product is a tie that the last bit of the norm decides.
    eager, ours = (drawn(999, dtype=dtype, magnitude=magnitude) for _ in range(2))
    chosen: list[tuple[Tensor, Any]] = [(eager, "eager"), (ours, GPU)]
    for gradient, backend in chosen:
        threshold = 0.6180339887 * gradient.double().norm().item()
        GradientNormalizer(Case.of({"out": {"weight": gradient}}).model, Clip(threshold), backend=backend).normalize_()
    assert bits(ours).equal(bits(eager))


def test_all_dtypes_and_groups_of_interleaved_parameters_share_the_launches(launches: Counter[str]) -> None:
    gradients: Tensors = {
        f"layer{place}": {"weight": drawn(3, gpu.BLOCK, dtype=dtype, seed=place), "bias": drawn(9, dtype=dtype)}
        for place, dtype in enumerate(DTYPES)
    }
    policy = Policy(Clip(0.5, per="param_type"), {"layer1": ClipValue(0.1), "layer*/bias": Clip(0.2, per="model")})
    assert_contract(Case.of(gradients), policy, GPU)
    assert launches == dict.fromkeys(LAUNCHED, 1)


LAUNCHED = ["measure_chunk", "add_chunks", "decide_groups", "apply_chunk"]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches by kernel."""
    counts: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(gpu, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counts[self.name] += 1
            return self.kernel[grid]

    for name in LAUNCHED:
        monkeypatch.setattr(gpu, name, Counted(name))
    return counts


@pytest.mark.parametrize("layers", [1, 30])
def test_a_step_takes_four_launches_whatever_the_number_of_layers(layers: int, launches: Counter[str]) -> None:
    case = Case.of({f"layer{place}": {"weight": drawn(5, seed=place)} for place in range(layers)})
    GradientNormalizer(case.model, Clip(0.1), backend=GPU).normalize_()
    assert launches.total() == 4


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch has no types there
    """Lists PyTorch's operations that take a launch: all but those that allocate memory or show it in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func._schema.returns
        is_view = all(value.alias_info is not None and not value.alias_info.is_write for value in made)
        if not is_view and func is not torch.ops.aten.empty.memory_format:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("strategy", [Clip(0.1), ClipValue(0.1), Renormalize()], ids=str)
@pytest.mark.parametrize("tensors", [1, 200])
def test_nothing_is_launched_but_the_kernels(
    tensors: int, strategy: Strategy, on_nonfinite: OnNonfinite, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = [torch.nn.Parameter(drawn(5)) for _ in range(tensors)]
    named = [(f"{place}.weight", parameter) for place, parameter in enumerate(parameters)]
    normalizer = GradientNormalizer(named, strategy, on_nonfinite=on_nonfinite, backend=GPU)
    listed = Launches()

    class Listed:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: listed.names.append(self.name)

    for name in LAUNCHED:
        monkeypatch.setattr(gpu, name, Listed(name))
    # The second step has other tensors than the first, as `zero_grad` makes them.
    for step in range(2):
        for place, parameter in enumerate(parameters):
            parameter.grad = drawn(5, seed=tensors * step + place)
        listed.names.clear()
        with listed:
            normalizer.normalize_()
    assert listed.names == LAUNCHED


def assert_decided_as_on_the_host(
    table: Tensor, thresholds: Thresholds, on_nonfinite: OnNonfinite, tolerance: float
) -> Decision:
    plan = GradientNormalizer([("out.weight", torch.nn.Parameter(drawn(5)))], Clip(1.0)).plan
    steps, expected_steps = torch.full((len(table),), 5), torch.full((len(table),), 5)
    expected = decide(table, thresholds, on_nonfinite, expected_steps)
    actual = gpu.Kernels(plan, [True] * len(plan.parameters)).decide(table, thresholds, on_nonfinite, steps)
    assert steps.equal(expected_steps)
    for name in DECIDED:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype, name
        # The total norm is of sums over the groups, which NumPy adds up one by one.
        allowed = NORM_TOLERANCE if name == "total_norm" else tolerance
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=allowed, atol=0, err_msg=name)
    return actual


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("groups", [1, 63, 64, 65, 127, 128, 129, 1000])
# In one range all is rounded as on the host. The root of two ranges is NumPy's `hypot` there, and here one rounding.
@pytest.mark.parametrize(("ranges", "tolerance"), [((0,), 0.0), ((1,), 0.0), ((0, 1), 1e-15), ((0, 1, 2), 1e-15)])
def test_decides_as_the_host_does(
    groups: int, ranges: tuple[int, ...], tolerance: float, on_nonfinite: OnNonfinite
) -> None:
    generator = torch.Generator().manual_seed(groups)

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.empty(groups, dtype=torch.float64).uniform_(low, high, generator=generator)

    table = torch.zeros(groups, COLUMNS, dtype=torch.float64)
    for columns in (BEFORE, AFTER):
        for column in ranges:
            table[:, columns][:, column] = torch.where(uniform() < 0.6, 10 ** uniform(-8, 8), 0)
    table[:, NONFINITE] = (torch.rand(groups, 3, generator=generator) < 0.05).double()
    table[:, CUT] = torch.where(uniform() < 0.3, 3.0, 0.0)
    norms = torch.where(uniform() < 0.2, math.inf, 10 ** uniform(-4, 4))
    thresholds = Thresholds(norms, uniform(), (uniform() < 0.5) & norms.isfinite())
    assert_decided_as_on_the_host(table, thresholds, on_nonfinite, tolerance)


def test_decides_as_the_host_does_at_the_edges_of_what_can_be_measured() -> None:
    # Of each range nothing, the smallest and nearly the largest square, something between, and what is not finite.
    small = [0.0, 2.0**-1074, 2.0**-500, 2.0**52]
    middle = [0.0, 2.0**-1022, 2.0**-1021, 4.0, 2.0**972, math.inf, math.nan]
    big = [0.0, 2.0**-104, 1.7, 2.0**960, math.inf]
    sums = torch.tensor(list(itertools.product(big, middle, small)), dtype=torch.float64).flip(1)
    bad = ~sums.isfinite().all(1)
    # A norm of exactly 2 is left alone.
    choices = list(itertools.product([1e-300, 2.0, 1e300, math.inf], [0.0, 1.0], [0.0, 2.0]))
    norms, renormalizes, cut = torch.tensor(choices, dtype=torch.float64).T.repeat(1, len(sums))
    table = torch.zeros(len(norms), COLUMNS, dtype=torch.float64)
    table[:, BEFORE] = sums.repeat_interleave(len(choices), 0)
    # Cutting makes a norm smaller, and the sums are in ascending order.
    table[len(choices) :, AFTER] = table[: -len(choices), BEFORE].nan_to_num(0.0, 0.0)
    table[:, NONFINITE.start] = bad.double().repeat_interleave(len(choices))
    table[:, CUT] = torch.where(table[:, BEFORE].any(1), cut, 0.0)
    thresholds = Thresholds(norms, torch.full_like(norms, 0.5), (renormalizes > 0) & norms.isfinite())
    assert_decided_as_on_the_host(table, thresholds, "zero", 1e-15)
    finite = table[:, NONFINITE.start] == 0
    kept = Thresholds(*(getattr(thresholds, name)[finite] for name in Thresholds.__dataclass_fields__))
    decision = assert_decided_as_on_the_host(table[finite], kept, "keep", 1e-15)
    assert decision.total_norm.isfinite()


def test_the_host_decides_where_there_is_no_gradient_and_no_interpreter(
    monkeypatch: pytest.MonkeyPatch, launches: Counter[str]
) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    plan = GradientNormalizer([("out.weight", torch.nn.Parameter(drawn(5)))], Clip(1.0)).plan
    kernels, thresholds = gpu.Kernels(plan, [True] * len(plan.parameters)), Thresholds.of(plan)
    decision = kernels.decide(
        kernels.measure([None], thresholds), thresholds, "keep", torch.zeros(1, dtype=torch.int64)
    )
    assert decision.norms.tolist() == [0]
    assert not launches


def normalized(gradients: Tensors, policy: object) -> tuple[GradientNormalizer, Case]:
    case = Case.of(gradients)
    normalizer = GradientNormalizer(case.model, policy, backend=GPU)
    normalizer.normalize_()
    return normalizer, case


def test_the_same_input_gives_the_same_bits() -> None:
    def once() -> tuple[Tensor, Tensor]:
        normalizer, case = normalized({"out": {"weight": drawn(3, 2 * gpu.CHUNK // 3), "bias": drawn(70)}}, Clip(0.1))
        assert normalizer.report is not None
        return normalizer.report.norms, case.gradients["out"]["weight"]

    (norms, after), (norms_again, after_again) = once(), once()
    assert bits(norms).equal(bits(norms_again))
    assert bits(after).equal(bits(after_again))


def test_a_group_that_keeps_its_values_is_not_written() -> None:
    # Calculating with a signaling NaN makes it quiet: a kernel that writes back what it read changes the bits.
    kept, clipped = drawn(9), drawn(9)
    case = Case.of({"kept": {"weight": kept}, "clipped": {"weight": clipped}})
    plan = GradientNormalizer(case.model, Policy(Clip(1e-3), {"kept": Keep()})).plan
    kernels = gpu.Kernels(plan, [True] * len(plan.parameters))
    thresholds, steps = Thresholds.of(plan), torch.zeros(2, dtype=torch.int64)
    decision = kernels.decide(kernels.measure([kept, clipped], thresholds), thresholds, "keep", steps)
    signaling = 0x7F800001
    kept.view(torch.int32).fill_(signaling)
    kernels.apply_([kept, clipped], decision)
    assert (kept.view(torch.int32) == signaling).all()
    assert clipped.norm().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", [Clip(0.5), ClipValue(0.5), Renormalize(), Clip(1e6)], ids=str)
class TestLayouts:
    def test_dense_in_another_order(self, strategy: Strategy, dtype: torch.dtype) -> None:
        gradient = drawn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
        assert_contract(Case.of({"out": {"weight": gradient, "bias": drawn(5, 7, dtype=dtype).T}}), strategy, GPU)

    def test_with_gaps(self, strategy: Strategy, dtype: torch.dtype) -> None:
        memory = drawn(20, 6, dtype=dtype)
        between = memory[:, 3:].clone()
        assert_contract(Case.of({"out": {"weight": memory[:, :3], "bias": drawn(5, dtype=dtype)}}), strategy, GPU)
        assert memory[:, 3:].equal(between)


def test_the_tables_follow_gradients_that_move_change_or_are_missing() -> None:
    case = Case.of({name: {"weight": drawn(4, 4)} for name in ("first", "second")})
    normalizer = GradientNormalizer(case.model, Clip(0.5), backend=GPU)
    first, second = case.model.get_parameter("first.weight"), case.model.get_parameter("second.weight")
    held: list[Tensor] = []  # so that no address comes twice
    for step, values in enumerate([drawn(4, 4, seed=1), drawn(4, 4, seed=2), None, drawn(4, 4).T, drawn(4, 4)]):
        held += [gradient for gradient in (first.grad, second.grad) if gradient is not None]
        first.grad, second.grad = values, drawn(4, 4, seed=7 + step)
        before = [0.0 if gradient is None else gradient.norm().item() for gradient in (first.grad, second.grad)]
        report = normalizer.normalize_()
        assert report.norms.tolist() == pytest.approx(before)
        after = [0.0 if gradient is None else gradient.norm().item() for gradient in (first.grad, second.grad)]
        assert after == pytest.approx([min(norm, 0.5) for norm in before])


def test_no_gradient_at_all() -> None:
    case = Case.of({"out": {"weight": drawn(3)}})
    case.model.get_parameter("out.weight").grad = None
    with pytest.warns(UserWarning, match="nothing to normalize"):
        report = GradientNormalizer(case.model, Clip(0.5), backend=GPU).normalize_()
    assert report["out"].norm == 0


def test_gradients_of_the_cpu_are_refused_where_there_is_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    case = Case.of({"out": {"weight": drawn(3)}})
    with pytest.raises(SettingError, match=r"got a gradient on the CPU; allowed: gradients on a GPU; next: move"):
        GradientNormalizer(case.model, Clip(0.5), backend=GPU).normalize_()


class TestCapture:
    """What a CUDA graph allows for, as far as the host decides on it."""

    @pytest.fixture
    def capturing(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        now = [False]
        monkeypatch.setattr(gpu, "_capturing", lambda: now[0])
        return now

    def test_the_first_step_is_refused(self, capturing: list[bool]) -> None:
        capturing[0] = True
        case = Case.of({"out": {"weight": drawn(3)}})
        with pytest.raises(SettingError, match=r"the first step, while a CUDA graph .*; next: run a few steps before"):
            GradientNormalizer(case.model, Clip(0.5), backend=GPU).normalize_()

    @pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
    def test_what_reads_the_device_is_refused(self, on_nonfinite: OnNonfinite, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        case = Case.of({"out": {"weight": drawn(3)}})
        with pytest.raises(SettingError, match=r'a CUDA graph is captured.*; allowed: "keep" or "zero"'):
            GradientNormalizer(case.model, Clip(0.5), on_nonfinite=on_nonfinite).normalize_()
        assert case.gradients["out"]["weight"].equal(drawn(3))

    def test_other_shapes_are_refused(self, capturing: list[bool]) -> None:
        case = Case.of({"out": {"weight": drawn(3), "bias": drawn(3)}})
        normalizer = GradientNormalizer(case.model, Clip(0.5), backend=GPU)
        normalizer.normalize_()
        case.model.get_parameter("out.bias").grad = None
        capturing[0] = True
        with pytest.raises(SettingError, match="a step with gradients of other shapes"):
            normalizer.normalize_()

    def test_addresses_of_a_capture_are_used_in_it_alone(self, capturing: list[bool]) -> None:
        parameter = torch.nn.Parameter(torch.zeros(3))
        normalizer = GradientNormalizer([("out.weight", parameter)], Clip(0.5), backend=GPU)
        outside, inside, again = drawn(3), drawn(3, seed=1), drawn(3, seed=2)
        for captured, gradient in [(False, outside), (True, inside), (False, outside)]:
            capturing[0] = captured
            gradient.mul_(100)
            parameter.grad = gradient
            normalizer.normalize_()
            assert gradient.norm().item() == pytest.approx(0.5)
        capturing[0] = True
        for gradient, allowed in [(inside, True), (again, False)]:
            parameter.grad = gradient
            if allowed:
                normalizer.normalize_()
                continue
            with pytest.raises(SettingError, match="a second step with other addresses"):
                normalizer.normalize_()


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tamegrad.torch.kernels import gpu, gpu_decide, gpu_kernels

backend, arch, warp, present, limited = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
constants = {"PRESENT": int(present), "LIMITED": limited == "True", "ALIGNED": True, "CHUNK": gpu.CHUNK,
             "BLOCK": gpu.BLOCK, "ROWS": 64, "WIDTH": 16, "ZEROES": limited == "True"}
special = dict.fromkeys(constants, "constexpr") | {"groups": "i32"}
special |= dict.fromkeys(["addresses", "facts", "chunks", "ends", "nonfinite", "steps"], "*i64")
special |= dict.fromkeys(["zeroed", "renormalizes", "flags"], "*i1")
kernels = gpu_kernels.measure_chunk, gpu_kernels.add_chunks, gpu_decide.decide_groups, gpu_kernels.apply_chunk
for kernel in kernels:
    types = {name: special.get(name, "*fp64") for name in kernel.arg_names}
    known = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in types}
    compile(ASTSource(kernel, types, known), target=target, options={"enable_fp_fusion": True})
"""


@pytest.mark.parametrize(
    ("target", "present", "limited"),
    [
        (("cuda", 80, 32), 0b000100, False),
        (("cuda", 90, 32), 0b111111, True),
        (("hip", "gfx942", 64), 0b000100, False),
    ],
    ids=str,
)
def test_the_kernels_compile_for_gpus(target: tuple[Any, ...], present: int, limited: bool, tmp_path: Any) -> None:  # noqa: FBT001
    # In a process of its own: in this one Triton interprets.
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    arguments = [str(argument) for argument in (*target, present, limited)]
    subprocess.run([sys.executable, "-c", COMPILE, *arguments], env=settings, check=True)
