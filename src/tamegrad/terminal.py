"""The console and the table style that all commands share."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["output", "plain_table"]

# A file or a pipe has no width to fit in.
_WIDTH_OF_A_FILE = 120


def output() -> Console:
    """Returns a console on stdout, wide enough for a table if stdout is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_FILE)


def plain_table() -> Table:
    """Returns an empty table in the style that all commands share."""
    return Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
