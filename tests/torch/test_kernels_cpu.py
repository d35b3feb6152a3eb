"""The CPU backend where it can go wrong: bounds, threads, memory that is not its own, and a Python without Numba."""

import ctypes
import math
import mmap
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.contract import bits
from support.gradients import model_with, random_gradients
from tamegrad import Clip, ClipValue, Keep, MissingExtraError, Renormalize
from tamegrad.torch import GradientNormalizer, normalize_grad_
from tamegrad.torch.gradients import DTYPES, Collector
from tamegrad.torch.kernels import choose, cpu, cpu_loops, objects, threads
from tamegrad.torch.kernels.layout import find_layout

LENGTHS = (0, 1, 2, 63, 64, 65, 1000, 4095, 4097, cpu.CHUNK - 1, cpu.CHUNK, cpu.CHUNK + 1, 3 * cpu.CHUNK + 7)
OPENMP = threads._openmp[0]
REAL_DTYPES = [dtype for dtype in DTYPES if not dtype.is_complex]
STRATEGIES = [Clip(1.0), Clip(1.0, per="tensor"), ClipValue(0.5), Renormalize(per="model")]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_any_number_of_threads_of_any_kind_gives_the_same_bits(
    strategy: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for count, openmp in ((1, OPENMP), (2, OPENMP), (3, OPENMP), (2, 0), (3, 0)):
        torch.set_num_threads(count)
        monkeypatch.setattr(threads, "_openmp", [openmp])
        gradients = random_gradients((*LENGTHS, *[5] * 300, 20 * cpu.CHUNK + 1), dtype)
        report = normalize_grad_(model_with(gradients), strategy, backend="cpu")
        results.append((report.norms, report.norms_after, report.total_norm, *gradients))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_lengths_around_every_bound_give_what_eager_gives(strategy: Any, dtype: torch.dtype) -> None:
    compiled, eager = (model_with(random_gradients(LENGTHS, dtype)) for _ in range(2))
    report = normalize_grad_(compiled, strategy, backend="cpu")
    expected = normalize_grad_(eager, strategy, backend="eager")
    torch.testing.assert_close(report.norms, expected.norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(report.norms_after, expected.norms_after, rtol=1e-13, atol=0)
    assert report.clipped.equal(expected.clipped)
    tolerance = 4 * torch.finfo(dtype).eps
    for parameter, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    one_each = [value.reshape(1).clone() for value in finite[:: 97 if dtype == torch.bfloat16 else 61]]
    report = normalize_grad_(model_with(one_each), Clip(float("inf"), per="tensor"), backend="cpu")
    assert report.norms.equal(torch.cat(one_each).double().abs())
    compiled, eager = finite.clone(), finite.clone()
    strategy = Clip(finite.double().norm().item() / 3)
    normalize_grad_(model_with([compiled]), strategy, backend="cpu")
    normalize_grad_(model_with([eager]), strategy, backend="eager")
    assert compiled.view(torch.int16).equal(eager.view(torch.int16))
    normalize_grad_(model_with([compiled]), ClipValue(0.3), backend="cpu")
    normalize_grad_(model_with([eager]), ClipValue(0.3), backend="eager")
    assert compiled.view(torch.int16).equal(eager.view(torch.int16))
    counts = normalize_grad_(model_with([every.clone()]), Keep(), backend="cpu").nonfinite
    assert counts.tolist() == [(~every.isfinite()).sum().item()]


BLOCK = cpu_loops.BLOCK


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "places",
    [
        (0,),
        (BLOCK - 1,),
        (BLOCK,),
        (2 * BLOCK - 1, 2 * BLOCK),
        (BLOCK, 3 * BLOCK),
        (cpu.CHUNK - 1,),
        (cpu.CHUNK,),
        (-1,),
    ],
    ids=str,
)
def test_a_value_that_is_cut_is_seen_wherever_it_is(places: tuple[int, ...], dtype: torch.dtype) -> None:
    compiled = torch.full((cpu.CHUNK + 5,), -0.25, dtype=dtype)
    for place in places:
        compiled[place] = -3.0
    eager = compiled.clone()
    report = normalize_grad_(model_with([compiled]), ClipValue(0.5), backend="cpu")
    expected = normalize_grad_(model_with([eager]), ClipValue(0.5), backend="eager")
    torch.testing.assert_close(report.norms, expected.norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(report.norms_after, expected.norms_after, rtol=1e-13, atol=0)
    assert report.clipped.tolist() == [True]
    assert compiled.equal(eager)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_a_limit_between_two_values_of_the_dtype_cuts_as_eager_does(dtype: torch.dtype) -> None:
    at = torch.tensor(0.3, dtype=dtype)
    below, above = (at.nextafter(torch.tensor(end, dtype=dtype)) for end in (0.0, 1.0))
    values = torch.stack([below, at, above, -below, -at, -above, torch.zeros_like(at), -torch.zeros_like(at)])
    exact = at.double().item()
    for limit in (
        exact,
        math.nextafter(exact, 0),
        math.nextafter(exact, 1),
        (exact + above.double().item()) / 2,
        1e300,
    ):
        compiled, eager = values.clone(), values.clone()
        report = normalize_grad_(model_with([compiled]), ClipValue(limit), backend="cpu")
        assert report.clipped.equal(normalize_grad_(model_with([eager]), ClipValue(limit), backend="eager").clipped)
        assert bits(compiled).equal(bits(eager))


@pytest.mark.parametrize("strategy", [Clip(1.0), ClipValue(0.5)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, value: float, strategy: Any) -> None:
    for place in (0, 15, BLOCK - 1, BLOCK, cpu.CHUNK - 1, cpu.CHUNK, cpu.CHUNK + BLOCK + 2):
        gradient = torch.ones(cpu.CHUNK + BLOCK + 3, dtype=dtype)
        gradient[place] = value
        before = gradient.clone()
        report = normalize_grad_(model_with([gradient]), strategy, backend="cpu")
        assert report.nonfinite.tolist() == [1]
        assert bits(gradient).equal(bits(before))


@pytest.mark.parametrize("limit", [math.inf, 0.5])
@pytest.mark.parametrize("large", [0.0, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-30])
def test_the_squares_of_huge_and_tiny_float32_values_are_exact(small: float, large: float, limit: float) -> None:
    gradient = torch.full((cpu.CHUNK + 1,), small)
    gradient[-2:] = large
    wide = gradient.double()
    report = normalize_grad_(model_with([gradient]), ClipValue(limit), backend="cpu")
    torch.testing.assert_close(report.norms[0], wide.norm(), rtol=1e-13, atol=0)
    torch.testing.assert_close(report.norms_after[0], wide.clamp(max=limit).norm(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("strategy", [Clip(1.0), ClipValue(1.0)], ids=str)
def test_float64_values_whose_squares_are_zero_are_not_taken_for_zeros(strategy: Any) -> None:
    gradients = [torch.full((cpu.CHUNK,), value, dtype=torch.float64) for value in (0.0, 5e-324, 1e-200)]
    report = normalize_grad_(model_with(gradients), type(strategy)(1.0), backend="cpu")
    expected = 256 * math.hypot(5e-324, 1e-200)
    assert report.norms.tolist() == pytest.approx([expected], rel=1e-13)
    tiny = normalize_grad_(model_with(gradients[:2]), strategy, backend="cpu")
    assert tiny.norms.tolist() == [256 * 5e-324]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("length", [1, 65, cpu.CHUNK + 1])
def test_nothing_around_a_gradient_is_read_or_written(strategy: Any, dtype: torch.dtype, length: int) -> None:
    around = torch.full((length + 64,), torch.nan, dtype=dtype)
    gradient = around[32 : 32 + length]
    gradient.fill_(2.0)
    report = normalize_grad_(model_with([gradient]), strategy, backend="cpu")
    assert report.nonfinite.tolist() == [0]
    assert gradient.isfinite().all()
    assert around[:32].isnan().all()
    assert around[32 + length :].isnan().all()


def test_a_group_that_keeps_its_values_is_not_written() -> None:
    # A write to these pages would end the process.
    pages = mmap.mmap(-1, 16 * mmap.PAGESIZE)
    kept = torch.frombuffer(pages, dtype=torch.float32)
    kept.fill_(0.001)
    address, read_only = kept.data_ptr(), 1
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(address, len(pages), read_only) == 0
    clipped = torch.full((100,), 3.0)
    report = normalize_grad_(model_with([kept, clipped]), Clip(1.0, per="tensor"), backend="cpu")
    assert report.clipped.tolist() == [False, True]
    assert clipped.norm().item() == pytest.approx(1.0)


def test_the_chunks_of_a_tensor_past_2_to_the_31_cover_it_once() -> None:
    count = 3 * 2**31 + 5
    sizes = np.array([[7, 2], [count, 4], [0, 2], [0, -1]], dtype=np.int64)
    chunks, kinds = cpu.cut_into_chunks(sizes)
    assert chunks[0].tolist() == [0, 0, 7]
    long = chunks[kinds == 4]
    assert (long[1:, 1] == long[:-1, 1] + long[:-1, 2]).all()
    assert (long[0, 1], long[-1, 1] + long[-1, 2], long[:, 2].max()) == (0, 2 * count, cpu.CHUNK)
    assert len(chunks) == len(long) + 1


def test_addresses_past_2_to_the_31_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing but the touched pages of this take memory.
    huge = torch.from_numpy(np.zeros(2**31 + 100, dtype=np.int16)).view(torch.bfloat16)
    huge[-1], huge[3] = 3.0, 4.0

    def only_the_ends(sizes: Any) -> Any:
        chunks, kinds = cut(sizes)
        return (chunks[[0, -1]], kinds[[0, -1]]) if len(chunks) else (chunks, kinds)

    cut = cpu.cut_into_chunks
    monkeypatch.setattr(cpu, "cut_into_chunks", only_the_ends)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    parameter.data = huge
    parameter.grad = huge
    report = normalize_grad_([("p", parameter)], Clip(1.0), backend="cpu")
    assert report.norms.tolist() == [5.0]
    assert (huge[-1].item(), huge[3].item()) == pytest.approx((0.6, 0.8), rel=1e-2)


def test_several_threads_may_normalize_at_once() -> None:
    def normalized(seed: int) -> Tensor:
        gradient = torch.randn(20 * cpu.CHUNK, generator=torch.Generator().manual_seed(seed))
        normalizer = GradientNormalizer(model_with([gradient]), Clip(1.0), backend="cpu")
        for _ in range(5):
            gradient.mul_(3.0)
            normalizer.normalize_()
        return gradient

    alone = [normalized(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, alone, pool.map(normalized, range(4))))


@pytest.mark.skipif(not torch._C.has_openmp, reason="PyTorch has threads that it does not lend")
def test_no_thread_is_started_beside_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ThreadPoolExecutor] = []
    monkeypatch.setattr(threads, "_pools", started)
    torch.set_num_threads(2)
    for openmp in (OPENMP, 0):
        assert started == []
        monkeypatch.setattr(threads, "_openmp", [openmp])
        report = normalize_grad_(model_with([torch.ones(16 * cpu.CHUNK)]), Clip(1e9), backend="cpu")
        assert report.norms.tolist() == [4 * math.sqrt(cpu.CHUNK)]
    assert len(started) == 1
    started[0].shutdown()


def test_a_forked_process_starts_threads_of_its_own() -> None:
    code = """
import os, torch
from tamegrad import Clip
from tamegrad.torch import GradientNormalizer
torch.set_num_threads(2)
parameter = torch.nn.Parameter(torch.zeros(2_000_000))
parameter.grad = torch.ones(2_000_000)
normalizer = GradientNormalizer([("p", parameter)], Clip(1e9), backend="cpu")
before = normalizer.normalize_().norms.item()
child = os.fork()
if child == 0:
    os._exit(0 if normalizer.normalize_().norms.item() == before else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    # PyTorch's own threads do not survive a fork: the child makes no large tensor.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["0"]


LOG_OF_A_STEP = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
logging.getLogger("numba").setLevel(logging.ERROR)
from tamegrad import Clip
from tamegrad.torch import GradientNormalizer
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.tensor([3.0, 4.0])
normalizer = GradientNormalizer([("p", parameter)], Clip(1.0))
normalizer.normalize_()
normalizer.normalize_()
print(normalizer.backend, parameter.grad.tolist(), sep="|")
"""


def a_process(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )


def test_the_second_process_finds_what_the_first_compiled() -> None:
    # What the first one finds depends on what ran before.
    first, second = (a_process(LOG_OF_A_STEP) for _ in range(2))
    assert first.stdout == second.stdout
    assert "tamegrad" not in second.stderr


def test_without_numba_it_works_on_and_says_so() -> None:
    done = a_process("import sys; sys.modules['numba'] = None\n" + LOG_OF_A_STEP)
    backend, gradient = done.stdout.strip().split("|")
    assert backend.startswith("eager (the only parameter is on the CPU, but Numba cannot be imported: ")
    assert backend.endswith("; pip install 'tamegrad[cpu]')")
    assert [round(value, 6) for value in eval(gradient)] == [0.6, 0.8]  # noqa: S307  what the test printed


def test_numba_is_not_imported_before_it_is_needed() -> None:
    assert a_process("import sys, tamegrad.torch; print('numba' in sys.modules)").stdout.strip() == "False"


def test_a_backend_asked_for_by_name_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tamegrad.torch.kernels.cpu", None)
    message = r'^backend="cpu": got a Python in which Numba .*; allowed: .*; next: pip install \'tamegrad\[cpu\]\'$'
    with pytest.raises(MissingExtraError, match=message):
        normalize_grad_(model_with([torch.ones(2)]), Clip(1.0), backend="cpu")


def test_auto_says_what_it_took_and_why() -> None:
    normalizer = GradientNormalizer(model_with([torch.ones(2), torch.ones(3)]), Clip(1.0))
    assert str(normalizer.backend) == "cpu (all 2 parameters are on the CPU)"
    assert str(choose("cpu", [])) == "cpu (as asked)"
    elsewhere = [torch.empty(2), torch.empty(2, device="meta")]
    assert str(choose("auto", elsewhere)) == "eager (the 2 parameters are on cpu, meta)"


def test_what_is_found_in_memory_does_not_depend_on_how_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [
        torch.randn(3, 4),
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, dtype=torch.complex64),
        torch.randn(0, 3).half(),
        torch.tensor(1.0).bfloat16(),
        torch.randn(4, 1, 3)[:, :, :].double(),
    ]
    model = model_with(gradients)
    model.p0.grad = None
    names = [name for name, _ in model.named_parameters()]
    collector = Collector(list(model.parameters()), names, located=True)
    assert hasattr(Tensor, "__dlpack_c_exchange_api__") == objects.AVAILABLE
    quick: Any = collector.collect().values
    monkeypatch.setattr(objects, "AVAILABLE", False)
    slow: Any = collector.collect().values
    assert all(a is b for a, b in zip(quick, slow, strict=True))
    assert quick.memory.table.tolist() == slow.memory.table.tolist()
    assert not quick.memory.stand_ins
    assert not slow.memory.stand_ins


@pytest.mark.parametrize("spacing", [1, 16, 2**12, 2**21])
def test_memory_that_two_gradients_share_is_found_wherever_it_is(spacing: int) -> None:
    # Nothing but the touched pages of this take memory.
    memory = torch.from_numpy(np.zeros(101 * spacing, dtype=np.float32))
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(100)]
    for index, parameter in enumerate(parameters):
        parameter.grad = memory[index * spacing :][:1]
    collector = Collector(parameters, ["p"] * 100, located=True)
    assert collector.collect().values.count(None) == 0
    for first, second in ((0, 99), (17, 18), (50, 3)):
        kept = parameters[second].grad
        parameters[second].grad = memory[first * spacing :][:1]
        assert [index for index, value in enumerate(collector.collect().values) if value is None] == [
            max(first, second)
        ]
        parameters[second].grad = kept


@pytest.mark.skipif(not objects.AVAILABLE, reason="this PyTorch is too old for the walk")
def test_tensors_are_laid_out_as_the_walk_expects() -> None:
    layout = find_layout()
    assert layout is not None
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)

    def follow(address: int, distance: int) -> int:
        return ctypes.c_int64.from_address(address + distance).value

    autograd = follow(follow(id(parameter), layout.tensor), layout.autograd)
    gradient = follow(autograd, layout.gradient)
    assert gradient == parameter.grad._cdata
    assert follow(gradient, layout.storage) == parameter.grad.untyped_storage()._cdata
    assert follow(gradient, layout.object) == id(parameter.grad)
    # What a walk may look into where there is no gradient.
    parameter.grad = None
    nothing = follow(autograd, layout.gradient)
    assert (follow(nothing, layout.storage), follow(nothing, layout.object)) == (0, 0)
    assert follow(torch.zeros(3)._cdata, layout.autograd) == 0


def test_collects_the_same_where_the_layout_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with([torch.randn(2, 3) for _ in range(40)])
    collector = Collector(list(model.parameters()), [""] * 40, located=True)
    known: Any = collector.collect().values
    monkeypatch.setattr(objects, "CONSTANTS", np.append(objects.CONSTANTS[:-5], [0] * 5))
    unknown: Any = collector.collect().values
    assert all(a is b for a, b in zip(known, unknown, strict=True))
    assert known.memory.table.tolist() == unknown.memory.table.tolist()
