"""Prints a Deeplearning4j model as a table."""

from tamegrad.dl4j.layers import Dl4jLayer, Dl4jModel
from tamegrad.strategies import Clip, ClipValue, GradientNormalization
from tamegrad.terminal import Row, Title, output, print_table

__all__ = ["print_model"]

_TITLES = tuple(
    Title(title, numbers=title in {"in", "out", "threshold"})
    for title in ("layer", "class", "in", "out", "strategy", "threshold")
)
_NOTHING = "–"


def print_model(model: Dl4jModel) -> None:
    """Prints one row per layer.

    Args:
        model: The model.
    """
    console = output()
    rows = [Row(_cells(layer), "" if layer.has_parameters else "dim") for layer in model.layers]
    print_table(console, _TITLES, rows)
    console.print(f"A {model.network}. Pass --python for the policy that does the same in PyTorch.", highlight=False)


def _cells(layer: Dl4jLayer) -> tuple[str, ...]:
    sizes = (_NOTHING if size is None else str(size) for size in (layer.n_in, layer.n_out))
    printable = (text if text.isprintable() else repr(text) for text in (layer.name, layer.kind))
    if not layer.has_parameters:
        return (*printable, *sizes, "no parameters", _NOTHING)
    threshold = layer.strategy.threshold if isinstance(layer.strategy, Clip | ClipValue) else None
    name = next(member for member in GradientNormalization if member(threshold or 1.0) == layer.strategy)
    return (*printable, *sizes, name.value, _NOTHING if threshold is None else repr(threshold).removesuffix(".0"))
