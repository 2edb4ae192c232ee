"""Checkpoints in a folder: every rank writes its part, any number of ranks reads them.

torch.distributed.checkpoint with its safetensors storage: nothing is pickled. It is imported where
it is used, for that takes a second.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovr_monai.base.distributed import barrier, gather_objects, rank
from discovr_monai.base.types import CheckpointError

STATE = "state.json"
PENDING, BEFORE = ".partial", ".before"  # while a folder is written, and while it is replaced


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint; collective. ``folder`` is the old one or the new one at any moment.

    Args:
        folder: its name ends without a suffix.
        tensors: name -> tensor, sharded or the same on every rank.
        state: what else to keep; must go into JSON.

    Raises:
        OSError: on every rank, where one could not write; the old checkpoint stays.
    """
    import torch.distributed.checkpoint as dcp

    pending = folder.with_name(folder.name + PENDING)
    if not rank():
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir(parents=True)
    barrier()
    failure: BaseException | None = None
    try:
        writer = dcp.HuggingFaceStorageWriter(str(pending), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer)
    except Exception as error:  # a full disk; torch wraps it
        failure = error
    if any(gather_objects(failure is not None)):
        if not rank():
            shutil.rmtree(pending, ignore_errors=True)
        raise OSError(f"a rank could not write: {failure or 'another one'}")
    if not rank():
        files = {f.name: f.stat().st_size for f in sorted(pending.glob("*.safetensors"))}
        with (pending / STATE).open("w") as file:
            json.dump({**state, "files": files}, file)
            file.flush()
            os.fsync(file.fileno())
        before = folder.with_name(folder.name + BEFORE)
        shutil.rmtree(before, ignore_errors=True)
        if folder.exists():
            folder.rename(before)
        pending.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    barrier()


def find_sharded(folder: Path) -> Path | None:
    """The checkpoint at ``folder``, or the one before it where a crash came between the two."""
    for candidate in (folder, folder.with_name(folder.name + BEFORE)):
        if (candidate / STATE).is_file():
            return candidate
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What was given as ``state``.

    Raises:
        CheckpointError: if the folder is no checkpoint, or a part of it is gone or cut short.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        sizes = {name: (folder / name).stat().st_size for name in state["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder.name} is not a whole checkpoint folder: copy it again with all its files"
        ) from error
    wrong = [name for name, size in state["files"].items() if sizes[name] != size]
    if wrong:
        raise CheckpointError(f"{folder.name}/{wrong[0]} is cut short: copy the folder again")
    return state


def shapes(folder: Path) -> dict[str, Tensor]:
    """Name -> a tensor of the whole shape and type, without memory."""
    import torch.distributed.checkpoint as dcp

    described = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: torch.empty(about.size, dtype=about.properties.dtype, device="meta")  # type: ignore[union-attr]
        for name, about in described.items()
    }


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors, sharded in whatever way or whole, from a checkpoint."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # alone it is
        dcp.load(dict(tensors), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors whose names begin with ``prefix``, whole, under the rest of their names."""
    named = {name: t for name, t in shapes(folder).items() if name.startswith(prefix)}
    tensors = {name: torch.empty_like(t, device="cpu") for name, t in named.items()}
    read_into(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
