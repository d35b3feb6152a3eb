import json
import posixpath
import re
from typing import Any

import numpy as np
import pytest

from tamegrad import Clip, GroupReport, Report, UnmatchedError, normalize

GRADIENTS = {
    "rnn.l0": {"weight": np.array([3.0, 4.0])},
    "out": {"weight": np.array([0.5])},
    "bad": {"weight": np.array([np.nan, np.inf, 1.0])},
}


def test_a_row_is_plain_python_numbers() -> None:
    _, report = normalize(GRADIENTS, Clip(1.0))
    row = report["rnn.l0"]
    assert row == GroupReport("rnn.l0", norm=5.0, scale=0.2, norm_after=1.0, clipped=True, nonfinite=0)
    assert [type(value) for value in (row.norm, row.scale, row.norm_after, row.clipped, row.nonfinite)] == [
        float,
        float,
        float,
        bool,
        int,
    ]
    assert report.rows()[0] == row


def test_an_unknown_name_names_the_closest() -> None:
    _, report = normalize(GRADIENTS, Clip(1.0))
    with pytest.raises(UnmatchedError, match=r"^report\[name\]: got 'rnn.0'; .*3 groups; closest: 'rnn.l0'.*; next: "):
        report["rnn.0"]


def test_an_unknown_name_is_a_key_error_with_a_plain_message() -> None:
    _, report = normalize(GRADIENTS, Clip(1.0))
    with pytest.raises(KeyError) as raised:
        report["unknown"]
    assert str(raised.value) == (
        "report[name]: got 'unknown'; allowed: one of its 3 groups; closest: 'rnn.l0', 'out', 'bad'; "
        "next: report.groups lists them"
    )


@pytest.mark.parametrize("key", [0, -1, slice(1), None, ("out", "bad")])
def test_a_row_by_position_is_refused(key: Any) -> None:
    _, report = normalize(GRADIENTS, Clip(1.0))
    message = r"^report\[.*\]: got a key of type \w+; .*3 groups: 'rnn.l0', 'out', 'bad'; next: .*report.rows\(\)$"
    with pytest.raises(UnmatchedError, match=message):
        report[key]


def test_is_a_collection_of_rows() -> None:
    _, report = normalize({name: GRADIENTS[name] for name in ("rnn.l0", "out")}, Clip(1.0))
    assert list(report) == report.rows() == [report["rnn.l0"], report["out"]]
    assert len(report) == 2
    assert "rnn.l0" in report
    others: list[object] = ["rnn", "bad", 0, None, []]
    assert all(other not in report for other in others)


def test_prints_as_a_table() -> None:
    _, report = normalize(GRADIENTS, Clip(1.0))
    assert str(report).splitlines() == [
        "3 groups, total norm nan, 1 clipped, 1 non-finite",
        "group   norm  scale  norm after  clipped  non-finite",
        "rnn.l0  5     0.2    1           yes",
        "out     0.5   1      0.5",
        "bad     nan   1      nan                  2",
    ]


def test_says_when_the_step_was_skipped() -> None:
    _, report = normalize(GRADIENTS, Clip(1.0), on_nonfinite="skip")
    assert report.skipped
    assert "step skipped" in str(report)
    assert report["rnn.l0"] == GroupReport("rnn.l0", norm=5.0, scale=1.0, norm_after=5.0, clipped=False, nonfinite=0)


class TestScalars:
    def test_are_flat_python_numbers(self) -> None:
        _, report = normalize({name: GRADIENTS[name] for name in ("rnn.l0", "out")}, Clip(1.0))
        scalars = report.as_scalars("grad")
        assert scalars == {
            "grad/total_norm": pytest.approx(25.25**0.5),
            "grad/clipped": 1,
            "grad/nonfinite": 0,
            "grad/skipped": 0,
            "grad/norm/rnn.l0": 5.0,
            "grad/norm/out": 0.5,
            "grad/scale/rnn.l0": 0.2,
            "grad/scale/out": 1.0,
        }
        assert {type(value) for value in scalars.values()} == {int, float}

    def test_leave_out_what_is_not_finite(self) -> None:
        _, report = normalize(GRADIENTS, Clip(1.0))
        scalars = report.as_scalars()
        assert json.loads(json.dumps(scalars, allow_nan=False)) == scalars
        assert scalars["grad/nonfinite"] == 1
        assert "grad/total_norm" not in scalars
        assert "grad/norm/bad" not in scalars
        assert scalars["grad/scale/bad"] == 1.0

    def test_may_have_another_prefix_or_none(self) -> None:
        _, report = normalize({"out": GRADIENTS["out"]}, Clip(1.0))
        assert "generator/grad/norm/out" in report.as_scalars("generator/grad")
        assert "norm/out" in report.as_scalars("")

    def test_names_are_those_that_every_tracker_takes(self) -> None:
        groups = [
            "(root)",
            "root",
            "*/bias",
            "a b",
            "model (2)",
            "rnn.l0/*_weight",
            ".",
            "..",
            "",
            "_own",
            "größe",
            "x//y",
        ]
        _, one = normalize({"out": GRADIENTS["out"]}, Clip(1.0))
        columns = (np.ones(len(groups)),) * 3
        report = Report(
            tuple(groups), *columns, np.zeros(len(groups), bool), np.zeros(len(groups), int), one.total_norm
        )
        names = [name.removeprefix("grad/norm/") for name in report.as_scalars() if name.startswith("grad/norm/")]
        assert names == [
            "root",
            "root_2",
            "all/bias",
            "a_b",
            "model_2",
            "rnn.l0/_weight",
            "all",
            "all_2",
            "all_3",
            "_own",
            "größe",
            "x/all/y",
        ]
        for name in report.as_scalars():
            # MLflow takes letters, digits and these, and no name that is another one when read as a path.
            assert re.fullmatch(r"[\w./ :-]+", name)
            assert posixpath.normpath(name) == name

    def test_say_that_a_step_was_skipped(self) -> None:
        _, report = normalize(GRADIENTS, Clip(1.0), on_nonfinite="skip")
        assert report.as_scalars()["grad/skipped"] == 1


def test_on_the_host_it_is_the_same_with_numpy_arrays() -> None:
    _, report = normalize(GRADIENTS, Clip(1.0), on_nonfinite="skip")
    host = report.on_host()
    assert str(host) == str(report)
    assert host.clipped.dtype == np.bool_
    assert host.nonfinite.dtype == np.int64
    assert host.skipped
