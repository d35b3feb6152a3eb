"""Builds the page's charts as plain data for plotly.js; the page adds the theme's colours."""

import math
from typing import Any, TypeAlias

from tamegrad.study.results import Results, RunResults

__all__ = ["heat_map", "loss_chart"]

Figure: TypeAlias = dict[str, Any]

# Curves differ in dash and marker as well as in colour; a strategy has the same ones in every chart.
DASHES = ("solid", "solid", "dash", "solid", "solid", "dash", "dot")
SYMBOLS = ("x", "circle", "circle-open", "diamond", "square", "square-open", "triangle-up")

# Higher losses are cut off: one exploding run would flatten all others.
HIGHEST_LOSS = 13.0

# The heat map's colours span these norms; norms outside get the colour of the nearer end.
LOWEST_NORM, HIGHEST_NORM = 1e-2, 1e2

ROW_HEIGHT = 26  # pixels per layer
PANEL_GAP = 46  # pixels between two panels, including the lower one's title
MARGIN_TOP, MARGIN_BOTTOM = 30, 44


def loss_chart(results: Results, names: list[str], *, held_out: bool) -> Figure:
    """Draws the losses over the steps, one curve per run, on a log axis with an upper limit.

    Args:
        results: The results of the comparison.
        names: All strategies; their order sets the colours.
        held_out: Whether to draw the held-out losses, not the training losses.

    Returns:
        The figure; a trace's `meta.color` is the number of its colour.
    """
    traces = []
    lowest = results["settings"]["uniform_loss"]
    for run in results["runs"]:
        index = names.index(run["strategy"])
        steps, losses = _curve(run, held_out=held_out)
        lowest = min([lowest, *(loss for loss in losses if loss > 0)])
        traces.append(_curve_trace(run, index, steps, losses, markers=held_out, label=_label(run, results)))
        if run["diverged_at"] is not None:
            traces.append(_diverged_trace(run, index, results))
    return {
        "data": traces,
        "layout": {
            "height": 400,
            "margin": {"l": 52, "r": 12, "t": 12, "b": 48},
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": {"title": {"text": "step"}, "range": [0, results["settings"]["steps"]], "zeroline": False},
            "yaxis": {
                "title": {"text": "loss, nats per byte"},
                "type": "log",
                "range": [math.log10(lowest * 0.94), math.log10(HIGHEST_LOSS)],
                "tickvals": [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12],
                "zeroline": False,
            },
            "shapes": [_level(results["settings"][name]) for name in ("uniform_loss", "diverged_loss")],
            "annotations": [
                _level_label(results["settings"]["uniform_loss"], "uniform guessing"),
                _level_label(results["settings"]["diverged_loss"], "diverged above"),
            ],
        },
    }


def heat_map(results: Results) -> Figure:
    """Draws each layer's gradient norm over the steps, one panel per strategy, on one colour scale; for the first seed.

    Args:
        results: The results of the comparison.

    Returns:
        The figure; items with the `meta` "nonfinite" get the colour of non-finite norms.
    """
    runs = [run for run in results["runs"] if run["norm"] and run["seed"] == results["settings"]["seed"]]
    layers = max((len(run["layer_norms"]) for run in runs), default=0)
    panel = layers * ROW_HEIGHT
    inner = len(runs) * (panel + PANEL_GAP) - PANEL_GAP
    data: list[Figure] = []
    layout: Figure = {
        "height": inner + MARGIN_TOP + MARGIN_BOTTOM,
        "margin": {"l": 78, "r": 12, "t": MARGIN_TOP, "b": MARGIN_BOTTOM},
        "showlegend": False,
        "annotations": [],
        "shapes": [],
        "coloraxis": {
            "cmin": math.log10(LOWEST_NORM),
            "cmax": math.log10(HIGHEST_NORM),
            "colorscale": "Viridis",
            "showscale": False,
        },
    }
    for position, run in enumerate(runs):
        suffix = "" if position == 0 else str(position + 1)
        top = 1 - position * (panel + PANEL_GAP) / inner
        bottom = max(top - panel / inner, 0.0)
        last = position == len(runs) - 1
        layout[f"xaxis{suffix}"] = {
            "anchor": f"y{suffix}",
            "range": [0.5, results["settings"]["steps"] + 0.5],
            "showgrid": False,
            "zeroline": False,
            "title": {"text": "step" if last else ""},
        } | ({} if position == 0 else {"matches": "x"})
        layout[f"yaxis{suffix}"] = {
            "anchor": f"x{suffix}",
            "domain": [bottom, top],
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        }
        layout["annotations"] += _panel_labels(run, suffix, top, results)
        layout["shapes"] += _nonfinite_marks(run, suffix)
        data += _panel_traces(run, suffix)
    return {"data": data, "layout": layout}


def _curve(run: RunResults, *, held_out: bool) -> tuple[list[int], list[float]]:
    if held_out:
        return run["held_out"]["step"], run["held_out"]["loss"]
    return list(range(1, len(run["train_loss"]) + 1)), run["train_loss"]


def _label(run: RunResults, results: Results) -> str:
    return run["strategy"] if results["settings"]["seeds"] == 1 else f"{run['strategy']}, seed {run['seed']}"


def _curve_trace(
    run: RunResults, index: int, steps: list[int], losses: list[float], *, markers: bool, label: str
) -> Figure:
    return {
        "type": "scatter",
        "name": run["strategy"],
        "mode": "lines+markers" if markers else "lines",
        "x": steps,
        "y": [_finite(loss) for loss in losses],
        "line": {"width": 2 if markers else 1.1, "dash": DASHES[index]},
        "marker": {"symbol": SYMBOLS[index], "size": 6},
        "meta": {"strategy": run["strategy"], "color": index},
        "hovertemplate": f"{label}<br>step %{{x}}: %{{y:.3f}}<extra></extra>",
    }


def _diverged_trace(run: RunResults, index: int, results: Results) -> Figure:
    """Returns a cross on the limit, at the step where the run first passed it."""
    ended = f", stopped at step {len(run['norm'])}: not finite" if run["ended"] == "non-finite" else ""
    ended += ", recovered" if run["recovered"] else ""
    return {
        "type": "scatter",
        "name": run["strategy"],
        "mode": "markers",
        "x": [run["diverged_at"]],
        "y": [results["settings"]["diverged_loss"]],
        "marker": {"symbol": "x", "size": 12, "line": {"width": 1}},
        "cliponaxis": False,
        "meta": {"strategy": run["strategy"], "color": index},
        "hovertemplate": f"{_label(run, results)}<br>diverged at step %{{x}}{ended}<extra></extra>",
    }


def _level(loss: float) -> Figure:
    places = {"x0": 0, "x1": 1, "xref": "paper", "y0": loss, "y1": loss}
    return {"type": "line", **places, "line": {"width": 1, "dash": "dot"}, "layer": "below"}


def _level_label(loss: float, text: str) -> Figure:
    return {
        "text": text,
        "x": 1,
        "xref": "paper",
        "xanchor": "right",
        "y": math.log10(loss),
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11},
    }


def _panel_labels(run: RunResults, suffix: str, top: float, results: Results) -> list[Figure]:
    title = {
        "text": f"<b>{run['strategy']}</b>",
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "y": top,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
    }
    done, steps = len(run["norm"]), results["settings"]["steps"]
    if run["ended"] == "completed":
        return [title]
    reason = "not finite from here" if run["ended"] == "non-finite" else "interrupted"
    text = f"stopped at step {done}: {reason}"
    # Next to the end of the run, on the side that has room.
    right = done < steps / 2
    note = {
        "text": f"◀ {text}" if right else f"{text} ▶",
        "x": done,
        "xref": f"x{suffix}",
        "xanchor": "left" if right else "right",
        "xshift": 6 if right else -6,
        "y": (len(run["layer_norms"]) - 1) / 2,
        "yref": f"y{suffix}",
        "showarrow": False,
        "meta": "nonfinite" if run["ended"] == "non-finite" else "soft",
    }
    return [title, note]


def _panel_traces(run: RunResults, suffix: str) -> list[Figure]:
    layers = list(run["layer_norms"])
    rows = list(run["layer_norms"].values())
    place = {
        "type": "heatmap",
        "x": list(range(1, len(run["norm"]) + 1)),
        "y": layers,
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
    }
    seen = {
        **place,
        "z": [[_log(norm) for norm in row] for row in rows],
        "customdata": [[_finite(norm) for norm in row] for row in rows],
        "coloraxis": "coloraxis",
        "hoverongaps": False,
        "hovertemplate": f"{run['strategy']}<br>%{{y}}, step %{{x}}: norm %{{customdata:.3g}}<extra></extra>",
    }
    if all(math.isfinite(norm) for row in rows for norm in row):
        return [seen]
    marks = [[None if math.isfinite(norm) else 1 for norm in row] for row in rows]
    nonfinite = {
        **place,
        "z": marks,
        "showscale": False,
        "hoverongaps": False,
        "meta": "nonfinite",
        "hovertemplate": f"{run['strategy']}<br>%{{y}}, step %{{x}}: not finite<extra></extra>",
    }
    return [seen, nonfinite]


def _nonfinite_marks(run: RunResults, suffix: str) -> list[Figure]:
    """Returns a line over each cell with a non-finite norm: the cell alone may be narrower than a pixel."""
    return [
        {
            "type": "line",
            "xref": f"x{suffix}",
            "yref": f"y{suffix}",
            "x0": step,
            "x1": step,
            "y0": row - 0.5,
            "y1": row + 0.5,
            "line": {"width": 3},
            "meta": "nonfinite",
        }
        for row, norms in enumerate(run["layer_norms"].values())
        for step, norm in enumerate(norms, 1)
        if not math.isfinite(norm)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _log(norm: float) -> float | None:
    if not math.isfinite(norm):
        return None
    # A zero norm has no logarithm; it gets the lowest colour.
    return math.log10(norm) if norm > 0 else math.log10(LOWEST_NORM)
