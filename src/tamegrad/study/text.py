"""Reads the text that the networks learn: any UTF-8 file, or the files of a folder."""

import codecs
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tamegrad.errors import SettingError

__all__ = ["Text", "read_text"]

MOST_BYTES = 2_000_000  # more would not be seen in a few hundred steps
FEWEST_BYTES = 10_000
HELD_OUT_SHARE = 0.1

_ADVICE = "pass --text FILE_OR_FOLDER, or leave it out for the source of Python's standard library"


@dataclass(frozen=True, slots=True)
class Text:
    """The text of a comparison, as bytes of UTF-8.

    Args:
        data: All of it.
        source: Where it is from, in words.
        files: How many files it was read from.
    """

    data: bytes
    source: str
    files: int

    @property
    def held_out_from(self) -> int:
        """The position of the first byte that no run is trained on: the last tenth is held out."""
        return len(self.data) - int(len(self.data) * HELD_OUT_SHARE)


def read_text(path: Path | None) -> Text:
    """Reads a file, a folder, or the default: the source of Python's standard library.

    Of a folder all files count, those of folders below too, in the order of their paths, but for hidden ones (a name
    that starts with a dot) and those that are not text. Text is UTF-8 without NUL. At most 2,000,000 bytes are read.

    Args:
        path: The file or folder; None for the default.

    Returns:
        The text.

    Raises:
        SettingError: If there is nothing there, it cannot be read, is no text, or is shorter than 10,000 bytes.
    """
    if path is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        # Only the top level: what lies below differs more between distributions.
        return _joined(library, sorted(library.glob("*.py")), "the source of Python's standard library")
    if path.is_dir():
        return _joined(path, _files_of(path), str(path))
    if not path.is_file():
        found = "something that is no regular file" if path.exists() else "a path where nothing is"
        raise _refusal(path, found, "a text file or a folder")
    try:
        data = _read(path, MOST_BYTES)
    except OSError as error:
        raise _refusal(path, f"a file that cannot be read ({error.strerror})", "a readable file") from error
    if data is None:
        raise _refusal(path, "a binary file", "text: UTF-8 without NUL")
    return _checked(path, Text(data, str(path), 1))


def _joined(folder: Path, files: Iterable[Path], source: str) -> Text:
    parts: list[bytes] = []
    size = 0
    for file in files:
        if size >= MOST_BYTES:
            break
        try:
            part = _read(file, MOST_BYTES - size)
        except OSError as error:
            raise _refusal(file, f"a file that cannot be read ({error.strerror})", "a readable file") from error
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
            # A pipe would be waited for; a broken link is nothing.
            if not name.startswith(".") and file.is_file():
                yield file


def _read(file: Path, most: int) -> bytes | None:
    """Returns the first bytes of a file, at most so many; None if they are no text."""
    with file.open("rb") as stream:
        data = stream.read(most)
        whole = not stream.read(1)
    if b"\0" in data:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        # Where the limit cuts through a character, what is left of it is dropped.
        return decoder.decode(data, final=whole).encode()
    except UnicodeDecodeError:
        return None


def _checked(path: Path, text: Text) -> Text:
    if not text.data:
        raise _refusal(path, "an empty file", f"at least {FEWEST_BYTES:,} bytes of text")
    if len(text.data) < FEWEST_BYTES:
        raise _refusal(path, f"{len(text.data):,} bytes", f"at least {FEWEST_BYTES:,} bytes of text")
    return text


def _refusal(path: Path, got: str, allowed: str) -> SettingError:
    return SettingError(f"--text {path}", got=got, allowed=allowed, advice=_ADVICE)
