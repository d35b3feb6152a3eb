"""What each sink writes."""

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tamegrad import Clip, MissingExtraError, Report, normalize
from tamegrad.integrations import CsvSink, JsonLinesSink, LoggingSink, TensorBoardSink


def report_of(**layers: list[float]) -> Report[Any]:
    return normalize({name: {"weight": np.array(values)} for name, values in layers.items()}, Clip(1.0))[1]


GOOD = report_of(a=[3.0, 4.0], b=[0.5])
BAD = report_of(a=[math.nan], b=[0.5])
WIDER = report_of(a=[3.0, 4.0], b=[0.5], c=[2.0])


class TestCsv:
    def test_a_row_a_step(self, tmp_path: Path) -> None:
        path = tmp_path / "new folder" / "norms.csv"
        for step, report in ((50, GOOD), (100, BAD)):
            CsvSink(path).write(step, report)
        with path.open(newline="") as file:
            first, second = csv.DictReader(file)
        assert first == {name: str(value) for name, value in {"step": 50, **GOOD.as_scalars()}.items()}
        assert second["step"] == "100"
        assert second["grad/norm/a"] == second["grad/total_norm"] == ""
        assert second["grad/norm/b"] == "0.5"

    def test_more_columns_for_new_groups_and_for_those_that_were_not_finite(self, tmp_path: Path) -> None:
        path, reports = tmp_path / "norms.csv", [BAD, GOOD, WIDER, GOOD]
        sink = CsvSink(path, prefix="")
        for step, report in enumerate(reports):
            sink.write(step, report)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
        for row, report in zip(rows, reports, strict=True):
            scalars = {name: str(value) for name, value in report.as_scalars("").items()}
            assert {name: cell for name, cell in row.items() if cell and name != "step"} == scalars
        assert [path] == list(tmp_path.iterdir())

    def test_a_name_with_a_comma_is_one_cell(self, tmp_path: Path) -> None:
        path = tmp_path / "norms.csv"
        CsvSink(path, prefix='a,"b"').write(1, GOOD)
        with path.open(newline="") as file:
            assert next(csv.DictReader(file))['a,"b"/norm/a'] == "5.0"


def test_json_lines_are_json_by_the_standard(tmp_path: Path) -> None:
    path = tmp_path / "norms.jsonl"
    for step, report in ((50, GOOD), (100, BAD)):
        JsonLinesSink(path).write(step, report)
    lines = [
        json.loads(line, parse_constant=lambda _: pytest.fail("no JSON")) for line in path.read_text().splitlines()
    ]
    assert lines == [{"step": 50, **GOOD.as_scalars()}, {"step": 100, **BAD.as_scalars()}]


@pytest.mark.parametrize("sink", [CsvSink, JsonLinesSink])
def test_a_line_that_was_cut_off_spoils_no_other(sink: Any, tmp_path: Path) -> None:
    path = tmp_path / "norms"
    sink(path).write(1, GOOD)
    path.write_bytes(path.read_bytes()[:-4])
    sink(path).write(2, GOOD)
    sink(tmp_path / "whole").write(2, GOOD)
    assert path.read_text().splitlines()[-1] == (tmp_path / "whole").read_text().splitlines()[-1]


@pytest.mark.parametrize("sink", [CsvSink, JsonLinesSink])
def test_a_file_that_cannot_be_written_is_an_os_error(sink: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="director"):
        sink(tmp_path).write(1, GOOD)
    assert str(tmp_path) in repr(sink(tmp_path))


def test_logging_names_the_largest_finite_group(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tamegrad"):
        LoggingSink().write(50, GOOD)
        LoggingSink(logging.getLogger("tamegrad"), level=logging.DEBUG).write(60, GOOD)
        LoggingSink("tamegrad.other").write(100, BAD)
    assert [record.getMessage() for record in caplog.records] == [
        "step 50: total norm 5.025, 1 of 2 groups clipped, 0 not finite; largest norm 5 (a)",
        "step 100: total norm nan, 0 of 2 groups clipped, 1 not finite; largest norm 0.5 (b)",
    ]
    assert repr(LoggingSink("mine")) == "LoggingSink('mine')"


class TestTensorBoard:
    def test_takes_a_writer_and_flushes_it(self) -> None:
        writer = mock.Mock()
        sink = TensorBoardSink(writer, prefix="g")
        sink.write(50, BAD)
        points = {call.args[0]: call.args[1:] for call in writer.add_scalar.call_args_list}
        assert points == {name: (value, 50) for name, value in BAD.as_scalars("g").items()}
        writer.flush.assert_called_once_with()
        assert repr(writer) in repr(sink)

    def test_says_what_to_install(self, tmp_path: Path) -> None:
        with (
            mock.patch("tamegrad.integrations.tensorboard_sink.find_spec", return_value=None),
            pytest.raises(MissingExtraError, match="pip install tensorboard"),
        ):
            TensorBoardSink(tmp_path)

    def test_the_curves_can_be_read_again(self, tmp_path: Path) -> None:
        accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        sink = TensorBoardSink(tmp_path / "run")
        assert not (tmp_path / "run").exists()
        for step, report in ((50, GOOD), (100, BAD)):
            sink.write(step, report)
        read = accumulator.EventAccumulator(str(tmp_path / "run"))
        read.Reload()
        assert set(read.Tags()["scalars"]) == set(GOOD.as_scalars())
        assert [(point.step, point.value) for point in read.Scalars("grad/norm/a")] == [(50, 5.0)]
        assert [(point.step, point.value) for point in read.Scalars("grad/nonfinite")] == [(50, 0.0), (100, 1.0)]
