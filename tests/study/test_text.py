import os
import re
from pathlib import Path

import pytest

from tamegrad import SettingError
from tamegrad.study import text as module
from tamegrad.study.text import read_text


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "song.txt"
    file.write_text("ninety-nine bottles of beer on the wall\n" * 400)
    return file


def test_reads_a_file(text_file: Path) -> None:
    text = read_text(text_file)
    assert (text.data, text.source, text.files) == (text_file.read_bytes(), str(text_file), 1)


def test_the_last_tenth_is_held_out(text_file: Path) -> None:
    text = read_text(text_file)
    assert len(text.data) - text.held_out_from == len(text.data) // 10


def test_the_default_is_pythons_standard_library_up_to_the_limit() -> None:
    text = read_text(None)
    assert len(text.data) <= 2_000_000
    assert b"import" in text.data
    assert text == read_text(None)


def test_text_files_of_a_folder_are_read_in_path_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "one.md").write_text("b" * 6000)
    (tmp_path / "a.txt").write_text("a" * 6000)
    (tmp_path / "c.bin").write_bytes(b"\0" * 6000)
    (tmp_path / "d.bin").write_bytes(b"\xff" * 6000)
    (tmp_path / "e.txt").write_text("")
    (tmp_path / ".hidden").write_text("h" * 6000)
    (tmp_path / ".git" / "config").write_text("g" * 6000)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    text = read_text(tmp_path)
    assert text.data == b"a" * 6000 + b"b" * 6000
    assert text.files == 2


def test_a_character_that_the_limit_cuts_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 10_001)
    file = tmp_path / "umlauts.txt"
    file.write_text("ä" * 6000, encoding="utf-8")
    assert read_text(file).data.decode() == "ä" * 5000


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"short", "5 bytes"),
        (b"text\0" * 4000, "a binary file"),
        (b"\xe4\xf6\xfc " * 4000, "a binary file"),
        ("ä".encode()[:1], "a binary file"),
    ],
)
def test_binary_and_short_files_are_refused(tmp_path: Path, content: bytes, found: str) -> None:
    file = tmp_path / "given.txt"
    file.write_bytes(content)
    with pytest.raises(SettingError, match=re.escape(f"--text {file}: got {found}; allowed: ")):
        read_text(file)


def test_a_path_that_is_not_utf8_is_read_and_named_in_utf8(tmp_path: Path, text_file: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_bytes(text_file.read_bytes())
    assert read_text(path).source == f"{tmp_path}/caf\\xe9.txt"
    assert read_text(tmp_path).files == 2


@pytest.mark.parametrize("length", [300, 5000])
def test_a_path_that_is_too_long_is_refused(length: int) -> None:
    with pytest.raises(
        SettingError, match=r"got a path that cannot be read \(File name too long\); allowed: a readable"
    ):
        read_text(Path("x" * length))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="got a path that does not exist; allowed: a text file or a folder; next: pass"
    ):
        read_text(tmp_path / "missing.txt")


def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingError, match="got something that is not a regular file"):
        read_text(tmp_path / "pipe")


@pytest.mark.parametrize("content", [None, b"\0", b""])
def test_a_folder_without_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(SettingError, match=re.escape(f"--text {tmp_path}: got a folder without any text; allowed: ")):
        read_text(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "_read", refuse)
    for path in (text_file, tmp_path):
        with pytest.raises(SettingError, match=r"song.txt: got a path that cannot be read \(Permission denied\)"):
            read_text(path)
