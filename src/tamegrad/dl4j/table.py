"""Prints a Deeplearning4j model as a table."""

from rich.table import Table
from rich.text import Text

from tamegrad.dl4j.layers import Dl4jLayer, Dl4jModel
from tamegrad.strategies import Clip, ClipValue, GradientNormalization
from tamegrad.terminal import output, plain_table

__all__ = ["print_model"]

_NOTHING = "–"


def print_model(model: Dl4jModel) -> None:
    """Prints one row per layer.

    Args:
        model: The model.
    """
    console = output()
    console.print(_table(model))
    console.print(f"A {model.network}. Pass --python for the policy that does the same in PyTorch.", highlight=False)


def _table(model: Dl4jModel) -> Table:
    table = plain_table()
    for title in ("layer", "class", "in", "out", "strategy", "threshold"):
        table.add_column(title, justify="right" if title in {"in", "out", "threshold"} else "left", overflow="fold")
    for layer in model.layers:
        # As text, not as markup: a layer's name may hold brackets or terminal control characters.
        table.add_row(*(Text(cell) for cell in _cells(layer)), style="" if layer.has_parameters else "dim")
    return table


def _cells(layer: Dl4jLayer) -> tuple[str, ...]:
    sizes = (_NOTHING if size is None else str(size) for size in (layer.n_in, layer.n_out))
    printable = (text if text.isprintable() else repr(text) for text in (layer.name, layer.kind))
    if not layer.has_parameters:
        return (*printable, *sizes, "no parameters", _NOTHING)
    threshold = layer.strategy.threshold if isinstance(layer.strategy, Clip | ClipValue) else None
    name = next(member for member in GradientNormalization if member(threshold or 1.0) == layer.strategy)
    return (*printable, *sizes, name.value, _NOTHING if threshold is None else repr(threshold).removesuffix(".0"))
