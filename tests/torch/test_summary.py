"""What a summary counts over many steps."""

import io
import math
import statistics
from typing import Any

import pytest
import torch
from torch import nn

from tamegrad import Clip, SettingError, UnknownGroupError
from tamegrad.torch import GradientNormalizer, GroupSummary, Summary


def a_model() -> Any:
    model = nn.ModuleDict()
    for name in ("a", "b"):
        model[name] = nn.Module()
        model[name].weight = nn.Parameter(torch.zeros(1))
    return model


def counted(norms: dict[str, list[float]], summary: Summary | None = None, **settings: Any) -> Summary:
    """Returns a summary of steps in which the layers have these norms."""
    model, summary = a_model(), summary or Summary()
    normalizer = GradientNormalizer(model, Clip(1.0), **settings)
    for values in zip(*norms.values(), strict=True):
        for name, value in zip(norms, values, strict=True):
            model[name].weight.grad = torch.tensor([value])
        summary.update(normalizer.normalize_())
    return summary


def test_counts_every_group() -> None:
    summary = counted({"a": [0.5, 2.0, math.nan, 8.0], "b": [0.0, math.inf, -math.inf, math.nan]})
    assert summary["a"].steps == 4
    assert summary["a"].clipped == 0.5
    assert summary["a"].largest == 8.0
    assert summary["a"].nonfinite_steps == 1
    assert summary["a"].median == pytest.approx(2.0, rel=0.045)
    assert summary["b"] == GroupSummary("b", steps=4, clipped=0.0, largest=0.0, median=0.0, nonfinite_steps=3)
    assert list(summary) == [summary["a"], summary["b"]]
    assert summary.steps == 4


def test_a_group_that_never_was_finite_has_no_norms() -> None:
    row = counted({"a": [math.nan, math.inf]})["a"]
    assert math.isnan(row.largest)
    assert math.isnan(row.median)
    assert row.nonfinite_steps == 2


@pytest.mark.parametrize("spread", [0.1, 3.0, 10.0])
def test_the_median_is_within_its_error(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(301, generator=generator, dtype=torch.float64).mul(spread).exp().float().tolist()
    row = counted({"a": norms})["a"]
    assert row.median == pytest.approx(statistics.median(norms), rel=0.045)
    assert row.largest == max(norms)


def test_the_median_stays_in_range_at_the_ends() -> None:
    assert counted({"a": [1e-30, 1e-30]})["a"].median == 0.0
    assert counted({"a": [3e38, 3e38]})["a"].median == pytest.approx(2.0**64, rel=0.045)


def test_counts_skipped_steps_which_clip_nothing() -> None:
    summary = counted({"a": [2.0, 2.0], "b": [math.nan, 1.0]}, on_nonfinite="skip")
    assert summary.skipped_steps == 1
    assert summary["a"].clipped == 0.5


def test_goes_on_when_the_plan_changes() -> None:
    model, summary = a_model(), Summary()
    normalizer = GradientNormalizer(model, Clip(1.0))
    for policy in (Clip(1.0), Clip(1.0, per="model"), Clip(3.0)):
        normalizer.policy = policy
        for name in model:
            model[name].weight.grad = torch.tensor([2.0])
        summary.update(normalizer.normalize_())
    del model["b"]
    summary.update(normalizer.normalize_())
    assert {row.name: (row.steps, row.clipped) for row in summary} == {
        "a": (3, pytest.approx(1 / 3)),
        "b": (2, 0.5),
        "model": (1, 1.0),
    }


def test_its_memory_does_not_grow_and_updating_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = counted({"a": [1.0] * 3})
    before = summary.state_dict()
    model = a_model()
    model["a"].weight.grad = torch.ones(1)
    report = GradientNormalizer(model, Clip(1.0)).normalize_()
    summary.update(report)

    def refuse(*_: object) -> None:
        raise AssertionError("read")

    for name in ("item", "tolist", "__bool__", "numpy", "__float__", "__int__", "__index__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for _ in range(20):
        summary.update(report)
    monkeypatch.undo()
    after = summary.state_dict()
    assert after["counts"][:1].shape == before["counts"][:1].shape
    assert summary["a"].steps == 24


def test_state_goes_through_a_checkpoint() -> None:
    summary = counted({"a": [0.5, 2.0, math.nan], "b": [1.0, 1.0, 1.0]})
    buffer = io.BytesIO()
    torch.save(summary.state_dict(), buffer)
    buffer.seek(0)
    other = Summary()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert str(other) == str(summary)
    counted({"a": [4.0], "b": [4.0]}, other)
    assert (other.steps, summary.steps) == (4, 3)
    assert other["a"].largest == 4.0
    assert summary["a"].largest == 2.0


def test_another_state_is_refused() -> None:
    summary = counted({"a": [0.5]})
    states: list[Any] = [{}, None, {**summary.state_dict(), "groups": ["a"]}]
    for state in states:
        with pytest.raises(SettingError, match="not the state of a summary"):
            summary.load_state_dict(state)
    assert summary["a"].steps == 1


def test_an_unknown_group_names_the_closest() -> None:
    with pytest.raises(UnknownGroupError, match="got 'aa'; allowed: one of its 2 groups; closest: 'a'"):
        counted({"a": [1.0]})["aa"]


def test_prints_before_the_first_step() -> None:
    assert str(Summary()).startswith("0 steps, 0 skipped")
