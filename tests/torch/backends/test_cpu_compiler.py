"""The disk cache of compiled code: reused, but only if the code would compile the same way now."""

import ast
import errno
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
import torch
from numba.core.caching import CacheImpl, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

from support.gradients import model_with
from support.processes import run_python
from tamegrad import Clip
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.backends.cpu import compiler
from tamegrad.torch.backends.cpu.compiler import Entry


def twice(number: int) -> int:
    return 2 * number


def test_logs_a_compilation_once_and_does_not_compile_what_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO, logger="tamegrad")
    first, second = (Entry(twice) for _ in range(2))
    first.prepare(int, 3)
    first.prepare(int, 4)
    assert [first(3), first(4)] == [6, 8]
    (message,) = caplog.messages
    assert re.fullmatch(
        rf"compiled twice in \d+\.\d s; the next process finds it in {re.escape(str(tmp_path))}.*", message
    )
    caplog.clear()
    second.prepare(int, 3)
    assert second(3) == 6
    assert (first.compilations, second.compilations, caplog.messages) == (1, 0, [])


def test_code_compiled_from_other_sources_is_not_read_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compilations = []
    for version in ("old", "new", "old"):
        monkeypatch.setattr(compiler, "_version", version)
        entry = Entry(twice)
        entry.prepare(int, 3)
        assert entry(3) == 6
        compilations.append(entry.compilations)
    assert compilations == [1, 1, 0]


def test_every_file_that_compiled_code_comes_from_is_in_its_digest() -> None:
    module = importlib.import_module("tamegrad.torch.backends.cpu.loops")
    compiled = [getattr(one, "_dispatcher", one) for one in vars(module).values()]
    used = {word for one in compiled if isinstance(one, Dispatcher) for word in one.py_func.__code__.co_names}
    assert used
    imports = [one for one in ast.parse(inspect.getsource(module)).body if isinstance(one, ast.ImportFrom)]
    sources = {module.__name__, *(str(one.module) for one in imports if {alias.name for alias in one.names} & used)}
    files = {Path(str(sys.modules[source].__file__)) for source in sources if source.startswith("tamegrad.")}
    assert files <= set(compiler.SOURCES)


def test_the_digest_depends_on_the_contents(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("1", encoding="utf-8")
    second.write_text("2", encoding="utf-8")
    before = compiler.digest([first, second])
    second.write_text("3", encoding="utf-8")
    assert compiler.digest([first, second]) != before


def test_logs_nothing_when_nothing_was_compiled(caplog: pytest.LogCaptureFixture) -> None:
    normalizer = GradientNormalizer(model_with([torch.ones(2)]), Clip(1.0), backend="cpu")
    normalizer.normalize_()
    with caplog.at_level(logging.INFO, logger="tamegrad"):
        normalizer.normalize_()
    assert caplog.records == []


def damage(folder: Path, suffix: str, change: Callable[[bytes], bytes]) -> None:
    files = list(folder.rglob(f"*{suffix}"))
    assert files
    for file in files:
        file.write_bytes(change(file.read_bytes()))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "overwritten": lambda content: bytes(len(content)),
    "one bit flipped": lambda content: content[:-200] + bytes([content[-200] ^ 4]) + content[-199:],
}


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cache_is_compiled_again_and_replaced(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    first, second, third = (Entry(twice) for _ in range(3))
    first.prepare(int, 3)
    damage(tmp_path, suffix, DAMAGES[kind])
    second.prepare(int, 3)
    assert second(3) == 6
    # By now, or after one more process, whatever could not be read has been replaced.
    Entry(twice).prepare(int, 3)
    third.prepare(int, 3)
    assert (third(3), third.compilations) == (6, 0)


NOT_CACHED = r"compiled twice in \d+\.\d s; it is not cached, so the next process compiles it again"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cache_that_cannot_be_written_does_not_stop_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    entry = Entry(twice)
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", full)
    with caplog.at_level(logging.INFO, logger="tamegrad"):
        entry.prepare(int, 3)
    assert entry(3) == 6
    failed, _, compiled = caplog.messages  # emptying it fails as well
    assert failed.startswith(f"compiled code is not cached in {tmp_path}")
    assert "No space left on device" in failed
    assert re.fullmatch(
        r"compiled twice in \d+\.\d s; it is not cached, so the next process compiles it again", compiled
    )


def test_says_that_code_is_not_cached_where_numba_finds_no_folder_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    caplog.set_level(logging.INFO, logger="tamegrad")
    entry = Entry(twice)
    entry.prepare(int, 3)
    entry.prepare(int, 4)
    assert entry(3) == 6
    missing, compiled = caplog.messages
    assert missing.startswith("compiled code is not cached on disk: ")
    assert re.fullmatch(
        r"compiled twice in \d+\.\d s; it is not cached, so the next process compiles it again", compiled
    )


FLOAT16_STEP = """
import torch
from tamegrad import Clip
from tamegrad.torch import GradientNormalizer
parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
parameter.grad = torch.tensor([3.0, 4.0], dtype=torch.float16)
normalizer = GradientNormalizer([("p", parameter)], Clip(1.0))
print(normalizer.normalize_().norms.item(), [round(value, 3) for value in parameter.grad.tolist()], normalizer.backend)
"""


@pytest.mark.parametrize("cpu", ["generic", "x86-64"])
def test_float16_works_for_a_cpu_without_conversions(cpu: str) -> None:
    done = run_python(FLOAT16_STEP, check=False, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="")
    assert done.stdout.startswith("5.0 [0.6, 0.8] cpu"), done.stderr


def test_another_backend_is_used_if_numba_may_not_compile() -> None:
    done = run_python(FLOAT16_STEP, check=False, NUMBA_DISABLE_JIT="1")
    assert done.stdout.startswith("5.0 [0.6, 0.8] foreach"), done.stderr
    assert "NUMBA_DISABLE_JIT is set" in done.stdout
