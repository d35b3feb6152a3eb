"""The console and the tables that all commands share."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Row", "Title", "output", "print_table"]

# A file or a pipe has no width to fit in.
_WIDTH_OF_A_FILE = 120

_NARROWEST_TEXT = 7  # characters; narrower columns of text are hard to read
_GAP = 2  # characters between two columns


@dataclass(frozen=True, slots=True)
class Title:
    """The title of a column.

    Args:
        text: One or two words.
        numbers: Whether the column holds numbers: aligned to the right, and never folded, because a part of a number
            looks like another number.
    """

    text: str
    numbers: bool

    @property
    def heading(self) -> str:
        """The title on two lines: a narrow heading leaves room for other columns."""
        return self.text.replace(" ", "\n", 1)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Args:
        cells: One text per column.
        style: The style of the row, as rich names it.
    """

    cells: Sequence[str]
    style: str


def output() -> Console:
    """Returns a console on stdout, wide enough for a table if stdout is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_A_FILE)


def print_table(console: Console, titles: Sequence[Title], rows: Sequence[Row]) -> None:
    """Prints a table or, in a terminal that is too narrow for it, a list with one line per cell.

    Args:
        console: Where to print.
        titles: The titles of the columns.
        rows: The rows. Their cells are text, not markup: a name may hold brackets.
    """
    widths = [
        max(len(line) for line in [*title.heading.split("\n"), *(row.cells[column] for row in rows)])
        for column, title in enumerate(titles)
    ]
    needed = [
        width if title.numbers else min(width, _NARROWEST_TEXT) for width, title in zip(widths, titles, strict=True)
    ]
    if sum(needed) + _GAP * len(titles) <= console.width:
        console.print(_table(titles, needed, rows))
        return
    for row in rows:
        name, *others = row.cells
        lines = [name, *(f"  {title.text}: {cell}" for title, cell in zip(titles[1:], others, strict=True))]
        console.print(Text("\n".join(lines), style=row.style))


def _table(titles: Sequence[Title], needed: Sequence[int], rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title, width in zip(titles, needed, strict=True):
        justify = "right" if title.numbers else "left"
        table.add_column(title.heading, min_width=width, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row.cells), style=row.style)
    return table
