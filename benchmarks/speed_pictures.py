"""Draws the measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]  # not installed for type checks
from matplotlib.axes import Axes  # type: ignore[import-not-found, unused-ignore]  # not installed for type checks
from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]  # not installed for type checks
from speed_measure import Growth, Measured, Times
from speed_sharded import MESHES, Sharded
from speed_tools import WRITE

__all__ = ["draw"]

_OURS, _THEIRS, _FLOOR = "#0b6e4f", "#9aa5b1", "#c0392b"
# A white background keeps the pictures readable on light and dark pages.
_STYLE: Any = {
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "tamegrad",
}


def draw(
    folder: Path, measured: Sequence[Measured], growth: Growth, sharded: Sequence[Sharded]
) -> list[tuple[str, str]]:
    """Draws the pictures as SVG.

    Args:
        folder: The folder to write to, created if missing.
        measured: The times on each model.
        growth: The times with growing numbers of layers.
        sharded: The times on sharded models.

    Returns:
        The file name and the description of each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, str]] = []
    with mpl.rc_context(_STYLE):
        for index, what in enumerate(("nothing clipped", "everything clipped")):
            figure = Figure(figsize=(11, 8), layout="constrained")
            for axes, case in zip(figure.subplots(2, 2).flat, measured, strict=True):
                _, times, floor = case.both()[index]
                _bars(axes, case.name, times, floor)
            figure.suptitle(f"Time as a multiple of the floor (red line), {what}; shorter is faster")
            pictures.append(_save(figure, folder, f"speed-{what.replace(' ', '-')}.svg", f"Relative time, {what}"))
        figure = Figure(figsize=(8, 5), layout="constrained")
        _lines(figure.subplots(), growth)
        pictures.append(_save(figure, folder, "speed-growth.svg", "Time by number of layers"))
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        for axes, mesh in zip(figure.subplots(1, len(MESHES), sharey=True), MESHES, strict=True):
            _sharded_lines(axes, mesh, [row for row in sharded if row.mesh == mesh])
        pictures.append(_save(figure, folder, "speed-sharded.svg", "Time by number of layers, sharded models"))
    return pictures


def _save(figure: Figure, folder: Path, name: str, shows: str) -> tuple[str, str]:
    figure.savefig(folder / name, metadata={"Date": None})
    return name, shows


def _bars(axes: Axes, name: str, times: Times, floor: str) -> None:
    tools = [tool.name for tool in times.tools if not tool.name.startswith("floor")]
    ratios = [times.ratio(tool, floor) for tool in tools]
    labels = [tool.replace("`", "").replace("torch, a loop of clip_grad_norm_", "torch loop") for tool in tools]
    colours = [_OURS if tool.startswith("tamegrad") else _THEIRS for tool in tools]
    bars = axes.barh(labels, ratios, color=colours)
    axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3)
    axes.set_xscale("log")
    axes.set_xlim(min(*ratios, 1.0) / 3, max(*ratios, 1.0) * 3)
    # Every bar is labelled with its value; ticks on a logarithmic axis would only add clutter.
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    axes.axvline(1.0, color=_FLOOR)
    axes.invert_yaxis()
    axes.set_title(name)


def _sharded_lines(axes: Axes, mesh: str, rows: Sequence[Sharded]) -> None:
    for tool in dict.fromkeys(row.tool for row in rows):
        mine = [row for row in rows if row.tool == tool and not row.problem]
        if not mine:
            raises = f"{tool.replace('`', '')} raises"
            axes.annotate(raises, (0.5, 0.5), xycoords="axes fraction", fontsize=7, ha="center")
            continue
        places = [(row.layers, 1e3 * row.seconds) for row in mine]
        line, colour = ("-o", _OURS) if tool.startswith("tamegrad") else (":o", None)
        label = tool.replace("`", "").replace("a loop of clip_grad_norm_", "loop")
        axes.plot(*zip(*places, strict=True), line, color=colour, markersize=3, label=label)
        for row, place in zip(mine, places, strict=True):
            count = str(row.collectives)
            axes.annotate(count, place, textcoords="offset points", xytext=(0, 5), fontsize=7, ha="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    layers = sorted({row.layers for row in rows})
    axes.set_xticks(layers, map(str, layers))
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.set_title(mesh)
    axes.set_xlabel("layers; the labels count collectives")
    axes.set_ylabel("milliseconds, nothing clipped")
    axes.legend(fontsize=7)


def _lines(axes: Axes, growth: Growth) -> None:
    names = dict.fromkeys(tool.name for times in growth.times.values() for tool in times.tools)
    colours = mpl.color_sequences["tab20"]
    # First the strong colours, then the light ones, so that no two tools share one.
    axes.set_prop_cycle(color=[*colours[::2], *colours[1::2]])
    for name in names:
        points = [(count, 1e3 * times.median(name)) for count, times in growth.times.items() if name in times]
        floor = name.startswith("floor")
        line = "-" if name.startswith("tamegrad") else "--" if floor else ":"
        counts, times = zip(*points, strict=True)
        axes.plot(
            counts,
            times,
            line,
            color="black" if floor else None,
            marker="x" if name == WRITE else "o",
            markersize=3,
            label=name.replace("`", ""),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("layers of Linear(64, 64), nothing clipped")
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
