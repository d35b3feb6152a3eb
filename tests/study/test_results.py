import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tamegrad.study.compare import Comparison, compare
from tamegrad.study.results import Results, RunResults, make_results, read_results, write_results
from tamegrad.study.settings import Settings
from tamegrad.study.text import Text
from tamegrad.study.train import Run, Step

ENVIRONMENT: dict[str, Any] = {"command": "tamegrad compare", "python": "3.11"}


@pytest.fixture
def text() -> Text:
    return Text(b"".join(b"%d bottles of beer, %d of wine\n" % (n, n * n) for n in range(500)), "a song", 1)


@pytest.fixture
def trouble(text: Text) -> Results:
    """Two runs, one of which soon becomes non-finite."""
    settings = Settings(strategies=("None", "RenormalizeL2PerParamType"), steps=3, lr=1e4)
    return make_results(compare(settings, text, lambda _: None), ENVIRONMENT)


def strict(path: Path) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_file_is_strict_json_with_strings_for_nonfinite_numbers(tmp_path: Path, trouble: Results) -> None:
    document = strict(write_results(trouble, tmp_path))
    assert document["schema"] == 1
    assert document["partial"] is False
    assert document["runs"][0]["train_loss"][-1] == "NaN"


def test_results_survive_a_round_trip(tmp_path: Path, trouble: Results) -> None:
    # repr, because NaN equals nothing.
    assert repr(read_results(write_results(trouble, tmp_path))) == repr(trouble)


def test_nonfinite_numbers_survive_a_round_trip(tmp_path: Path, text: Text) -> None:
    steps = [Step(loss, loss, (loss,), (False,), 1.0) for loss in (math.inf, -math.inf, math.nan, 0.1)]
    run = Run("ClipL2PerLayer", math.inf, ("out",), steps, [(0, 5.0)])
    results = make_results(Comparison(Settings(threshold=math.inf), text, (run,), partial=True), ENVIRONMENT)
    assert repr(read_results(write_results(results, tmp_path))) == repr(results)
    assert strict(tmp_path / "results.json")["settings"]["threshold"] == "Infinity"


def test_a_path_named_nan_stays_text(tmp_path: Path) -> None:
    results = make_results(Comparison(Settings(), Text(b"text", "NaN", 1), (), partial=True), ENVIRONMENT)
    assert read_results(write_results(results, tmp_path))["text"]["source"] == "NaN"


def test_no_temporary_file_is_left(tmp_path: Path, trouble: Results) -> None:
    write_results(trouble, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_keys_match_the_schema(trouble: Results) -> None:
    assert set(trouble) == set(Results.__annotations__)
    assert all(set(run) == set(RunResults.__annotations__) for run in trouble["runs"])
    assert set(trouble["settings"]) == {
        *("network", "strategies", "threshold", "steps", "seed", "lr", "optimizer", "batch", "length"),
        *("embedding", "hidden", "stacked", "uniform_loss", "diverged_loss"),
    }
    assert set(trouble["text"]) == {"source", "files", "bytes", "held_out_bytes"}


def test_the_lists_of_a_run_have_the_same_length(trouble: Results) -> None:
    for run in trouble["runs"]:
        of_layers = [len(column) for part in (run["layer_norms"], run["layer_clipped"]) for column in part.values()]
        lengths = {len(run["train_loss"]), len(run["norm"]), len(run["milliseconds"]), *of_layers}
        assert len(lengths) == 1


def test_the_summary_matches_the_steps(text: Text) -> None:
    norms = (3.0, math.nan, 1.0, 2.0)
    clipped = ((False, True), (False, False), (True, True), (False, False))
    steps = [Step(5.0, norm, (norm, norm), cut, norm * 2) for norm, cut in zip(norms, clipped, strict=True)]
    run = Run("ClipL2PerLayer", 0.5, ("rnn.l0", "out"), steps, [(0, 5.5), (4, 2.0)], "completed")
    (summary,) = make_results(Comparison(Settings(), text, (run,), partial=False), ENVIRONMENT)["runs"]
    assert summary["means"] == 'Clip(0.5, per="layer")'
    assert (summary["first_loss"], summary["final_loss"]) == (5.5, 2.0)
    assert summary["median_norm"] == 3.0
    assert summary["largest_norm"] is not None
    assert math.isnan(summary["largest_norm"])
    assert summary["clipped_share"] == 0.5
    assert summary["layer_clipped_share"] == {"rnn.l0": 0.25, "out": 0.5}


def test_a_run_that_never_started_has_no_numbers(text: Text) -> None:
    comparison = Comparison(Settings(), text, (Run("None", None),), partial=True)
    (summary,) = make_results(comparison, ENVIRONMENT)["runs"]
    assert summary["ended"] == "interrupted"
    assert summary["final_loss"] is summary["median_norm"] is summary["clipped_share"] is None
