"""The folder and the two files that `tamegrad compare` writes."""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tamegrad.errors import SettingError
from tamegrad.study.page import write_page
from tamegrad.study.results import Results, read_results, write_results
from tamegrad.study.settings import OUT

__all__ = ["Files", "new_folder", "write_files"]

# More than the files of a comparison with the defaults take; most is plotly's script.
SPACE = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a comparison.

    Args:
        numbers: `results.json`; None if it could not be written anywhere.
        page: `index.html`, likewise.
        error: Why they are not in the folder that was asked for; None if they are.
    """

    numbers: Path | None
    page: Path | None
    error: SettingError | None


def new_folder(out: str) -> Path:
    """Makes the folder or, if that path exists, one beside it with the next free number.

    Args:
        out: The path that the user asked for.

    Returns:
        The folder, in which there is space for the files.

    Raises:
        SettingError: If it cannot be made, or holds no file of the size needed.
    """
    wanted = Path(out)
    if not out or not wanted.resolve().name:
        raise SettingError("--out", got=repr(out), allowed="the path of a folder", advice=f"leave it out for {OUT}")
    # The name of "." or ".." is only known once resolved.
    base = wanted if wanted.name not in {"", ".."} else wanted.resolve()
    for number in itertools.count(1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            folder.mkdir(parents=True)
            _check_space(folder)
        except FileExistsError:
            continue
        except OSError as error:
            raise _not_writable(out, error, "pass another folder to --out") from error
        return folder
    raise AssertionError  # count never ends


def write_files(results: Results, folder: Path) -> Files:
    """Writes the files to the folder or, if that fails, to a new temporary folder: training takes long.

    Args:
        results: The results of the comparison.
        folder: The folder, as `new_folder` returned it.

    Returns:
        The files, and the error if there was one.
    """
    try:
        return _written(results, folder, None)
    except OSError as error:
        reason = error
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix=f"{OUT}-"))
        return _written(results, elsewhere, _not_writable(str(folder), reason, f"find the results in {elsewhere}"))
    except OSError:
        return Files(None, None, _not_writable(str(folder), reason, "free some space, and run it again"))


def _written(results: Results, folder: Path, error: SettingError | None) -> Files:
    numbers = write_results(results, folder)
    # Made from the written file, so that the page shows only what the file holds.
    return Files(numbers, write_page(read_results(numbers), folder), error)


def _check_space(folder: Path) -> None:
    """Writes a file of the size needed and deletes it; without space, no folder is left either."""
    file = folder / ".space"
    try:
        file.write_bytes(b"\0" * SPACE)
    except OSError:
        file.unlink(missing_ok=True)
        folder.rmdir()
        raise
    file.unlink()


def _not_writable(out: str, error: OSError, advice: str) -> SettingError:
    return SettingError(
        f"--out {out}",
        got=f"a path that cannot be written to ({error.strerror})",
        allowed="a folder that can be made and written to, with space for some megabytes",
        advice=advice,
    )
