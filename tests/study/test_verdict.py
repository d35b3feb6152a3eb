import numpy as np
import pytest

from tamegrad.study.train import Run, Step
from tamegrad.study.verdict import MARGIN, T_95, Verdict, judge


def run_of(strategy: str, final: float, losses: tuple[float, ...] = (5.0,), *, seed: int = 0, **given: object) -> Run:
    steps = [Step(loss, 1.0, (1.0,), (False,), 1.0) for loss in losses]
    run = Run(strategy, None, seed, ("out",), steps, [(0, 5.5), (len(steps), final)], "completed")
    for name, value in given.items():
        setattr(run, name, value)
    return run


def over_seeds(**finals: tuple[float, ...]) -> list[Run]:
    return [run_of(name, final, seed=seed) for name, losses in finals.items() for seed, final in enumerate(losses)]


RECOVERED = (5.0, 99.0, 2.0)


# One seed


def test_one_seed_names_strategies_within_the_margin_together_and_recommends_none() -> None:
    assert judge([run_of("a", 3.0), run_of("b", 2.51), run_of("c", 2.5)]) == Verdict(
        None,
        ("c", "b"),
        f"One seed is not enough to rank c (2.500) and b (2.510): they ended within {MARGIN} nats of the lowest "
        "held-out loss. Pass --seeds 5 to compare over five seeds.",
    )


def test_one_seed_recommends_none_however_large_the_lead() -> None:
    assert judge([run_of("a", 3.0), run_of("b", 1.0)]) == Verdict(
        None,
        ("b",),
        "b ended with the lowest held-out loss, 1.000, 2.000 below the next, a; that is one seed. "
        "Pass --seeds 5 to compare over five seeds.",
    )


@pytest.mark.parametrize(("lead", "together"), [(MARGIN - 1e-9, 2), (MARGIN + 1e-9, 1)])
def test_the_margin_is_measured_from_the_lowest(lead: float, together: int) -> None:
    assert len(judge([run_of("a", 2.5), run_of("b", 2.5 + lead)]).together) == together


def test_runs_that_diverged_are_named() -> None:
    runs = [
        run_of("nan", float("nan"), (5.0, float("nan")), ended="non-finite"),
        run_of("above", 2.0, (5.0, 99.0)),
        run_of("recovered", 2.0, RECOVERED),
        run_of("nothing", 5.6),
        run_of("steady", 2.5),
    ]
    verdict = judge(runs)
    assert verdict.together == ("recovered",)
    assert " Diverged along the way, but recovered: recovered (at step 2)." in verdict.sentence
    assert " The lowest that never diverged: steady (2.500)." in verdict.sentence
    assert " Diverged: nan (at step 2), above (at step 2). Learned nothing: nothing." in verdict.sentence


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (run_of("diverged", 2.0, (99.0,)), "none learned. Try a smaller --lr or --threshold."),
        (run_of("learned nothing", 5.6), "none learned. Try a larger --lr or more --steps."),
        (
            run_of("stopped", float("nan"), (float("nan"),), ended="non-finite"),
            "none learned. Try a smaller --lr or --threshold.",
        ),
        (run_of("interrupted", 2.0, ended="interrupted"), "no run was completed."),
    ],
)
def test_a_run_that_failed_is_not_named(run: Run, why: str) -> None:
    assert judge([run]) == Verdict(None, (), f"No strategy can be recommended: {why}")


def test_without_runs_nothing_is_recommended() -> None:
    assert judge([]) == Verdict(None, (), "No strategy can be recommended: no run was completed.")


# Several seeds


def test_a_strategy_that_is_ahead_seed_by_seed_is_recommended_although_the_ranges_overlap() -> None:
    runs = over_seeds(a=(2.0, 2.5, 3.0), b=(2.1, 2.61, 3.11))
    verdict = judge(runs)
    assert (verdict.recommended, verdict.together) == ("a", ("a",))
    # The differences 0.1, 0.11 and 0.11: their standard deviation 0.00577, times 4.303, over the root of 3.
    assert verdict.sentence == "Use a: mean held-out loss 2.500 over 3 seeds, 0.107 ± 0.014 below the next, b."


def test_strategies_that_the_seeds_cannot_tell_apart_are_named_together() -> None:
    runs = over_seeds(a=(2.0, 2.5, 3.0), b=(2.3, 2.4, 3.1), c=(4.0, 4.5, 5.0))
    assert judge(runs) == Verdict(
        None,
        ("a", "b"),
        "3 seeds are not enough to rank a (2.500) and b (2.600), the lowest mean held-out losses. Try more --seeds.",
    )


def test_equal_losses_are_not_told_apart() -> None:
    assert judge(over_seeds(a=(2.0, 2.0), b=(2.0, 2.0))).together == ("a", "b")


def test_a_strategy_that_failed_with_one_seed_is_not_recommended() -> None:
    runs = [*over_seeds(a=(3.0, 3.1)), run_of("b", 2.0, seed=0), run_of("b", 2.0, (99.0,), seed=1)]
    verdict = judge(runs)
    assert verdict.recommended == "a"
    assert "Diverged: b (with 1 of 2 seeds)." in verdict.sentence


def test_a_threshold_is_part_of_the_recommendation() -> None:
    runs = [run_of("a", 2.0, seed=seed, threshold=0.5) for seed in range(2)]
    assert judge(runs).sentence == "Use a (threshold 0.5): mean held-out loss 2.000 over 2 seeds."


def test_interrupted_runs_leave_the_seeds_that_all_strategies_completed() -> None:
    runs = [*over_seeds(a=(2.0, 2.5, 9.9), b=(2.1, 2.61)), run_of("b", 1.0, seed=2, ended="interrupted")]
    assert "2.250 over 2 seeds" in judge(runs).sentence


@pytest.mark.parametrize("seeds", [2, 3, 5, 11])
def test_equal_strategies_are_told_apart_by_chance_once_in_twenty(seeds: int) -> None:
    leads = np.random.default_rng(0).normal(size=(40_000, seeds))
    chance = T_95[seeds - 2] * leads.std(axis=1, ddof=1) / np.sqrt(seeds)
    # Five standard errors of a share of 5% in 40,000 draws.
    assert (abs(leads.mean(axis=1)) > chance).mean() == pytest.approx(0.05, abs=0.0055)
