"""What is kept on disk of compiled code: read again, and only while it is what would be compiled."""

import ast
import importlib
import inspect
import logging
import re
import sys
from pathlib import Path

import numba
import pytest
import torch
from numba.core.dispatcher import Dispatcher

from support.gradients import model_with
from tamegrad import Clip
from tamegrad.torch import GradientNormalizer
from tamegrad.torch.kernels import jit
from tamegrad.torch.kernels.jit import Entry


def twice(number: int) -> int:
    return 2 * number


def test_compiling_is_said_once_and_what_is_on_the_disk_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO, logger="tamegrad")
    first, second = (Entry(twice, nogil=True) for _ in range(2))
    assert [first(3), first(4)] == [6, 8]
    (said,) = caplog.messages
    assert re.fullmatch(
        rf"compiled twice in \d+\.\d s; the next process finds it in {re.escape(str(tmp_path))}.*", said
    )
    caplog.clear()
    assert second(3) == 6
    assert (first.compilations, second.compilations, caplog.messages) == (1, 0, [])


def test_nothing_is_taken_from_the_disk_that_was_compiled_from_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compilations = []
    for version in ("old", "new", "old"):
        monkeypatch.setattr(jit, "_version", version)
        entry = Entry(twice, nogil=True)
        assert entry(3) == 6
        compilations.append(entry.compilations)
    assert compilations == [1, 1, 0]


@pytest.mark.parametrize("name", ["cpu_decide", "cpu_loops", "cpu_step", "objects"])
def test_whatever_compiled_code_is_made_of_counts_as_its_source(name: str) -> None:
    module = importlib.import_module(f"tamegrad.torch.kernels.{name}")
    compiled = [getattr(one, "_dispatcher", one) for one in vars(module).values()]
    used = {word for one in compiled if isinstance(one, Dispatcher) for word in one.py_func.__code__.co_names}
    assert used
    imports = [one for one in ast.parse(inspect.getsource(module)).body if isinstance(one, ast.ImportFrom)]
    sources = {module.__name__, *(str(one.module) for one in imports if {alias.name for alias in one.names} & used)}
    files = {Path(str(sys.modules[source].__file__)) for source in sources if source.startswith("tamegrad.")}
    assert files <= set(jit.SOURCES)


def test_files_of_other_contents_have_another_digest(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("1", encoding="utf-8")
    second.write_text("2", encoding="utf-8")
    before = jit.digest([first, second])
    second.write_text("3", encoding="utf-8")
    assert jit.digest([first, second]) != before


def test_says_nothing_on_the_log_when_nothing_was_compiled(caplog: pytest.LogCaptureFixture) -> None:
    normalizer = GradientNormalizer(model_with([torch.ones(2)]), Clip(1.0), backend="cpu")
    # The first and the second step are compiled apart.
    normalizer.normalize_()
    normalizer.normalize_()
    with caplog.at_level(logging.INFO, logger="tamegrad"):
        normalizer.normalize_()
    assert caplog.records == []
