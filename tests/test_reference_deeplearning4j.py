"""`tamegrad.normalize` against what Deeplearning4j computed, and that none of its data stays unused."""

from typing import Any

import pytest
from numpy.typing import NDArray

from support.dl4j import (
    DTYPES,
    NETWORKS,
    TRAINED,
    Case,
    Entry,
    assert_gradients_agree,
    edge_cases,
    gradient_cases,
    load,
    manifest,
    training_runs,
)
from support.dl4j_edges import (
    ALIKE,
    UNLIKE,
    EdgeGroup,
    assert_as_deeplearning4j,
    assert_as_defined,
    assert_deeplearning4j_is_wrong_as_told,
    assert_finite_layers_are_renormalized,
    mixed,
)
from tamegrad import GradientNormalization, GroupReport, Renormalize, Report, normalize

ENTRIES: list[Entry] = [*gradient_cases(), *edge_cases(), *training_runs()]


@pytest.mark.parametrize("case", gradient_cases(), ids=lambda case: case.label)
def test_gradients_are_deeplearning4js(case: Case) -> None:
    after, _ = normalize(case.before, case.policy)
    assert_gradients_agree(case, "normalize", after)


@pytest.mark.parametrize("case", ALIKE, ids=lambda case: case.label)
def test_edge_where_deeplearning4j_is_right(case: Case) -> None:
    after, report = normalize(case.before, case.policy)
    assert_as_deeplearning4j(case, after)
    assert_as_defined(case, after, lambda group: _row(report, group))


@pytest.mark.parametrize("case", UNLIKE, ids=lambda case: case.label)
def test_edge_where_tamegrad_differs_on_purpose(case: Case) -> None:
    assert_deeplearning4j_is_wrong_as_told(case)
    after, report = normalize(case.before, case.policy)
    assert_as_defined(case, after, lambda group: _row(report, group))
    with pytest.raises(AssertionError):
        assert_as_deeplearning4j(case, after)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("fill", ["nan", "infinite"])
def test_one_nonfinite_layer_keeps_no_other_from_being_normalized(fill: str, dtype: str) -> None:
    before = mixed(fill, dtype)
    after, report = normalize(before, Renormalize(per="layer"))
    assert_finite_layers_are_renormalized(before, after)
    assert [row.nonfinite for row in report.rows()] == [1, 0, 0]


@pytest.mark.parametrize("file", dict.fromkeys(entry.file for entry in ENTRIES))
def test_policy_gives_each_layer_what_deeplearning4j_resolved(file: str) -> None:
    for entry in ENTRIES:
        for layer in entry.layers if entry.file == file else ():
            expected = GradientNormalization(layer.strategy)(layer.threshold)
            assert entry.policy.strategy_for(layer.name) == expected, f"{entry.label}: {layer.name}"


def test_every_case_and_run_of_the_manifests_is_checked() -> None:
    for cases, count in ((gradient_cases(), 6 * 2 * 40), (edge_cases(), 2 * 36), (training_runs(), 2 * 2 * 28)):
        listed = {entry.file: manifest(entry.file) for entry in cases}
        ids = [(file, raw["id"]) for file, each in listed.items() for raw in each.get("cases") or each["runs"]]
        assert [(entry.file, entry.id) for entry in cases] == ids
        assert len(cases) == count
    assert len(ALIKE) + len(UNLIKE) == 2 * 36
    # 2 + 4 + 2 + 5 pairs of fill and strategy, in two dtypes.
    assert len(UNLIKE) == 2 * 13


@pytest.mark.parametrize("network", [*NETWORKS, "edges"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_array_of_gradients_is_read(network: str, dtype: str) -> None:
    file = f"gradients/{network}-{dtype}"
    cases = [case for case in [*gradient_cases(), *edge_cases()] if case.file == file]
    assert set().union(*(case.keys(case.before_at) | case.keys(case.after_at) for case in cases)) == set(load(file))


@pytest.mark.parametrize("network", TRAINED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_array_of_training_is_read(network: str, dtype: str) -> None:
    file = f"training/{network}-{dtype}"
    runs = [run for run in training_runs() if run.file == file]
    read = {"features0", "labels"} | runs[0].keys("start")
    for run in runs:
        read |= {f"{run.id}/score"}.union(*(run.keys(f"{run.id}/step{step}") for step in (1, 5, 20)))
    assert read == set(load(file))


def _row(report: Report[NDArray[Any]], group: EdgeGroup) -> GroupReport:
    return report[group.layer if group.param_type is None else f"{group.layer}/{group.param_type}"]
