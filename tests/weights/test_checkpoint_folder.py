"""Checkpoint folders: whole or not at all, and what is wrong in one sentence."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from discovr_monai.weights import checkpoint_folder
from discovr_monai.weights.checkpoint_folder import (
    find_sharded,
    read_state,
    read_whole,
    write_sharded,
)
from discovr_monai.weights.files import CheckpointError, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STATE = {"format": 1, "about": {"clip": None}, "iteration": 3}


def tensors(value=1.0):
    return {
        "network.a": torch.full((3, 2), value),
        "network.step": torch.tensor(value),
        "optimizer.a.exp_avg": torch.zeros(3, 2),
    }


@pytest.fixture
def folder(tmp_path):
    write_sharded(tmp_path / "last", tensors(), STATE)
    return tmp_path / "last"


def test_what_is_written_is_read(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_checkpoint(folder)
    assert {k: found[k] for k in STATE} == STATE
    assert found["network"].keys() == {"a", "step"}
    assert torch.equal(found["network"]["a"], torch.ones(3, 2))
    assert float(found["network"]["step"]) == 1
    assert not any(b"pickle" in f.read_bytes() for f in folder.iterdir())


def test_a_crash_between_two_renames_leaves_the_one_before(folder):
    folder.rename(folder.with_name("last.before"))
    found = find_sharded(folder)
    assert found is not None
    assert read_state(found)["iteration"] == 3


def test_a_failed_write_leaves_the_one_before(folder, monkeypatch):
    import torch.distributed.checkpoint as dcp

    def full(*_, **__):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(OSError, match="could not write: No space left"):
        write_sharded(folder, tensors(2.0), STATE | {"iteration": 9})
    assert [f.name for f in folder.parent.iterdir()] == ["last"]
    assert read_state(folder)["iteration"] == 3
    assert float(read_whole(folder, "network.")["step"]) == 1


def test_the_next_one_replaces_it(folder):
    write_sharded(folder, tensors(2.0), STATE | {"iteration": 9})
    assert [f.name for f in folder.parent.iterdir()] == ["last"]
    assert read_state(folder)["iteration"] == 9
    assert float(read_whole(folder, "network.")["a"][2, 1]) == 2


@pytest.mark.parametrize("damage", ["gone", "short", "no list", "no json"])
def test_a_damaged_folder_is_refused(folder, damage):
    (part,) = folder.glob("*.safetensors")
    state = folder / checkpoint_folder.STATE
    if damage == "gone":
        part.unlink()
    elif damage == "short":
        part.write_bytes(part.read_bytes()[:-5])
    elif damage == "no list":
        state.write_text(json.dumps(STATE))
    else:
        state.write_text("{")
    message = "is cut short" if damage == "short" else "last is not a whole checkpoint folder: copy"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(folder)
