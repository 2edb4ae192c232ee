"""Files are whole or not there, and private ones never anybody's else."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

import discovr_monai
from discovr_monai.base.files import PRIVATE, save_array, save_atomic, write_text
from discovr_monai.base.privacy import load_salt
from discovr_monai.base.tables import write_table
from discovr_monai.data.write.dicom import write_dicom

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


SAME_PATH = {
    "text": partial(write_text, text="whole"),
    "table": partial(write_table, header=("name",), rows=[("whole",)]),
    "array": partial(save_array, array=np.arange(9)),
    "cine": partial(write_dicom, frames=np.zeros((2, 16, 16), np.uint8)),
    "salt": load_salt,
}


@pytest.mark.parametrize("kind", SAME_PATH)
def test_two_writers_whose_processes_have_one_number(kind, tmp_path, monkeypatch):
    """As on two machines that share a disk; both have written before either renames."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    both_wrote, path = Barrier(2, timeout=60), tmp_path / "file"
    for name in ("replace", "hardlink_to"):
        rename = getattr(Path, name)

        def waiting(file, other, rename=rename):
            both_wrote.wait()
            return rename(file, other)

        monkeypatch.setattr(Path, name, waiting)
    with ThreadPoolExecutor(2) as writers:
        results = list(writers.map(SAME_PATH[kind], [path, path]))
    if kind == "salt":
        assert results[0] == results[1] == path.read_text().encode()
    assert path.stat().st_size > 0
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_no_temporary_name_is_made_of_a_process_number():
    package = Path(discovr_monai.__file__).parent
    made = re.compile(r"getpid\(\)\}?[^\n]*\.(tmp|part)")
    assert not [f.name for f in package.rglob("*.py") if made.search(f.read_text())]


def test_a_file_that_is_there_may_stay(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "first", replace=False)
    write_text(path, "second", replace=False)
    assert path.read_text() == "first"

    def unable(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", unable)  # a disk without hard links
    write_text(path, "second", replace=False)
    write_text(tmp_path / "other", "third", replace=False)
    assert path.read_text() == "first"
    assert (tmp_path / "other").read_text() == "third"
    assert len(list(tmp_path.iterdir())) == 2
