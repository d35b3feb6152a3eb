import pytest
import torch

from tamegrad.study.compare import compare
from tamegrad.study.settings import Settings
from tamegrad.study.text import Text
from tamegrad.study.train import Run


@pytest.fixture
def text() -> Text:
    return Text(b"".join(b"%d bottles of beer, %d of wine\n" % (n, n * n) for n in range(500)), "a song", 1)


def test_runs_are_in_the_requested_order(text: Text) -> None:
    seen: list[str] = []
    names = ("torch-global", "None")
    comparison = compare(Settings(strategies=names, steps=2), text, lambda run: seen.append(run.strategy))
    assert [run.strategy for run in comparison.runs] == list(names)
    assert seen == ["torch-global"] * 2 + ["None"] * 2
    assert not comparison.partial


def test_every_seed_is_one_comparison_of_its_own(text: Text) -> None:
    names = ("None", "ClipL2PerLayer")
    both = compare(Settings(strategies=names, steps=2, seed=7, seeds=2), text, lambda _: None)
    assert [(run.seed, run.strategy) for run in both.runs] == [
        (7, names[0]),
        (7, names[1]),
        (8, names[0]),
        (8, names[1]),
    ]
    second = compare(Settings(strategies=names, steps=2, seed=8), text, lambda _: None)
    losses = [[step.loss for step in run.steps] for run in (*both.runs, *second.runs)]
    assert losses[2:4] == losses[4:]
    assert losses[:2] != losses[4:]


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
