import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]  # plotly has no types
import pytest
from rich.console import Console

from tamegrad.study import table
from tamegrad.study.columns import columns_of, number
from tamegrad.study.compare import Comparison, compare
from tamegrad.study.page import make_page, write_page
from tamegrad.study.results import Results, make_results
from tamegrad.study.settings import STRATEGIES, Settings
from tamegrad.study.table import print_results
from tamegrad.study.text import Text
from tamegrad.study.train import Run

ENVIRONMENT: dict[str, Any] = {"command": "tamegrad compare --text '<b>&'", "python": "3.11", "seconds": 1.0}
LOADING = ("src", "href", "srcset", "data", "action", "poster")


class Elements(HTMLParser):
    """What a browser would load, and the text it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.shown = ""
        self._script: str | None = None
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in LOADING]
        self._inside = tag
        self._script = dict(attrs).get("id")

    def handle_endtag(self, tag: str) -> None:
        del tag
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._inside == "style":
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.shown += data


@pytest.fixture(scope="module")
def results() -> Results:
    text = Text(b"ninety-nine bottles of beer on the wall\n" * 500, "<i>a song</i></script>", 1)
    # The learning rate makes the run without normalization non-finite before it ends.
    comparison = compare(Settings(steps=4, lr=1e4), text, lambda _: None)
    return make_results(comparison, ENVIRONMENT)


@pytest.fixture(scope="module")
def page(results: Results) -> Elements:
    return Elements(make_page(results))


@pytest.fixture(scope="module")
def charts(page: Elements) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(page.scripts["charts"])
    return decoded


def test_the_page_loads_nothing(page: Elements) -> None:
    assert page.loads == []
    assert not {"link", "img", "iframe", "object"} & set(page.tags)


def test_the_content_security_policy_forbids_loading(results: Results) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', make_page(results))
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; ")
    assert "http" not in policy[1]


def test_the_page_shows_every_strategy_and_the_recommendation(page: Elements, results: Results) -> None:
    assert all(name in page.shown for name in STRATEGIES)
    assert results["recommendation"] in page.shown


def test_text_from_users_is_escaped(page: Elements) -> None:
    assert "<i>a song</i></script>" in page.shown
    assert "tamegrad compare --text '<b>&'" in page.shown


def test_both_themes_have_a_colour_for_every_strategy(results: Results) -> None:
    source = make_page(results)
    light, dark = source.split("@media (prefers-color-scheme: dark)")[:2]
    for color in range(len(STRATEGIES)):
        assert f"--c{color}: #" in light
        assert f"--c{color}: #" in dark


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_charts_are_valid_plotly_figures(charts: dict[str, Any]) -> None:
    assert set(charts) == {"held-out", "training", "norms"}
    for figure in charts.values():
        layout = dict(figure["layout"])
        for kind in ("shapes", "annotations"):
            # The page removes `meta` before plotly sees it.
            items = layout.pop(kind)
            layout[kind] = [{key: value for key, value in item.items() if key != "meta"} for item in items]
        go.Figure({"data": figure["data"], "layout": layout})


def test_a_strategy_has_the_same_colour_in_every_chart(charts: dict[str, Any]) -> None:
    for name in ("held-out", "training"):
        colors = {trace["meta"]["strategy"]: trace["meta"]["color"] for trace in charts[name]["data"]}
        assert colors == {strategy: number for number, strategy in enumerate(STRATEGIES)}


def test_a_run_that_diverged_has_a_cross_at_that_step(charts: dict[str, Any], results: Results) -> None:
    diverged = {run["strategy"]: run["diverged_at"] for run in results["runs"] if run["diverged_at"] is not None}
    assert "None" in diverged
    crosses = {trace["name"]: trace["x"][0] for trace in charts["training"]["data"] if trace["mode"] == "markers"}
    assert crosses == diverged


def test_nonfinite_norms_are_marked_in_the_heat_map(charts: dict[str, Any], results: Results) -> None:
    run = results["runs"][0]
    assert run["ended"] == "non-finite"
    assert any(trace.get("meta") == "nonfinite" for trace in charts["norms"]["data"])
    marks = [shape for shape in charts["norms"]["layout"]["shapes"] if shape["xref"] == "x"]
    assert {mark["x0"] for mark in marks} >= {len(run["norm"])}
    notes = [label["text"] for label in charts["norms"]["layout"]["annotations"]]
    assert any(f"stopped at step {len(run['norm'])}: not finite from here" in note for note in notes)


def test_every_strategy_has_a_heat_map(charts: dict[str, Any]) -> None:
    panels = [trace for trace in charts["norms"]["data"] if trace.get("meta") != "nonfinite"]
    assert len(panels) == len(STRATEGIES)
    assert all(panel["y"] == ["embedding", "rnn.l0", "rnn.l1", "out"] for panel in panels)


def test_a_partial_comparison_says_so(tmp_path: Path) -> None:
    interrupted = Comparison(Settings(), Text(b"text", "a song", 1), (Run("None", None, 0),), partial=True)
    file = write_page(make_results(interrupted, ENVIRONMENT), tmp_path)
    assert "This comparison was interrupted" in Elements(file.read_text(encoding="utf-8")).shown


def test_the_terminal_shows_the_same_results(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(results)
    shown = capsys.readouterr().out
    assert all(name in shown for name in STRATEGIES)
    assert results["recommendation"] in shown
    assert "NaN" in shown


@pytest.fixture(scope="module")
def seeds() -> Results:
    text = Text(b"ninety-nine bottles of beer on the wall\n" * 500, "a song", 1)
    return make_results(compare(Settings(steps=4, lr=1e4, seed=5, seeds=2), text, lambda _: None), ENVIRONMENT)


def test_with_several_seeds_page_terminal_and_file_have_the_same_means_and_ranges(
    seeds: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    print_results(seeds)
    terminal, page = capsys.readouterr().out, Elements(make_page(seeds)).shown
    assert "seeds 5 to 6" in page
    for strategy in seeds["strategies"]:
        spread = strategy["final_loss"]
        assert spread is not None
        finals = [run["final_loss"] for run in seeds["runs"] if run["strategy"] == strategy["strategy"]]
        assert len(finals) == 2
        cells = [number(spread[key], ".3f") for key in ("mean", "lowest", "highest")]
        (line,) = [line for line in terminal.splitlines() if line.startswith(f" {strategy['strategy']} ")]
        assert all(cell in line and cell in page for cell in cells)
        assert f"{sum(at is not None for at in strategy['diverged_at'])}" in line
    assert seeds["recommendation"] in page
    assert seeds["recommendation"] in terminal
    assert "paired t-test" in page


def test_with_several_seeds_a_strategy_has_one_curve_per_seed_and_one_heat_map(seeds: Results) -> None:
    charts = json.loads(Elements(make_page(seeds)).scripts["charts"])
    curves = [trace for trace in charts["held-out"]["data"] if "line" in trace]
    assert [trace["name"] for trace in curves] == [*STRATEGIES, *STRATEGIES]
    assert "ClipL2PerLayer, seed 6<br>" in next(
        trace["hovertemplate"] for trace in curves[len(STRATEGIES) :] if trace["name"] == "ClipL2PerLayer"
    )
    panels = [trace for trace in charts["norms"]["data"] if trace.get("meta") != "nonfinite"]
    assert len(panels) == len(STRATEGIES)


@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_a_narrow_terminal_shows_every_number(
    width: int, results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "output", lambda: Console(width=width))
    print_results(results)
    words = capsys.readouterr().out.split()
    for column in columns_of(results)[1:]:
        for strategy in results["strategies"]:
            assert column.cell(strategy) in words
