"""Files are whole or not there, and private ones never anybody's else."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from discovr_monai.base.files import PRIVATE, save_atomic, write_text
from discovr_monai.base.tables import write_table

WRITERS = {
    "text": (partial(write_text, text="é\n"), "é\n"),
    "table": (partial(write_table, header=("file", "age"), rows=[("=é", 3)]), "file,age\r\n'=é,3\r\n"),
}  # fmt: skip


@pytest.fixture
def open_to_all():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_private_file_is_private_from_its_first_byte(kind, tmp_path, open_to_all, monkeypatch):
    write, content = WRITERS[kind]
    path, modes, opened = tmp_path / "new" / "private", [], Path.open

    def watched(file, *args, **options):
        if file.exists():
            modes.append(file.stat().st_mode & 0o777)
        handle = opened(file, *args, **options)
        modes.append(file.stat().st_mode & 0o777)
        return handle

    left = path.with_name(f".private.{os.getpid()}.tmp")  # of a killed process
    left.parent.mkdir()
    left.write_text("longer than what comes")
    monkeypatch.setattr(Path, "open", watched)
    write(path, mode=PRIVATE)
    assert set(modes) == {0o600}
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes().decode() == content
    assert list(path.parent.iterdir()) == [path]


def test_others_are_as_open_as_the_user_has_them(tmp_path, open_to_all):
    write_text(tmp_path / "open", "x")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o666


def test_a_table_that_fails_leaves_the_old_one(tmp_path):
    def rows():
        yield ("new",)
        raise ValueError("no")

    path = tmp_path / "table.csv"
    write_table(path, ("name",), [("old",)])
    for mode in (None, PRIVATE):
        with pytest.raises(ValueError, match="^no$"):
            write_table(path, ("name",), rows(), mode=mode)
    assert path.read_text() == "name\nold\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_temporary_is_not_left_either(tmp_path):
    def fails(temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_atomic(fails, tmp_path / "file", mode=PRIVATE)
    assert not list(tmp_path.iterdir())
