"""A folder of versions: whole or not there, current only when promoted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from discovr_monai.base.files import save_atomic
from discovr_monai.label.learn.versions import Versions, better
from discovr_monai.weights.files import CheckpointError
from tests.label.models import write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model.pt")


@pytest.fixture
def versions(base, tmp_path) -> Versions:
    return Versions(tmp_path / "versions", base)


def copy_of(base: Path):
    return lambda path: path.write_bytes(base.read_bytes())


def test_the_base_serves_first_and_stays_as_it_was(versions, base):
    assert versions.current == 0 and versions.numbers == [0]
    assert versions.path(versions.current).read_bytes() == base.read_bytes()
    assert Versions(versions.folder).current == 0  # a second process needs no base


def test_a_new_version_serves_only_when_promoted(versions, base):
    number = versions.add(copy_of(base), {"scores": {"dice_mean": 0.5}})
    assert number == 1 and versions.current == 0
    versions.promote(1)
    assert versions.current == 1 and versions.about(1)["scores"] == {"dice_mean": 0.5}
    assert versions.roll_back() == 0 and versions.current == 0
    assert versions.numbers == [0, 1]
    with pytest.raises(ValueError, match="none to go back to"):
        versions.roll_back()


def test_a_number_is_never_given_twice(versions, base):
    (versions.folder / "0001.pt").write_bytes(b"cut off by a kill")  # no 0001.json
    assert versions.numbers == [0]
    assert versions.add(copy_of(base), {}) == 2
    with pytest.raises(ValueError, match="there is no version 1"):
        versions.promote(1)


def test_what_has_changed_is_not_promoted(versions, base):
    number = versions.add(copy_of(base), {})
    with versions.path(number).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="has changed since"):
        versions.promote(number)
    assert versions.current == 0


def test_no_numbers_no_version(versions, base):
    def diverged(path: Path) -> None:
        state = torch.load(base, weights_only=True)
        state["segmentation.layers.1.bias"] *= float("nan")
        torch.save(state, path)

    with pytest.raises(CheckpointError, match="not finite: the training diverged"):
        versions.add(diverged, {})
    assert versions.numbers == [0] and not list(versions.folder.glob("*.pt.*"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_code_is_never_run(versions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="never run"):
        versions.add(lambda path: torch.save({"x": Evil()}, path), {})
    assert not Path("evil").exists() and versions.numbers == [0]


def test_a_full_disk_leaves_the_old_one(versions):
    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        versions.add(full, {})
    assert versions.current == 0 and versions.numbers == [0]
    assert not list(versions.folder.glob(".0001*"))


def test_killed_amid_the_pointer_the_old_one_serves(versions, base):
    """The process dies after the pointer's new content is written and before it is renamed."""
    number = versions.add(copy_of(base), {})
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {sys.path!r}
from discovr_monai.label.learn.versions import Versions
versions = Versions({str(versions.folder)!r})
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
versions.promote({number})
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(versions.folder.glob(".current.json.*.tmp"))  # it was amid it
    again = Versions(versions.folder)
    assert again.current == 0
    again.promote(number)  # neither lock nor leftovers are in the way
    assert again.current == number


def test_a_folder_needs_a_beginning(tmp_path):
    with pytest.raises(ValueError, match="name a model to begin"):
        Versions(tmp_path / "new")
    save_atomic(lambda path: Path(path).write_text("no model"), tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        Versions(tmp_path / "new", tmp_path / "model.pt")
    assert not (tmp_path / "new" / "current.json").exists()


def test_only_above_is_better():
    assert better({"dice_mean": 0.8}, {"dice_mean": 0.7})
    for worse in (0.7, 0.6, float("nan")):
        assert not better({"dice_mean": worse}, {"dice_mean": 0.7})
    assert better({"dice_mean": 0.1}, {"dice_mean": float("nan")})


def test_what_is_known_is_plain_json(versions, base):
    number = versions.add(copy_of(base), {"origin": "annotation"})
    text = (versions.folder / f"{number:04d}.json").read_text()
    assert set(json.loads(text)) == {"origin", "sha256"} and str(versions.folder) not in text
