"""`make gpu` finds what is wrong, loses nothing to a section that dies, and claims nothing without a GPU."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tamegrad import Clip
from tamegrad.torch.backends.foreach import ForeachBackend

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, in no package
gpu = importlib.import_module("gpu")
subjects = importlib.import_module("gpu_subjects")
correct = importlib.import_module("gpu_correct")
checks = importlib.import_module("gpu_checks")
times = importlib.import_module("gpu_times")
pages = importlib.import_module("gpu_page")


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    return subjects.Bench(tmp_path / "records.jsonl", 60.0, dry=True)


def records_of(bench: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = gpu.read_records(bench.path)
    return records


def test_every_backend_dtype_and_model_has_a_section() -> None:
    names = [section.name for section in gpu.sections("", dry=False)]
    assert len(names) == len(set(names))
    assert {f"correct:{b}:{d}" for b in ("gpu", "foreach") for d in ("bfloat16", "complex128")} <= set(names)
    assert {"env", "time:xl", "time:tiny", "graph:gpu", "hazard:foreach", "fsdp:gpu", "launches:gpu"} <= set(names)
    assert [section.name for section in gpu.sections("env,time:gpt2,train", dry=False)] == ["env", "time:gpt2", "train"]


def test_the_plain_backend_passes() -> None:
    layers = correct.a_model(torch.float32, 1.0, "gaps", large=30)
    assert correct.compare(layers, Clip(0.5), "foreach", "keep", torch.device("cpu")) == []


def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch, bench: Any) -> None:
    measure = ForeachBackend.measure
    monkeypatch.setattr(ForeachBackend, "measure", lambda *args: measure(*args) * (1 + 1e-9))
    correct.correct(bench, "foreach", "float32")
    (record,) = records_of(bench)
    assert record["failed"] > record["cases"] // 2
    assert "norms" in record["first"][0]


def test_a_gradient_that_should_keep_its_bits_is_compared_bit_by_bit() -> None:
    values = torch.tensor([1.0, -0.0])
    assert list(correct._wrong_values(values, values, torch.tensor([1.0, 0.0]), is_kept=True)) == [
        "bits of a group that keeps its values"
    ]
    assert list(correct._wrong_values(values, values, values, is_kept=True)) == []


def test_hazards_pass_on_the_cpu(bench: Any) -> None:
    checks.hazard(bench, "foreach")
    assert [record["result"] for record in records_of(bench)] == ["ok"] * 5


def test_results_that_differ_from_run_to_run_are_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = ForeachBackend.measure
    noise = iter(torch.tensor([1.0 + 1e-12 * turn for turn in range(50)], dtype=torch.float64))
    monkeypatch.setattr(ForeachBackend, "measure", lambda *args: measure(*args) * next(noise))
    checks.hazard(bench, "foreach")
    results = {record["what"]: record["result"] for record in records_of(bench)}
    assert "different results of one input" in results["the same bits"]


def test_times_of_all_tools(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "BACKENDS", ("foreach",))
    times.times(bench, "linears")
    found = records_of(bench)
    assert found[0]["kind"] == "subject"
    timed = [record for record in found if record["kind"] == "time"]
    assert len(timed) == 2 * 6
    assert all(record["gpu"] > 0 and record["wall"] >= record["host"] > 0 for record in timed)


class TestSectionsThatDie:
    """A section has a process of its own."""

    SCRIPT = """
import sys, time
with open(sys.argv[2], "w") as file:
    file.write('{"kind": "time", "tool": "first"}\\n{"kind": "ti')
{end}
"""

    @pytest.mark.parametrize(
        ("end", "ended"),
        [
            ("sys.exit('lost the GPU')", "exit code 1"),
            ("import os; os.abort()", "exit code -6"),
            ("time.sleep(60)", "time limit"),
        ],
        ids=["exits", "crashes", "hangs"],
    )
    def test_lose_only_what_they_had_not_written(
        self, end: str, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "gpu_section.py").write_text(self.SCRIPT.replace("{end}", end))
        monkeypatch.setattr(gpu, "HERE", tmp_path)
        seconds = -4.0 if ended == "time limit" else 30.0
        outcome = gpu.run_section(gpu.Section("time:gpt2", seconds), seconds, tmp_path, dry=True)
        assert outcome.ended == ended
        if ended != "time limit":
            assert outcome.records == [{"kind": "time", "tool": "first"}]

    def test_without_time_none_is_started(self, tmp_path: Path) -> None:
        outcomes = gpu.run_all([gpu.Section("train", 50)], 1.0, tmp_path, dry=True, workers=1)
        assert [outcome.ended for outcome in outcomes] == ["left out, no time"]


def outcomes(**changes: Any) -> list[Any]:
    env = {
        "kind": "env",
        "device": "A GPU",
        "torch": "2",
        "triton": "3",
        "python": "3",
        "copy_gbs": 1.0,
        "auto": "foreach",
    }
    subject = {"kind": "subject", "model": "gpt2", "tensors": 148, "bytes": 10**9, "read": 1.0, "write": 2.0}
    timed = {"kind": "time", "model": "gpt2", "share": "everything clipped", "host": 1.0, "peak": 10**6}
    ours = {**timed, "tool": "tamegrad gpu, Clip", "gpu": 3.3, **changes}
    theirs = {**timed, "tool": "torch clip_grad_norm_", "gpu": 5.0}
    died = gpu.Outcome("train", "time limit", log="Traceback\nout of memory")
    return [gpu.Outcome("env", "ok", [env]), gpu.Outcome("time:gpt2", "ok", [subject, ours, theirs]), died]


@pytest.mark.parametrize(
    ("changes", "losing"),
    [
        ({}, "None."),
        ({"gpu": 6.0}, "takes 1.20 times the gpu time of `torch clip_grad_norm_`"),
        ({"gpu": 3.6}, "takes 1.20 times the floor; the aim is 1.15"),
        ({"host": 2.0}, "takes 2.00 times the host time of `torch clip_grad_norm_`"),
        ({"peak": 2 * 10**7}, "takes 2.0% of the gradients' memory"),
        ({"error": "RuntimeError: sm_999"}, "raised or got no time: RuntimeError: sm_999"),
    ],
    ids=str,
)
def test_the_page_says_where_it_loses(changes: dict[str, Any], losing: str) -> None:
    page = pages.page(outcomes(**changes))
    assert losing in page.partition("## Where it loses")[2].partition("## What was found")[0]
    assert "A GPU, PyTorch 2, Triton 3" in page
    assert "`train`: time limit" in page


def test_without_a_gpu_no_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    monkeypatch.setattr(gpu, "run_all", lambda *_, dry, **__: outcomes()[:1] if dry else None)
    page = tmp_path / "speed-gpu.md"
    assert gpu.main(["--out", str(tmp_path), "--write", str(page)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No GPU was found")
    assert "auto takes foreach" in printed
    assert not page.exists()
    assert json.loads((tmp_path / "gpu.json").read_text())[0]["section"] == "env"
    # With one, it is.
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "run_all", lambda *_, **__: outcomes())
    assert gpu.main(["--out", str(tmp_path), "--write", str(page)]) == 1
    assert page.read_text().startswith("# Speed on a GPU")
