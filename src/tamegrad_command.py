"""Starts the command `tamegrad`, so that Ctrl-C is one line and exit code 130 even while modules are imported.

It lies outside the package because whatever is imported from `tamegrad` imports NumPy first, which takes a while.
"""

import os
import signal

__all__ = ["main"]


def main() -> None:
    """Runs the command and ends the process.

    Raises:
        SystemExit: Always; its code is 0, 2 for user-fixable errors, or 130 for Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # an ignored Ctrl-C stays ignored
        signal.signal(signal.SIGINT, _exit_at_once)
    from tamegrad import cli  # noqa: PLC0415  after the handler is set: this is what takes a while

    try:
        cli.main()
    finally:
        # All is done and written; an interrupt while Python shuts down would only change the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _exit_at_once(*_: object) -> None:
    """Ends the process without an exception: modules in the middle of their import swallow or replace exceptions."""
    try:
        os.write(2, b"tamegrad: interrupted\n")
    finally:
        os._exit(130)
