"""Reads the configuration from a file, in memory and within limits; nothing is executed or written to disk.

The limits fit the largest realistic configuration: ten thousand bidirectional layers are 35 MB of text, 170,000 objects
and lists, and 800,000 commas. They allow little more, so that a hostile file is refused within a second.
"""

import io
import json
import re
import reprlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tamegrad.errors import TamegradError, closest, quoted

__all__ = ["Dl4jFileError", "Node", "read_document"]

MOST_BYTES = 40 * 2**20
MOST_NESTED = 64
MOST_OBJECTS = 300_000
MOST_COMMAS = 1_200_000

ENTRY = "configuration.json"

_PIECE = 2**20
_ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_ENCRYPTED = 0x41
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LEAVES = re.compile(r"[/\\]|[A-Za-z]:|(?:.*[/\\])?\.\.(?:[/\\]|$)", re.DOTALL)

# Everything that zipfile raises for a broken archive; the file system raises OSError.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    UnicodeDecodeError,
)

# Before nesting is counted, everything but brackets, quotes and backslashes is dropped, and braces become brackets.
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b'{}[]"\\'))

_PLAIN_KEY = re.compile(r"[A-Za-z_@][\w@-]*", re.ASCII)
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _MOST_SHOWN = 80

_RESAVE = "save the model again with Deeplearning4j's ModelSerializer.writeModel, or its configuration with toJson()"


class Dl4jFileError(TamegradError):
    """A file is not a model or configuration that Deeplearning4j could have saved; the message names the place in it.

    Example:
        >>> raise Dl4jFileError("a.json: confs[0].layer", got="a list", allowed="an object", advice="save it again")
        Traceback (most recent call last):
        tamegrad.dl4j.document.Dl4jFileError: a.json: confs[0].layer: got a list; allowed: an object; next: save it
        again
    """


class Node(NamedTuple):  # 10,000 layers need 100,000 of these, and tuples are twice as fast
    """A value of the configuration and its path. Numbers are floats; NaN and infinity are strings.

    Args:
        file: The file, as the user named it.
        value: The parsed value; None also if there is no such field.
        trail: The keys and indices that lead to it.
    """

    file: str
    value: object
    trail: tuple[str | int, ...] = ()

    @property
    def place(self) -> str:
        """The path to the value: `confs[3].layer`."""
        return "".join([f"[{key}]" if isinstance(key, int) else _step(key) for key in self.trail]).removeprefix(".")

    def fields(self) -> dict[str, object]:
        """Returns the fields of an object.

        Returns:
            The parsed fields.

        Raises:
            Dl4jFileError: If the value is not an object.
        """
        if not isinstance(self.value, dict):
            raise self.refused("an object")
        return self.value

    def items(self) -> "Iterator[Node]":
        """Returns the values of a list.

        Returns:
            One node per value, made lazily.

        Raises:
            Dl4jFileError: If the value is not a list.
        """
        if not isinstance(self.value, list):
            raise self.refused("a list")
        return (Node(self.file, value, (*self.trail, index)) for index, value in enumerate(self.value))

    def at(self, key: str) -> "Node":
        """Returns a field of an object.

        Args:
            key: The field's name.

        Returns:
            Its node, whose value is None if there is no such field.

        Raises:
            Dl4jFileError: If the value is not an object.
        """
        return Node(self.file, self.fields().get(key), (*self.trail, key))

    def text(self) -> str:
        """Returns a string.

        Returns:
            The value.

        Raises:
            Dl4jFileError: If the value is not a string.
        """
        if not isinstance(self.value, str):
            raise self.refused("a string")
        return self.value

    def refused(self, allowed: str, advice: str = _RESAVE, got: str | None = None) -> Dl4jFileError:
        """Returns the error that refuses this value.

        Args:
            allowed: What would have been accepted.
            advice: What to do next.
            got: What was found, if the value itself does not show it.

        Returns:
            The error, for the caller to raise.
        """
        where = f"{self.file}: {self.place}" if self.trail else self.file
        return Dl4jFileError(where, got=shown(self.value) if got is None else got, allowed=allowed, advice=advice)


def shown(value: object) -> str:
    """Formats a value of the configuration for a message, shortened if it is long.

    Args:
        value: The parsed value.

    Returns:
        Its text, or its type.

    Example:
        >>> shown([1.0, 2.0])
        'a list'
    """
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case list():
            return "a list"
        case dict():
            return "an object"
        case float() if value in (float("inf"), float("-inf")):
            return "a number too large for 64 bits"
        case _:
            return _SHOWN.repr(value)


def read_document(path: Path) -> Node:
    """Reads a saved model's `configuration.json`, or a bare configuration.

    Args:
        path: The `.zip` or `.json`; recognized by content, not by name.

    Returns:
        The whole configuration.

    Raises:
        Dl4jFileError: If the file cannot be read, is neither, or exceeds a limit.
    """
    return _parsed(_text(_read(path), path), path)


def _text(content: bytearray, path: Path) -> str:
    if not content or content.isspace():
        raise _no_model(path, got="an empty file")
    _check_extent(content, path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_model(path, got=f"a binary file, or text that is not UTF-8 (at byte {error.start})") from None


def _no_model(path: Path, got: str, place: str = "") -> Dl4jFileError:
    return Dl4jFileError(
        f"{path}: {place}" if place else str(path),
        got=got,
        allowed="a model saved by Deeplearning4j (.zip), or its configuration (.json)",
        advice=_RESAVE,
    )


class _SmallReads(io.FileIO):
    """A file that limits the size of each read: an archive states the sizes of its own parts, and may lie."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = _PIECE + 1 if size is None or size < 0 else min(size, _PIECE + 1)
        data = super().read(wanted)
        if len(data) > _PIECE:
            raise zipfile.BadZipFile(f"a list of entries longer than {_PIECE} bytes")
        return data


def _read(path: Path) -> bytearray:
    try:
        if not path.is_file():  # also refuses named pipes, which would block forever
            raise _no_model(path, got="a directory" if path.is_dir() else "no file")
        with _SmallReads(path) as file:
            mark = file.read(len(_ZIP_MARKS[0]))
            file.seek(0)
            return _read_entry(file, path) if mark in _ZIP_MARKS else _bounded(file.read, path)
    except OSError as error:
        raise _no_model(path, got=f"a file that cannot be read ({error.strerror or error})") from error


def _bounded(read: Callable[[int], bytes], path: Path) -> bytearray:
    content = bytearray()
    while piece := read(_PIECE):
        content += piece
        if len(content) > MOST_BYTES:
            raise _too_much(path, f"more than {MOST_BYTES} bytes")
    return content


def _too_much(path: Path, got: str) -> Dl4jFileError:
    return Dl4jFileError(
        f"{path}: configuration",
        got=got,
        allowed=f"{MOST_BYTES} bytes, {MOST_OBJECTS} objects and lists, nested {MOST_NESTED} deep",
        advice="check where the file comes from: a network of 10,000 layers stays well below this",
    )


def _read_entry(file: _SmallReads, path: Path) -> bytearray:
    try:
        with zipfile.ZipFile(file) as archive:
            entry = _entry(archive.infolist(), path)
            with archive.open(entry) as opened:
                return _bounded(opened.read, path)
    except _BROKEN_ZIP as error:
        reason = str(error)[:200] or "an entry ends too early"
        raise _no_model(path, got=f"a zip file that is truncated or damaged ({reason})") from error


def _entry(entries: Sequence[zipfile.ZipInfo], path: Path) -> zipfile.ZipInfo:
    for entry in entries:
        if _LEAVES.match(entry.orig_filename):
            raise _no_model(path, got="a path that leaves the archive", place=shown(entry.orig_filename))
    found = [entry for entry in entries if entry.orig_filename == ENTRY]
    if len(found) != 1:
        near = closest(ENTRY, (entry.orig_filename[:_MOST_SHOWN] for entry in entries[:1000]))
        got = f"a zip file with {len(found)} entries of that name; closest: {quoted(near)}"
        raise _no_model(path, got=got, place=ENTRY)
    entry = found[0]
    if entry.flag_bits & _ENCRYPTED:
        raise _no_model(path, got="an encrypted entry", place=ENTRY)
    if entry.compress_type not in _METHODS:  # these two are unpacked in bounded pieces, others all at once
        raise _no_model(path, got=f"compression method {entry.compress_type}, not deflate", place=ENTRY)
    return entry


def _check_extent(content: bytearray, path: Path) -> None:
    # Bounds the memory and the parser's stack before anything is parsed. Each step is one pass over the bytes in C: it
    # drops the escapes, then everything but brackets and quotes, then the empty pairs of quotes.
    if content.count(b",") > MOST_COMMAS:
        raise _too_much(path, f"more than {MOST_COMMAS} values")
    bare = content.replace(b"\\\\", b"").replace(b'\\"', b"").translate(_BRACKETS, _OTHERS)
    quotes = bare.replace(b"\\", b"").replace(b'""', b"").split(b'"', 2 * MOST_OBJECTS)
    brackets = b"".join(quotes[::2])  # every second piece was in quotes: text
    if max(brackets.count(b"["), brackets.count(b"]"), len(quotes) // 2) >= MOST_OBJECTS:
        raise _too_much(path, f"{MOST_OBJECTS} objects and lists or more")
    # Each pass removes the innermost brackets; values nested within the limit are gone after that many passes.
    for _ in range(MOST_NESTED):
        if b"[]" not in brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets or b"[" * (MOST_NESTED + 1) in brackets:
        raise _too_much(path, f"values nested more than {MOST_NESTED} deep")


class _Repeated(dict[str, object]):
    """An object with a duplicate key; it marks the place until the path to it is known."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)


def _parsed(text: str, path: Path) -> Node:
    repeated = False

    def fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal repeated
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        repeated = True
        return _Repeated(pairs)

    try:
        # An integer read as a float cannot be too long to convert; NaN with or without quotes is the same string.
        document = json.loads(text, parse_int=float, parse_constant=str, object_pairs_hook=fields)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise _no_model(path, got=f"text that is not JSON ({error.msg})", place=place) from None
    root = Node(str(path), document)
    if repeated:
        raise _repetition(root)
    return root


def _repetition(root: Node) -> Dl4jFileError:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node.value, _Repeated):
            again = Node(node.file, None, (*node.trail, node.value.key))
            return again.refused("each key once per object", got="a duplicate key")
        if isinstance(node.value, dict):
            waiting += [node.at(key) for key in node.value]
        elif isinstance(node.value, list):
            waiting += node.items()
    raise AssertionError("an object was marked, so the walk must find it")


def _step(key: str) -> str:
    return f".{key}" if len(key) <= _MOST_SHOWN and _PLAIN_KEY.fullmatch(key) else f"[{_SHOWN.repr(key)}]"
