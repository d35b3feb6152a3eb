"""Reads the training text: a UTF-8 file, or the text files of a folder."""

import codecs
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tamegrad.errors import SettingError
from tamegrad.streams import printable

__all__ = ["Text", "read_text"]

MOST_BYTES = 2_000_000  # a few hundred steps would not see more
FEWEST_BYTES = 10_000
HELD_OUT_SHARE = 0.1

_ADVICE = "pass --text FILE_OR_FOLDER, or leave it out for the source of Python's standard library"


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a comparison, as UTF-8 bytes.

    Args:
        data: The bytes.
        source: Where it comes from, for people to read.
        files: The number of files it was read from.
    """

    data: bytes
    source: str
    files: int

    @property
    def held_out_from(self) -> int:
        """The index of the first held-out byte: the last tenth is held out."""
        return len(self.data) - int(len(self.data) * HELD_OUT_SHARE)


def read_text(path: Path | None) -> Text:
    """Reads a file, a folder, or the default: the source of Python's standard library.

    Folders are read recursively, in the order of paths, without hidden files and folders (names that start with a dot)
    and without files that are not text. Text is UTF-8 without NUL. At most 2,000,000 bytes are read.

    Args:
        path: The file or folder; None for the default.

    Returns:
        The text.

    Raises:
        SettingError: If the path does not exist, cannot be read, is not text, or is shorter than 10,000 bytes.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        # Only the top level: subfolders differ more between distributions.
        return _joined(library, sorted(library.glob("*.py")), "the source of Python's standard library")
    try:
        if path.is_dir():
            return _joined(path, _files_of(path), printable(str(path)))
        if not path.is_file():
            found = "something that is not a regular file" if path.exists() else "a path that does not exist"
            raise _refusal(path, found, "a text file or a folder")
        data = _read(path, MOST_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    if data is None:
        raise _refusal(path, "a binary file", "text: UTF-8 without NUL")
    return _checked(path, Text(data, printable(str(path)), 1))


def _joined(folder: Path, files: Iterable[Path], source: str) -> Text:
    parts: list[bytes] = []
    size = 0
    for file in files:
        if size >= MOST_BYTES:
            break
        try:
            part = _read(file, MOST_BYTES - size)
        except OSError as error:
            raise _unreadable(file, error) from error
        if part:
            parts.append(part)
            size += len(part)
    if not parts:
        raise _refusal(folder, "a folder without any text", "a folder with text files: UTF-8 without NUL")
    return _checked(folder, Text(b"".join(parts), source, len(parts)))


def _files_of(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(parent, name)
            # Skips pipes, which would block, and broken links.
            if not name.startswith(".") and file.is_file():
                yield file


def _read(file: Path, most: int) -> bytes | None:
    """Returns up to `most` bytes from the start of a file; None if they are not text."""
    with file.open("rb") as stream:
        data = stream.read(most)
        whole = not stream.read(1)
    if b"\0" in data:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        # Drops the rest of a character that the limit cuts in two.
        return decoder.decode(data, final=whole).encode()
    except UnicodeDecodeError:
        return None


def _checked(path: Path, text: Text) -> Text:
    if not text.data:
        raise _refusal(path, "an empty file", f"at least {FEWEST_BYTES:,} bytes of text")
    if len(text.data) < FEWEST_BYTES:
        raise _refusal(path, f"{len(text.data):,} bytes", f"at least {FEWEST_BYTES:,} bytes of text")
    return text


def _unreadable(path: Path, error: OSError) -> SettingError:
    return _refusal(path, f"a path that cannot be read ({error.strerror})", "a readable file or folder")


def _refusal(path: Path, got: str, allowed: str) -> SettingError:
    return SettingError(f"--text {path}", got=got, allowed=allowed, advice=_ADVICE)
