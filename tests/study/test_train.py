import math
from typing import Any

import pytest
import torch

from tamegrad.study.network import batches, held_out_batch, make_network
from tamegrad.study.settings import DIVERGED_LOSS, NETWORKS, STRATEGIES, Settings
from tamegrad.study.text import Text
from tamegrad.study.train import Run, Step, new_run, train


@pytest.fixture
def text() -> Text:
    return Text(b"".join(b"%d bottles of beer, %d of wine\n" % (n, n * n) for n in range(500)), "a song", 1)


def trained(text: Text, strategy: str, **given: float) -> Run:
    settings = Settings(strategies=(strategy,), **{"steps": 4, **given})  # type: ignore[arg-type]  # numbers only
    run = new_run(settings, strategy, settings.seed)
    train(settings, text, run, lambda _: None)
    return run


def recorded(run: Run) -> list[object]:
    return [
        run.held_out,
        *[(step.loss, step.norm, step.layer_norms, step.layer_clipped) for step in run.steps],
    ]


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_the_layers_of_the_charts(network: str, text: Text) -> None:
    settings = Settings(network=network, strategies=("RenormalizeL2PerParamType",), steps=1)
    run = new_run(settings, "RenormalizeL2PerParamType", 0)
    train(settings, text, run, lambda _: None)
    assert run.layers == ("embedding", "rnn.l0", "rnn.l1", "out")


def test_the_same_seed_gives_the_same_parameters_and_another_seed_others() -> None:
    first, again, other = (
        torch.cat([p.flatten() for p in make_network("rnn", seed).parameters()]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_making_a_network_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_network("lstm", 1)
    assert torch.equal(torch.rand(3), expected)


def test_no_batch_touches_held_out_text() -> None:
    text = Text(b"a" * 900 + b"b" * 100, "", 1)
    drawn = [next(batches(text, seed)) for seed in range(50)]
    assert all((batch == ord("a")).all() for batch in drawn)
    assert (held_out_batch(text) == ord("b")).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_numbers(strategy: str, text: Text) -> None:
    assert recorded(trained(text, strategy)) == recorded(trained(text, strategy))


def test_another_seed_gives_other_numbers(text: Text) -> None:
    assert recorded(trained(text, "None", seed=1)) != recorded(trained(text, "None", seed=2))


def test_all_strategies_start_equal_and_differ_after_the_first_step(text: Text) -> None:
    runs = [trained(text, strategy, steps=2) for strategy in STRATEGIES]
    assert len({run.held_out[0] for run in runs}) == 1
    assert len({run.steps[0].loss for run in runs}) == 1
    # If the first gradient is under a threshold, that run still equals the one without normalization.
    assert len({run.steps[1].loss for run in runs}) >= len(STRATEGIES) - 1
    for run in runs:
        # A layer's norm is that of all its parameters, however they are grouped.
        assert run.steps[0].layer_norms == pytest.approx(runs[0].steps[0].layer_norms, rel=1e-9)
        assert math.hypot(*run.steps[0].layer_norms) == pytest.approx(run.steps[0].norm, rel=1e-9)


def test_none_clips_nothing_and_a_tiny_threshold_clips_every_layer(text: Text) -> None:
    assert not any(any(step.layer_clipped) for step in trained(text, "None").steps)
    for strategy in ("ClipElementWiseAbsoluteValue", "ClipL2PerLayer", "ClipL2PerParamType", "torch-global"):
        assert all(all(step.layer_clipped) for step in trained(text, strategy, threshold=1e-9).steps)
        assert not any(any(step.layer_clipped) for step in trained(text, strategy, threshold=math.inf).steps)


def test_an_infinite_threshold_trains_like_none(text: Text) -> None:
    runs = [trained(text, strategy, threshold=math.inf) for strategy in ("None", "ClipL2PerLayer", "torch-global")]
    assert recorded(runs[0]) == recorded(runs[1]) == recorded(runs[2])


def test_torch_global_equals_torchs_clip(text: Text) -> None:
    run = trained(text, "torch-global", threshold=0.5, steps=3)
    network = make_network("rnn", 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=Settings().learning_rate)
    for step, batch in zip(run.steps, batches(text, 0), strict=False):
        optimizer.zero_grad()
        loss = network.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        assert step.loss == loss.item()
        assert step.norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)), rel=1e-5)
        optimizer.step()


def test_a_run_that_becomes_nonfinite_is_stopped_and_marked(text: Text) -> None:
    run = trained(text, "None", lr=1000.0, steps=50)
    losses = [step.loss for step in run.steps]
    assert run.ended == "non-finite"
    assert len(losses) < 50
    assert not math.isfinite(losses[-1])
    assert all(math.isfinite(loss) for loss in losses[:-1])
    assert run.held_out[-1][0] == len(losses)
    assert math.isnan(run.held_out[-1][1])
    assert run.diverged_at is not None
    assert not losses[run.diverged_at - 1] <= DIVERGED_LOSS
    assert all(loss <= DIVERGED_LOSS for loss in losses[: run.diverged_at - 1])
    assert not math.isfinite(run.steps[-1].norm)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([5.0, DIVERGED_LOSS, 3.0], None),
        ([5.0, DIVERGED_LOSS + 1e-9, 3.0], 2),
        ([5.0, 4.0, math.nan], 3),
        ([math.inf], 1),
        ([], None),
    ],
)
def test_diverged_at_is_the_first_loss_that_is_not_finite_or_above_the_limit(
    losses: list[float], step: int | None
) -> None:
    run = Run("None", None, 0, steps=[Step(loss, 1.0, (1.0,), (False,), 1.0) for loss in losses])
    assert run.diverged_at == step
    assert not run.recovered


@pytest.mark.parametrize(("last", "recovered"), [(3.0, True), (99.0, False)])
def test_a_run_that_ends_under_the_limit_has_recovered(last: float, *, recovered: bool) -> None:
    steps = [Step(loss, 1.0, (1.0,), (False,), 1.0) for loss in (5.0, 99.0, last)]
    assert Run("None", None, 0, steps=steps, ended="completed").recovered == recovered
    assert Run("None", None, 0, steps=steps, ended="completed").diverged_at == 2


def test_the_held_out_loss_is_measured_first_last_and_in_between(text: Text) -> None:
    assert [number for number, _ in trained(text, "None", steps=3).held_out] == [0, 1, 2, 3]
    assert [number for number, _ in trained(text, "torch-global", steps=41).held_out][-3:] == [36, 39, 41]


@pytest.mark.parametrize(
    ("losses", "final", "ended", "learned"),
    [
        ((5.0, 4.0), 3.0, "completed", True),
        ((5.0, 99.0, 4.0), 3.0, "completed", True),
        ((5.0, 99.0), 3.0, "completed", False),
        ((5.0, 4.0), 5.5, "completed", False),
        ((5.0, 4.0), 3.0, "interrupted", False),
        ((5.0, math.nan), math.nan, "non-finite", False),
    ],
)
def test_a_run_has_learned_if_it_was_completed_with_a_lower_loss_and_under_the_limit(
    losses: tuple[float, ...], final: float, ended: Any, *, learned: bool
) -> None:
    steps = [Step(loss, 1.0, (1.0,), (False,), 1.0) for loss in losses]
    assert Run("None", None, 0, (), steps, [(0, 5.5), (len(steps), final)], ended).learned == learned
