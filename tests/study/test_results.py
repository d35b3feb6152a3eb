import json
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tamegrad.study.compare import Comparison, compare
from tamegrad.study.results import Results, RunResults, StrategyResults, make_results, read_results, write_results
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
    assert document["schema"] == 2
    assert document["partial"] is False
    assert document["runs"][0]["train_loss"][-1] == "NaN"


def test_results_survive_a_round_trip(tmp_path: Path, trouble: Results) -> None:
    # repr, because NaN equals nothing.
    assert repr(read_results(write_results(trouble, tmp_path))) == repr(trouble)


def test_nonfinite_numbers_survive_a_round_trip(tmp_path: Path, text: Text) -> None:
    steps = [Step(loss, loss, (loss,), (False,), 1.0) for loss in (math.inf, -math.inf, math.nan, 0.1)]
    run = Run("ClipL2PerLayer", math.inf, 0, ("out",), steps, [(0, 5.0)])
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
    assert all(set(strategy) == set(StrategyResults.__annotations__) for strategy in trouble["strategies"])
    assert set(trouble["settings"]) == {
        *("network", "strategies", "threshold", "steps", "seed", "seeds", "lr", "optimizer", "batch", "length"),
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
    run = Run("ClipL2PerLayer", 0.5, 0, ("rnn.l0", "out"), steps, [(0, 5.5), (4, 2.0)], "completed")
    (summary,) = make_results(Comparison(Settings(), text, (run,), partial=False), ENVIRONMENT)["runs"]
    assert summary["means"] == 'Clip(0.5, per="layer")'
    assert (summary["first_loss"], summary["final_loss"]) == (5.5, 2.0)
    assert summary["median_norm"] == 3.0
    assert summary["largest_norm"] is not None
    assert math.isnan(summary["largest_norm"])
    assert summary["clipped_share"] == 0.5
    assert summary["layer_clipped_share"] == {"rnn.l0": 0.25, "out": 0.5}


def test_a_run_that_never_started_has_no_numbers(text: Text) -> None:
    comparison = Comparison(Settings(), text, (Run("None", None, 0),), partial=True)
    (summary,) = make_results(comparison, ENVIRONMENT)["runs"]
    assert summary["ended"] == "interrupted"
    assert summary["final_loss"] is summary["median_norm"] is summary["clipped_share"] is None


def seeded(text: Text, finals: list[float], ended: list[str]) -> StrategyResults:
    """The results of one strategy whose runs, one per seed, ended with these losses."""
    runs = []
    for seed, (final, end) in enumerate(zip(finals, ended, strict=True)):
        steps = [Step(99.0 if seed == 1 else 5.0, seed + 1.0, (1.0, 2.0), (True, seed == 1), 1.0)] * 2
        run = Run("ClipL2PerLayer", 0.5, seed, ("rnn.l0", "out"), steps, [(0, 5.5 + seed), (2, final)])
        run.ended = end  # type: ignore[assignment]  # one of its literals
        runs.append(run)
    comparison = Comparison(Settings(seeds=len(runs)), text, tuple(runs), partial=False)
    (strategy,) = make_results(comparison, ENVIRONMENT)["strategies"]
    return strategy


def test_a_strategy_has_the_mean_and_the_range_over_the_seeds(text: Text) -> None:
    strategy = seeded(text, [2.0, 3.0, 2.5], ["completed"] * 3)
    assert strategy["seeds"] == [0, 1, 2]
    assert strategy["final_loss"] == {"mean": 2.5, "lowest": 2.0, "highest": 3.0}
    assert strategy["first_loss"] == {"mean": 6.5, "lowest": 5.5, "highest": 7.5}
    assert strategy["diverged_at"] == [None, 1, None]
    assert strategy["recovered"] == [False, False, False]
    assert (strategy["median_norm"], strategy["largest_norm"]) == (2.0, 3.0)
    assert strategy["clipped_share"] == 1.0
    assert strategy["layer_clipped_share"] == {"rnn.l0": 1.0, "out": 1 / 3}


def test_a_nonfinite_loss_of_one_seed_is_the_highest_and_in_the_mean(text: Text) -> None:
    spread = seeded(text, [math.nan, 2.0], ["non-finite", "completed"])["final_loss"]
    assert spread is not None
    assert spread["lowest"] == 2.0
    assert math.isnan(spread["mean"])
    assert math.isnan(spread["highest"])


def test_an_interrupted_run_counts_only_if_there_is_no_other(text: Text) -> None:
    strategy = seeded(text, [2.0, 9.0], ["completed", "interrupted"])
    assert (strategy["seeds"], strategy["interrupted"], strategy["final_loss"]) == (
        [0],
        False,
        {"mean": 2.0, "lowest": 2.0, "highest": 2.0},
    )
    assert seeded(text, [9.0], ["interrupted"])["interrupted"]


def test_a_file_of_schema_1_is_read(tmp_path: Path, trouble: Results) -> None:
    file = write_results(trouble, tmp_path)
    document = json.loads(file.read_text())
    old = {**document, "schema": 1, "recommended": "RenormalizeL2PerParamType", "recommendation": "Use it."}
    del old["together"], old["strategies"], old["settings"]["seeds"]
    for run in old["runs"]:
        del run["seed"]
    file.write_text(json.dumps(old))
    expected = {
        **trouble,
        "recommended": old["recommended"],
        "recommendation": "Use it.",
        "together": [old["recommended"]],
    }
    # As text, because NaN equals nothing.
    assert json.dumps(read_results(file), sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_a_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, trouble: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def fill_the_disk(path: Path, content: str, **given: Any) -> None:
        write_text(path, content[:10], **given)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_results(trouble, tmp_path)
    assert list(tmp_path.iterdir()) == []
