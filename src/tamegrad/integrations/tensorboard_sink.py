"""`TensorBoardSink`: curves of the norms in TensorBoard."""

import os
from importlib.util import find_spec
from typing import Any, Protocol

from numpy.typing import NDArray

from tamegrad.errors import MissingExtraError
from tamegrad.report import Report

__all__ = ["TensorBoardSink"]


class _Writer(Protocol):
    """The part of a `SummaryWriter` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def flush(self) -> None: ...


class TensorBoardSink:
    """Adds what `Report.as_scalars` returns to TensorBoard, and flushes it.

    Args:
        log_dir: The folder for the event files; or a `SummaryWriter` that you have already, of PyTorch or tensorboardX.
        prefix: As in `Report.as_scalars`.

    Raises:
        MissingExtraError: If a folder is given and the package `tensorboard` is missing.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | _Writer, *, prefix: str = "grad") -> None:
        self._prefix = prefix
        self._folder: str | None = None
        self._writer: _Writer | None = None
        if not isinstance(log_dir, str | os.PathLike):
            self._writer = log_dir
            return
        self._folder = os.fspath(log_dir)
        if find_spec("tensorboard") is None:
            raise MissingExtraError(
                "TensorBoardSink",
                got="a Python without tensorboard",
                allowed="the package tensorboard, or a SummaryWriter of another package",
                advice="pip install tensorboard",
            )

    def write(self, step: int, report: Report[NDArray[Any]]) -> None:
        """Adds one point to every curve.

        Raises:
            OSError: If it cannot be written.
        """
        if self._writer is None:
            # Slow to import; and only rank 0 is to make an event file.
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            self._writer = SummaryWriter(self._folder)
        for name, value in report.as_scalars(self._prefix).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def __repr__(self) -> str:
        return f"TensorBoardSink({self._folder or self._writer!r})"
