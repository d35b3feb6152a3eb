"""The GPU backend's kernels, run on the CPU by Triton's interpreter, and compiled for GPUs that need not be there."""

import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.contract import (
    Case,
    Tensors,
    assert_contract,
    assert_huge_complex_cut,
    bits,
    every_strategy,
    huge_complex_case,
    paired,
)
from support.gradients import model_with
from support.interpreted import MARKS, drawn, patched_once
from tamegrad import Clip, ClipValue, Policy, Renormalize
from tamegrad.strategies import OnNonfinite, Strategy
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.backends import gpu
from tamegrad.torch.backends.gpu import layout
from tamegrad.torch.memory import DTYPES

__all__ = ["patched_once"]

pytestmark = MARKS

GPU: Any = "gpu"


def small_case(dtype: torch.dtype, magnitude: float = 1.0) -> Case:
    return Case.of(
        {
            "first": {"weight": drawn(7, 9, dtype=dtype, magnitude=magnitude), "scale": drawn(dtype=dtype)},
            "second": {"weight": drawn(63, dtype=dtype, magnitude=magnitude, seed=2)},
            "empty": {"weight": drawn(0, 3, dtype=dtype)},
        }
    )


# A magnitude as a power of the largest number of the dtype, a value that is not finite, and what happens to it.
GRADIENTS: list[tuple[float, float | None, OnNonfinite]] = [
    (-0.9, None, "keep"),
    (0.0, None, "zero"),
    (0.85, None, "keep"),
    (0.0, math.nan, "keep"),
    (0.0, math.inf, "zero"),
    (0.0, -math.inf, "skip"),
]


@pytest.mark.parametrize(("strategy", "dtype", "gradients"), paired(every_strategy(), list(DTYPES), GRADIENTS), ids=str)
def test_the_contract(strategy: Strategy, dtype: torch.dtype, gradients: tuple[float, float | None, Any]) -> None:
    power, nonfinite, on_nonfinite = gradients
    case = small_case(dtype, torch.finfo(dtype).max ** power)
    if nonfinite is not None:
        case.gradients["first"]["weight"][3, 4] = nonfinite
        case.arrays["first"]["weight"][3, 4] = nonfinite
    assert_contract(case, strategy, GPU, on_nonfinite)


@pytest.mark.parametrize(
    ("strategy", "dtype", "edge"),
    paired(every_strategy(), [torch.float64, torch.complex128], [2.0**-511, 2.0**486]),
    ids=str,
)
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


BLOCK, CHUNK = layout.BLOCK, layout.CHUNK
LENGTHS = [0, 1, 63, 1000, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1]


@pytest.mark.parametrize(
    ("length", "dtype", "strategy"),
    paired(LENGTHS, [torch.bfloat16, torch.float32, torch.complex128], [Clip(0.5), ClipValue(0.5)]),
    ids=str,
)
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
    foreach, ours = (drawn(999, dtype=dtype, magnitude=magnitude) for _ in range(2))
    chosen: list[tuple[Tensor, Any]] = [(foreach, "foreach"), (ours, GPU)]
    for gradient, backend in chosen:
        threshold = 0.6180339887 * gradient.double().norm().item()
        GradientNormalizer(Case.of({"out": {"weight": gradient}}).model, Clip(threshold), backend=backend).normalize_()
    assert bits(ours).equal(bits(foreach))


def test_all_dtypes_and_groups_of_interleaved_parameters_share_the_launches(launches: Counter[str]) -> None:
    gradients: Tensors = {
        f"layer{place}": {"weight": drawn(3, BLOCK, dtype=dtype, seed=place), "bias": drawn(9, dtype=dtype)}
        for place, dtype in enumerate(DTYPES)
    }
    policy = Policy(Clip(0.5, per="param_type"), {"layer1": ClipValue(0.1), "layer*/bias": Clip(0.2, per="model")})
    assert_contract(Case.of(gradients), policy, GPU)
    # What a limit takes in registers slows down those gradients alone that have one.
    assert launches == {"measure_chunk": 2, "add_chunks": 1, "decide_groups": 1, "apply_chunk": 2}


@pytest.mark.parametrize("policy", [Clip(0.5, per="model"), Policy(Clip(0.1), {"layer2": ClipValue(0.1)})], ids=str)
def test_tall_groups_are_added_up_in_two_steps(
    policy: Any, launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK", BLOCK)
    monkeypatch.setattr(gpu, "CHUNK", BLOCK)
    monkeypatch.setattr(layout, "TALL", 4)
    monkeypatch.setattr(layout, "SPAN", 3)
    gradients: Tensors = {f"layer{place}": {"weight": drawn(BLOCK * place + 5, seed=place)} for place in range(7)}
    assert_contract(Case.of(gradients), policy, GPU)
    assert launches["add_chunks"] == 2


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


@pytest.mark.parametrize("loss_scale", [None, torch.tensor(8.0)], ids=str)
@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize(
    ("tensors", "strategy"), [(1, Clip(0.1)), (200, ClipValue(0.1)), (3, Renormalize(per="model"))], ids=str
)
def test_nothing_is_launched_but_the_kernels(
    tensors: int,
    strategy: Strategy,
    on_nonfinite: OnNonfinite,
    loss_scale: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_with([drawn(5) for _ in range(tensors)])
    normalizer = GradientNormalizer(model, strategy, on_nonfinite=on_nonfinite, backend=GPU)
    normalizer._step._on_host = False
    expected = LAUNCHED
    if isinstance(strategy, Renormalize) and loss_scale is not None:
        # Elements might overflow, and only the device knows.
        expected = [*LAUNCHED[:-1], "aten.zeros_like.default", "peak_chunk", "decide_groups", "apply_chunk"]
    listed = Launches()

    class Listed:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: listed.names.append(self.name)

    for name in [*LAUNCHED, "peak_chunk"]:
        monkeypatch.setattr(gpu, name, Listed(name))
    # The second step has other tensors than the first, as `zero_grad` makes them.
    for step in range(2):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = drawn(5, seed=tensors * step + index)
        listed.names.clear()
        with listed:
            normalizer._normalize(loss_scale)
    assert listed.names == expected


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero"])
@pytest.mark.parametrize("strategy", [Clip(0.5), ClipValue(0.5), Renormalize()], ids=str)
def test_a_loss_scale_changes_nothing_but_the_unit(strategy: Strategy, on_nonfinite: OnNonfinite) -> None:
    loss_scale = torch.tensor(2.0**10)
    plain, scaled = ([drawn(7), drawn(9, dtype=torch.complex64), drawn(5).fill_(math.nan)] for _ in range(2))
    for gradient in scaled:
        gradient.mul_(loss_scale)
    one, other = (
        GradientNormalizer(model_with(gradients), strategy, on_nonfinite=on_nonfinite, backend=GPU)
        for gradients in (plain, scaled)
    )
    expected, report = one.normalize_(), other._normalize(loss_scale)
    for name in ("norms", "scales", "norms_after", "clipped", "nonfinite", "total_norm"):
        torch.testing.assert_close(getattr(report, name), getattr(expected, name), rtol=1e-15, atol=0, equal_nan=True)
    for gradient, wanted in zip(scaled, plain, strict=True):
        torch.testing.assert_close(gradient / loss_scale, wanted, equal_nan=True)


def normalized(gradients: Tensors, policy: object) -> tuple[GradientNormalizer, Case]:
    case = Case.of(gradients)
    normalizer = GradientNormalizer(case.model, policy, backend=GPU)
    normalizer.normalize_()
    return normalizer, case


def test_the_same_input_gives_the_same_bits() -> None:
    def once() -> tuple[Tensor, Tensor]:
        normalizer, case = normalized({"out": {"weight": drawn(3, 2 * CHUNK // 3), "bias": drawn(70)}}, Clip(0.1))
        assert normalizer.report is not None
        return normalizer.report.norms, case.gradients["out"]["weight"]

    (norms, after), (norms_again, after_again) = once(), once()
    assert bits(norms).equal(bits(norms_again))
    assert bits(after).equal(bits(after_again))


@pytest.mark.parametrize(
    ("dtype", "strategy"),
    [(dtype, [Clip(0.5), ClipValue(0.5), Renormalize(), Clip(1e6)][index % 4]) for index, dtype in enumerate(DTYPES)],
    ids=str,
)
class TestLayouts:
    def test_dense_in_another_order(self, strategy: Strategy, dtype: torch.dtype) -> None:
        gradient = drawn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
        assert_contract(Case.of({"out": {"weight": gradient, "bias": drawn(5, 7, dtype=dtype).T}}), strategy, GPU)

    def test_with_gaps(self, strategy: Strategy, dtype: torch.dtype) -> None:
        memory = drawn(20, 6, dtype=dtype)
        between = memory[:, 3:].clone()
        assert_contract(Case.of({"out": {"weight": memory[:, :3], "bias": drawn(5, dtype=dtype)}}), strategy, GPU)
        assert memory[:, 3:].equal(between)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tamegrad.torch.backends.gpu import decide, kernels, layout

TYPES = dict.fromkeys(["addresses", "facts", "chunks", "spans", "nonfinite", "nonfinite_steps", "peak_bits"], "*i64")
TYPES |= dict.fromkeys(["zeroed", "flags"], "*i1") | {"groups": "i32", "loss_scale": "*fp32"}
KERNELS = kernels.measure_chunk, kernels.add_chunks, kernels.peak_chunk, decide.decide_groups, kernels.apply_chunk

for argument in sys.argv[1:]:
    backend, arch, warp, present, everything = argument.split(",")
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    constants = {"PRESENT": int(present), "CHUNK": layout.CHUNK, "BLOCK": layout.BLOCK}
    constants |= {"ROWS": 64, "WIDTH": 16, "ZEROES": everything == "1"}
    if everything == "0":
        constants |= dict.fromkeys(["limits", "loss_scale", "zeroed", "total", "peaks", "nonfinite_steps"])
    for kernel in KERNELS:
        types = {name: "constexpr" if name in constants else TYPES.get(name, "*fp64") for name in kernel.arg_names}
        known = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in types}
        made = compile(ASTSource(kernel, types, known), target=target, options={"enable_fp_fusion": True})
        if arch == "80" and kernel in (kernels.measure_chunk, kernels.apply_chunk):
            # 16 bytes a thread, wherever a tensor starts.
            assert "ld.global.v4.b32" in made.asm["ptx"], kernel
"""


def test_the_kernels_compile_for_gpus(tmp_path: Any) -> None:
    # In a process of its own: in this one Triton interprets. The last two numbers are the dtypes there are, and whether
    # there is a loss scale, a limit, a sum over the stages of a pipeline, a group to be zeroed, and one with a peak.
    targets = ["cuda,80,32,4,0", "cuda,90,32,63,1", "hip,gfx942,64,4,0"]
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE, *targets], env=settings, check=True)
