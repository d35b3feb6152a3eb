import pytest
import torch

from tamegrad.study.compare import compare, recommend
from tamegrad.study.settings import Settings
from tamegrad.study.text import Text
from tamegrad.study.train import Run, Step


@pytest.fixture
def text() -> Text:
    return Text(b"".join(b"%d bottles of beer, %d of wine\n" % (n, n * n) for n in range(500)), "a song", 1)


def run_of(strategy: str, first: float, final: float, losses: tuple[float, ...] = (5.0,), **given: object) -> Run:
    steps = [Step(loss, 1.0, (1.0,), (False,), 1.0) for loss in losses]
    run = Run(strategy, None, ("out",), steps, [(0, first), (len(steps), final)], "completed")
    for name, value in given.items():
        setattr(run, name, value)
    return run


def test_runs_are_in_the_requested_order(text: Text) -> None:
    seen: list[str] = []
    names = ("torch-global", "None")
    comparison = compare(Settings(strategies=names, steps=2), text, lambda run: seen.append(run.strategy))
    assert [run.strategy for run in comparison.runs] == list(names)
    assert seen == ["torch-global"] * 2 + ["None"] * 2
    assert not comparison.partial


def test_an_interrupted_comparison_keeps_the_results_so_far(text: Text) -> None:
    def interrupt(run: Run) -> None:
        if run.strategy == "ClipL2PerLayer" and len(run.steps) == 2:
            raise KeyboardInterrupt

    names = ("None", "ClipL2PerLayer", "torch-global")
    comparison = compare(Settings(strategies=names, steps=3), text, interrupt)
    assert comparison.partial
    assert [(run.strategy, len(run.steps), run.ended) for run in comparison.runs] == [
        ("None", 3, "completed"),
        ("ClipL2PerLayer", 2, "interrupted"),
    ]


def test_the_number_of_threads_is_restored(text: Text) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        during: list[int] = []
        settings = Settings(strategies=("None",), steps=1)
        compare(settings, text, lambda _: during.append(torch.get_num_threads()))
        assert (during, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_the_lowest_final_loss_is_recommended() -> None:
    name, why = recommend([run_of("None", 5.5, 3.0), run_of("ClipL2PerLayer", 5.5, 2.5, threshold=0.5)])
    assert name == "ClipL2PerLayer"
    assert why == (
        "Use ClipL2PerLayer (threshold 0.5): held-out loss 2.500, the lowest of the runs that did not diverge."
    )


def test_close_runs_and_lower_runs_that_diverged_are_mentioned() -> None:
    runs = [run_of("a", 5.5, 2.51), run_of("b", 5.5, 2.5), run_of("c", 5.5, 2.0, losses=(5.0, 99.0, 2.0))]
    name, why = recommend(runs)
    assert name == "b"
    assert " As good (within 0.02): a." in why
    assert " Lower, but diverged along the way: c (2.000, at step 2)." in why


@pytest.mark.parametrize(
    "run",
    [
        run_of("diverged", 5.5, 2.0, losses=(99.0,)),
        run_of("learned nothing", 5.5, 5.6),
        run_of("interrupted", 5.5, 2.0, ended="interrupted"),
        run_of("stopped", 5.5, float("nan"), ended="non-finite"),
    ],
)
def test_a_run_that_failed_is_not_recommended(run: Run) -> None:
    name, why = recommend([run])
    assert name is None
    sentence = "No strategy can be recommended: no completed run learned without diverging."
    # An interrupted run needs no advice.
    advice = "" if run.ended == "interrupted" else " Try a smaller --lr or --threshold."
    assert why == sentence + advice


def test_without_runs_nothing_is_recommended() -> None:
    assert recommend([])[0] is None
