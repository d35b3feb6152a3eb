"""Runs Python code in a new process, where nothing is imported or compiled yet."""

import os
import subprocess
import sys

__all__ = ["run_python"]


def run_python(code: str, *, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs code with further environment variables; with `check`, an exit code other than 0 is an error."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=check,
        timeout=240,
        env={**os.environ, **environment},
    )
