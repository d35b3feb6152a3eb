"""Where the commands print their tables."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["output", "plain_table"]

# Where nobody looks at a terminal (a file, a pipe) there is no width to fit in.
_WIDTH_OF_A_FILE = 120


def output() -> Console:
    """Returns the standard output, wide enough for a table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_FILE)


def plain_table() -> Table:
    """Returns an empty table in the look that all commands share."""
    return Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
