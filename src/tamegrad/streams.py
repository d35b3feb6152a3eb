"""The command's standard streams: text that any terminal can show, and failures that are one line.

Standard output can fail at any write: a full disk, a closed pipe, an encoding that lacks a character.
"""

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, BinaryIO, TextIO

from tamegrad.errors import TamegradError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["OutputError", "ReaderGoneError", "checked_stdout", "printable", "write_error_line", "written_if_possible"]

# For encodings without these characters, such as ASCII.
_PLAIN = {"–": "-", "∞": "inf", "“": '"', "”": '"', "’": "'"}
_PLAIN_ERRORS = "tamegrad.plain"


class OutputError(TamegradError):
    """Standard output cannot be written to.

    Example:
        >>> raise OutputError("standard output", got="an error", allowed="a file", advice="free some space")
        Traceback (most recent call last):
        tamegrad.streams.OutputError: standard output: got an error; allowed: a file; next: free some space
    """


class ReaderGoneError(Exception):
    """Whoever read standard output has closed it, as `head` does after its last line; no mistake of the user's."""


def printable(text: str) -> str:
    r"""Escapes what a terminal or a UTF-8 file cannot hold: control characters, and bytes of a path that are no text.

    Args:
        text: Any text, such as an argument or a path.

    Returns:
        The text on one line.

    Example:
        >>> print(printable("münchen\n\x1b[2J"), printable("caf\udce9.txt"))
        münchen\n\x1b[2J caf\xe9.txt
    """
    decoded = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in decoded
    )


@contextmanager
def checked_stdout() -> Iterator[None]:
    """Replaces standard output, within a `with` block, by one with checked writes; flushes it at the end.

    Characters that its encoding lacks are written plainly or escaped. After an error nothing more is written to it.

    Raises:
        OutputError: If it cannot be written to.
        ReaderGoneError: If it is a pipe that was closed.
    """
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):  # closed, or replaced by the caller
        with redirect_stdout(io.StringIO() if stdout is None else stdout):
            yield
        return
    stdout.flush()
    writer = _CheckedWriter(stdout)
    checked = io.TextIOWrapper(  # type: ignore[type-var]  # typeshed wants a reader, too
        writer, stdout.encoding, _PLAIN_ERRORS, line_buffering=stdout.line_buffering
    )
    with redirect_stdout(checked):
        yield
        checked.flush()


def write_error_line(line: str) -> None:
    """Writes a line to standard error, if that can be written to: there is no place to report that it cannot.

    Args:
        line: The line, without its end.
    """
    with written_if_possible(sys.stderr):
        if sys.stderr is not None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


@contextmanager
def written_if_possible(stream: TextIO) -> Iterator[None]:
    """Discards, after an error within a `with` block, all that is written to a stream; for what a user can do without.

    Args:
        stream: A standard stream.
    """
    try:
        yield
    except OSError:
        _discard(stream)


class _CheckedWriter(io.BufferedIOBase):
    """Passes bytes on to a standard stream, and converts its errors."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self._buffer: BinaryIO = stream.buffer  # type: ignore[assignment]  # typeshed's type of it is not public

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._buffer.isatty()

    def fileno(self) -> int:
        return self._buffer.fileno()

    def write(self, data: "ReadableBuffer", /) -> int:
        if not memoryview(data).nbytes:  # click tries this first, and ignores errors
            return 0
        with self._converted_errors():
            return self._buffer.write(data)

    def flush(self) -> None:
        with self._converted_errors():
            self._buffer.flush()

    @contextmanager
    def _converted_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            _discard(self._stream)
            raise ReaderGoneError from error
        except OSError as error:
            _discard(self._stream)
            raise OutputError(
                "standard output",
                got=f"a place that cannot be written to ({error.strerror})",
                allowed="a terminal, a pipe or a file with space left",
                advice="free some space, or send the output elsewhere",
            ) from error


def _discard(stream: TextIO) -> None:
    """Points a stream at nothing: Python writes what is left in its buffers at exit, and would fail again."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def _written_plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (_PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode() for one in characters)
    return "".join(escaped), error.end


codecs.register_error(_PLAIN_ERRORS, _written_plainly)
