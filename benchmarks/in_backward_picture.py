"""Draws the memory of training with steps after backward and inside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]  # not installed for type checks
from in_backward_measure import AFTER, INSIDE, MIB, Memory
from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]  # not installed for type checks

__all__ = ["draw"]

_COLOURS = {AFTER: "#9aa5b1", INSIDE: "#0b6e4f"}
# From here on labels have no decimals.
_TENS = 10
# A white background keeps the picture readable on light and dark pages.
_STYLE: Any = {
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "tamegrad",
}


def draw(file: Path, memory: Sequence[Memory]) -> None:
    """Draws the picture.

    Args:
        file: The file to write; its folder is created if missing.
        memory: The measurements.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    panels = {
        "Most gradients at once, MiB": [each.live / MIB for each in memory],
        "Growth of the process over\nparameters and optimizer state, MiB": [each.resident / MIB for each in memory],
    }
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for shift, way in ((-0.2, AFTER), (0.2, INSIDE)):
                rows = [(each, value) for each, value in zip(memory, values, strict=True) if each.way == way]
                bars = axes.bar(
                    [place + shift for place in range(len(rows))],
                    [value for _, value in rows],
                    width=0.38,
                    color=_COLOURS[way],
                    label=f"step {way}",
                )
                axes.bar_label(bars, [f"{value:.2g}" if value < _TENS else f"{value:.0f}" for _, value in rows])
            axes.set_xticks(range(len(rows)), [f"{each.blocks} blocks" for each, _ in rows])
            axes.set_title(title)
            axes.set_ylim(0, 1.12 * max(values))
        figure.axes[0].legend(frameon=False, loc="upper left")
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
