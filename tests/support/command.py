"""What tests of the command share."""

from collections.abc import Callable

__all__ = ["OPTIONS", "Run"]

# Starts the command; returns exit code, output and errors.
Run = Callable[..., tuple[int, str, str]]
OPTIONS = ["--text", "--network", "--strategy", "--threshold", "--steps", "--seed", "--seeds", "--lr", "--out"]
