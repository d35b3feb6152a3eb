"""Makes the page: one self-contained HTML file."""

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]  # plotly has no types

from tamegrad.study.charts import HIGHEST_LOSS, HIGHEST_NORM, LOWEST_NORM, heat_map, loss_chart
from tamegrad.study.columns import columns_of, rules
from tamegrad.study.results import Results, write_whole
from tamegrad.study.settings import STRATEGIES

__all__ = ["make_page", "write_page"]

FILE_NAME = "index.html"


def make_page(results: Results) -> str:
    """Returns the page of a comparison, made from the results alone.

    Args:
        results: The contents of `results.json`.

    Returns:
        HTML with styles, scripts and data inline.
    """
    names = list(STRATEGIES)
    charts = {
        "held-out": loss_chart(results, names, held_out=True),
        "training": loss_chart(results, names, held_out=False),
        "norms": heat_map(results),
    }
    template = Environment(
        loader=PackageLoader("tamegrad.study", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    ).get_template("page.html")
    return template.render(
        results=results,
        columns=columns_of(results),
        color_of=names.index,
        rules=rules(results),
        highest_loss=HIGHEST_LOSS,
        lowest_norm=LOWEST_NORM,
        highest_norm=HIGHEST_NORM,
        charts=_script(json.dumps(charts, allow_nan=False)),
        plotly_js=_script(get_plotlyjs()),
    )


def write_page(results: Results, folder: Path) -> Path:
    """Writes `index.html` atomically.

    Args:
        results: The contents of `results.json`.
        folder: The folder to write to.

    Returns:
        The path of the file.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path = folder / FILE_NAME
    write_whole(path, make_page(results))
    return path


def _script(source: str) -> Markup:
    """Escapes a script or JSON for use inside a script element, which only its end tag closes."""
    return Markup(source.replace("</script", "<\\/script"))  # noqa: S704  our own data, and plotly's own script
