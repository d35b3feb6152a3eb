"""Appending to text files that an interrupted run may have left without an end of line."""

import os
from pathlib import Path

__all__ = ["append_line"]


def append_line(path: Path, line: str) -> None:
    """Appends one line to a file, in a single write; makes the file, and its folder, if there is none.

    Nothing stays open, so that what was written is there whatever happens to this process.

    Args:
        path: The file.
        line: The line, without its end.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = f"\n{line}"
        file.write(f"{line}\n".encode())
