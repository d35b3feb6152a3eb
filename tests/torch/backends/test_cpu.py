"""Where the CPU backend can go wrong: bounds, threads, memory around gradients, and a Python without Numba."""

import ctypes
import math
import mmap
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.contract import bits
from support.gradients import model_with, random_gradients
from support.processes import run_python
from tamegrad import Clip, ClipValue, Keep, MissingExtraError, Renormalize
from tamegrad.torch import GradientNormalizer, normalize_grad_
from tamegrad.torch.backends import select
from tamegrad.torch.backends.cpu import threads, work
from tamegrad.torch.backends.cpu.loops import BLOCK
from tamegrad.torch.backends.cpu.work import CHUNK
from tamegrad.torch.memory import DTYPES

LENGTHS = (0, 1, 2, 63, 64, 65, 1000, 4095, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
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
def test_any_number_and_kind_of_threads_gives_the_same_bits(
    strategy: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for count, openmp in ((1, OPENMP), (2, OPENMP), (3, OPENMP), (2, 0), (3, 0)):
        torch.set_num_threads(count)
        monkeypatch.setattr(threads, "_openmp", [openmp])
        gradients = random_gradients((*LENGTHS, *[5] * 300, 20 * CHUNK + 1), dtype)
        report = normalize_grad_(model_with(gradients), strategy, backend="cpu")
        results.append((report.norms, report.norms_after, report.total_norm, *gradients))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_lengths_around_every_bound_match_foreach(strategy: Any, dtype: torch.dtype) -> None:
    compiled, plain = (model_with(random_gradients(LENGTHS, dtype)) for _ in range(2))
    report = normalize_grad_(compiled, strategy, backend="cpu")
    expected = normalize_grad_(plain, strategy, backend="foreach")
    torch.testing.assert_close(report.norms, expected.norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(report.norms_after, expected.norms_after, rtol=1e-13, atol=0)
    assert report.clipped.equal(expected.clipped)
    tolerance = 4 * torch.finfo(dtype).eps
    for parameter, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_and_rounded_as_in_torch(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    one_each = [value.reshape(1).clone() for value in finite[:: 97 if dtype == torch.bfloat16 else 61]]
    report = normalize_grad_(model_with(one_each), Clip(float("inf"), per="tensor"), backend="cpu")
    assert report.norms.equal(torch.cat(one_each).double().abs())
    compiled, plain = finite.clone(), finite.clone()
    strategy = Clip(finite.double().norm().item() / 3)
    normalize_grad_(model_with([compiled]), strategy, backend="cpu")
    normalize_grad_(model_with([plain]), strategy, backend="foreach")
    assert compiled.view(torch.int16).equal(plain.view(torch.int16))
    normalize_grad_(model_with([compiled]), ClipValue(0.3), backend="cpu")
    normalize_grad_(model_with([plain]), ClipValue(0.3), backend="foreach")
    assert compiled.view(torch.int16).equal(plain.view(torch.int16))
    counts = normalize_grad_(model_with([every.clone()]), Keep(), backend="cpu").nonfinite
    assert counts.tolist() == [(~every.isfinite()).sum().item()]


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "places",
    [
        (0,),
        (BLOCK - 1,),
        (BLOCK,),
        (2 * BLOCK - 1, 2 * BLOCK),
        (BLOCK, 3 * BLOCK),
        (CHUNK - 1,),
        (CHUNK,),
        (-1,),
    ],
    ids=str,
)
def test_a_cut_value_is_found_at_any_position(places: tuple[int, ...], dtype: torch.dtype) -> None:
    compiled = torch.full((CHUNK + 5,), -0.25, dtype=dtype)
    for place in places:
        compiled[place] = -3.0
    plain = compiled.clone()
    report = normalize_grad_(model_with([compiled]), ClipValue(0.5), backend="cpu")
    expected = normalize_grad_(model_with([plain]), ClipValue(0.5), backend="foreach")
    torch.testing.assert_close(report.norms, expected.norms, rtol=1e-13, atol=0)
    torch.testing.assert_close(report.norms_after, expected.norms_after, rtol=1e-13, atol=0)
    assert report.clipped.tolist() == [True]
    assert compiled.equal(plain)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_a_limit_between_two_values_of_the_dtype_cuts_as_in_foreach(dtype: torch.dtype) -> None:
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
        compiled, plain = values.clone(), values.clone()
        report = normalize_grad_(model_with([compiled]), ClipValue(limit), backend="cpu")
        assert report.clipped.equal(normalize_grad_(model_with([plain]), ClipValue(limit), backend="foreach").clipped)
        assert bits(compiled).equal(bits(plain))


@pytest.mark.parametrize("strategy", [Clip(1.0), ClipValue(0.5)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_one_nonfinite_value_is_found_at_any_position(dtype: torch.dtype, value: float, strategy: Any) -> None:
    for place in (0, 15, BLOCK - 1, BLOCK, CHUNK - 1, CHUNK, CHUNK + BLOCK + 2):
        gradient = torch.ones(CHUNK + BLOCK + 3, dtype=dtype)
        gradient[place] = value
        before = gradient.clone()
        report = normalize_grad_(model_with([gradient]), strategy, backend="cpu")
        assert report.nonfinite.tolist() == [1]
        assert bits(gradient).equal(bits(before))


@pytest.mark.parametrize("limit", [math.inf, 0.5])
@pytest.mark.parametrize("large", [0.0, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("small", [0.0, 1e-45, 1e-30])
def test_the_squares_of_huge_and_tiny_float32_values_are_exact(small: float, large: float, limit: float) -> None:
    gradient = torch.full((CHUNK + 1,), small)
    gradient[-2:] = large
    wide = gradient.double()
    report = normalize_grad_(model_with([gradient]), ClipValue(limit), backend="cpu")
    torch.testing.assert_close(report.norms[0], wide.norm(), rtol=1e-13, atol=0)
    torch.testing.assert_close(report.norms_after[0], wide.clamp(max=limit).norm(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("strategy", [Clip(1.0), ClipValue(1.0)], ids=str)
def test_float64_values_whose_squares_underflow_do_not_count_as_zeros(strategy: Any) -> None:
    gradients = [torch.full((CHUNK,), value, dtype=torch.float64) for value in (0.0, 5e-324, 1e-200)]
    report = normalize_grad_(model_with(gradients), type(strategy)(1.0), backend="cpu")
    expected = 256 * math.hypot(5e-324, 1e-200)
    assert report.norms.tolist() == pytest.approx([expected], rel=1e-13)
    tiny = normalize_grad_(model_with(gradients[:2]), strategy, backend="cpu")
    assert tiny.norms.tolist() == [256 * 5e-324]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("length", [1, 65, CHUNK + 1])
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
    # A write to these pages would crash the process.
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
    chunks, dtypes = work.cut_into_chunks(np.array([7, count, 0, 0]), np.array([2, 4, 2, -1]))
    assert chunks[0].tolist() == [0, 0, 7]
    long = chunks[dtypes == 4]
    assert (long[1:, 1] == long[:-1, 1] + long[:-1, 2]).all()
    assert (long[0, 1], long[-1, 1] + long[-1, 2], long[:, 2].max()) == (0, 2 * count, CHUNK)
    assert len(chunks) == len(long) + 1


def test_addresses_past_2_to_the_31_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the pages that are touched take memory.
    huge = torch.from_numpy(np.zeros(2**31 + 100, dtype=np.int16)).view(torch.bfloat16)
    huge[-1], huge[3] = 3.0, 4.0

    def only_the_ends(counts: Any, dtypes: Any) -> Any:
        chunks, of = cut(counts, dtypes)
        return (chunks[[0, -1]], of[[0, -1]]) if len(chunks) else (chunks, of)

    cut = work.cut_into_chunks
    monkeypatch.setattr(work, "cut_into_chunks", only_the_ends)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    parameter.data = huge
    parameter.grad = huge
    report = normalize_grad_([("p", parameter)], Clip(1.0), backend="cpu")
    assert report.norms.tolist() == [5.0]
    assert (huge[-1].item(), huge[3].item()) == pytest.approx((0.6, 0.8), rel=1e-2)


def test_several_threads_may_normalize_at_once() -> None:
    def normalized(seed: int) -> Tensor:
        gradient = torch.randn(20 * CHUNK, generator=torch.Generator().manual_seed(seed))
        normalizer = GradientNormalizer(model_with([gradient]), Clip(1.0), backend="cpu")
        for _ in range(5):
            gradient.mul_(3.0)
            normalizer.normalize_()
        return gradient

    alone = [normalized(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, alone, pool.map(normalized, range(4))))


@pytest.mark.skipif(not torch._C.has_openmp, reason="this PyTorch has threads, but not OpenMP's")
def test_no_thread_is_started_besides_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ThreadPoolExecutor] = []
    monkeypatch.setattr(threads, "_pools", started)
    torch.set_num_threads(2)
    for openmp in (OPENMP, 0):
        assert started == []
        monkeypatch.setattr(threads, "_openmp", [openmp])
        report = normalize_grad_(model_with([torch.ones(16 * CHUNK)]), Clip(1e9), backend="cpu")
        assert report.norms.tolist() == [4 * math.sqrt(CHUNK)]
    assert len(started) == 1
    started[0].shutdown()


def test_a_forked_process_starts_its_own_threads() -> None:
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
    # PyTorch's own threads do not survive a fork, so the child makes no large tensor.
    done = run_python(code)
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


def test_the_second_process_finds_what_the_first_compiled() -> None:
    # What the first one finds in the cache depends on what ran before.
    first, second = (run_python(LOG_OF_A_STEP) for _ in range(2))
    assert first.stdout == second.stdout
    assert "tamegrad" not in second.stderr


def test_without_numba_it_falls_back_to_foreach_and_says_so() -> None:
    done = run_python("import sys; sys.modules['numba'] = None\n" + LOG_OF_A_STEP)
    backend, gradient = done.stdout.strip().split("|")
    assert backend.startswith("foreach (the only parameter is on the CPU, but Numba cannot be used: ")
    assert backend.endswith("; pip install 'tamegrad[cpu]')")
    assert [round(value, 6) for value in eval(gradient)] == [0.6, 0.8]  # noqa: S307  what the test printed


def test_numba_is_not_imported_before_it_is_needed() -> None:
    assert run_python("import sys, tamegrad.torch; print('numba' in sys.modules)").stdout.strip() == "False"


def test_asking_for_a_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tamegrad.torch.backends.cpu", None)
    message = r'^backend="cpu": got a Python in which Numba .*; allowed: .*; next: pip install \'tamegrad\[cpu\]\'$'
    with pytest.raises(MissingExtraError, match=message):
        normalize_grad_(model_with([torch.ones(2)]), Clip(1.0), backend="cpu")


def test_auto_says_which_backend_it_picked_and_why() -> None:
    normalizer = GradientNormalizer(model_with([torch.ones(2), torch.ones(3)]), Clip(1.0))
    assert str(normalizer.backend) == "cpu (all 2 parameters are on the CPU)"
    assert str(select("cpu", [])) == "cpu (as asked)"
    elsewhere = [torch.empty(2), torch.empty(2, device="meta")]
    assert str(select("auto", elsewhere)) == "foreach (the 2 parameters are on cpu, meta)"


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.skipif(not OPENMP, reason="this PyTorch does not use OpenMP")
def test_another_python_thread_runs_while_gradients_are_measured(count: int) -> None:
    normalizer = GradientNormalizer(model_with([torch.ones(2**25)]), Clip(1e9), backend="cpu")
    torch.set_num_threads(count)
    normalizer.normalize_()
    times: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            times.append(time.perf_counter())
            time.sleep(0)

    def ran_in_between() -> bool:
        start = time.perf_counter()
        normalizer.normalize_()
        end = time.perf_counter()
        # With the GIL held, the other thread could only run at the beginning and at the end.
        return any(start + (end - start) / 4 < moment < end - (end - start) / 4 for moment in times)

    ticking = threading.Thread(target=tick)
    ticking.start()
    # On a busy machine the thread may not get a turn every time.
    seen = any(ran_in_between() for _ in range(50))
    done.set()
    ticking.join()
    assert seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_single_cut_value_is_found_among_many_that_are_not(dtype: torch.dtype) -> None:
    gradients = [torch.full((CHUNK,), 0.5, dtype=dtype) for _ in range(3)]
    model = model_with([gradient.clone() for gradient in gradients])
    normalizer = GradientNormalizer(model, ClipValue(1.0), backend="cpu")
    assert normalizer.normalize_().scales.tolist() == [1.0]
    model.p1.grad[17] = 3.0
    report = normalizer.normalize_()
    quarter = 3 * CHUNK * 0.25
    assert report.norms.item() == math.sqrt(quarter + 8.75)
    assert report.norms_after.item() == math.sqrt(quarter + 0.75)
    assert model.p1.grad[16:19].tolist() == [0.5, 1.0, 0.5]
    assert torch.equal(model.p0.grad, gradients[0])


@pytest.mark.parametrize(
    ("strategy", "gradient", "scale"),
    [
        (Clip(5.0), [3.0, 4.0], 1.0),
        (Clip(math.nextafter(5.0, 0.0)), [3.0, 4.0], math.nextafter(1.0, 0.0)),
        (Clip(math.nextafter(5.0, 6.0)), [3.0, 4.0], 1.0),
        (Renormalize(), [1.0, 0.0], 1.0),
        (Renormalize(), [0.0, 0.0], 1.0),
        (Renormalize(), [2.0, 0.0], 0.5),
        (Renormalize(), [0.5, 0.0], 2.0),
        (Renormalize(), [1e-300, 0.0], 1e300),
        (Renormalize(), [1e300, 0.0], 1e-300),
        (ClipValue(4.0), [3.0, 4.0], 1.0),
        (Keep(), [1e300, 1e300], 1.0),
    ],
    ids=str,
)
def test_the_scale_is_1_exactly_when_nothing_changes(strategy: Any, gradient: list[float], scale: float) -> None:
    model = model_with([torch.ones(2, dtype=torch.float64)])
    normalizer = GradientNormalizer(model, strategy, backend="cpu")
    normalizer.normalize_()
    model.p0.grad = torch.tensor(gradient, dtype=torch.float64)
    report = normalizer.normalize_()
    assert report.scales.item() == pytest.approx(scale, rel=1e-15)
    assert (report.scales.item() == 1.0) == (scale == 1.0) == (model.p0.grad.tolist() == gradient)
