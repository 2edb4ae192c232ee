"""Versions of a model in a folder: written beside, scored, made current by one rename.

    FOLDER/0003.pt        a version, as inference takes it; never changed once it exists
    FOLDER/0003.json      what is known of it; without this file, a version was cut off and does
                          not count
    FOLDER/current.json   which versions served, in turn; the last one serves

A file is used only if its hash says that it is the one that was written, and nothing is unpickled.
The aliases of MLflow's registry do less: they hold no history to go back in, and the store may lie
on a server, where the files' folder would be a second source of truth.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from discovr_monai.base.files import save_atomic, write_text
from discovr_monai.inference.model import load_model
from discovr_monai.weights.files import CheckpointError, read_checkpoint


class Versions:
    """The versions of one model; several processes may share the folder.

    Args:
        folder: is made if it is missing.
        base: the model that serves first; a new folder takes it in as version 0.

    Raises:
        CheckpointError: the base is no model.
        ValueError: the folder is new and there is no base.
    """

    @classmethod
    def of(cls, folder: Path, base: Path) -> Versions:
        """Those that began with this very model, in a folder for many models' versions."""
        return cls(folder / _digest(base)[:12], base)

    def __init__(self, folder: str | Path, base: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pointer = self.folder / "current.json"
        self._lock = FileLock(str(self.folder / ".lock"))  # a process may take it twice
        with self._lock:
            if self._pointer.exists():
                return
            if base is None:
                raise ValueError(f"{self.folder.name!r} holds no version: name a model to begin")
            content = Path(base).read_bytes()
            if not self.numbers:
                self.add(lambda path: path.write_bytes(content), {"origin": "base"})
            self._point([min(self.numbers)])

    # ---- what there is -----------------------------------------------------------------------

    def path(self, version: int) -> Path:
        """The file of a version."""
        return self.folder / f"{version:04d}.pt"

    def checked_path(self, version: int) -> Path:
        """The file of a version, if it is what was written.

        Raises:
            ValueError: there is no such version.
            CheckpointError: its file has changed.
        """
        if self.about(version)["sha256"] != _digest(self.path(version)):
            raise CheckpointError(
                f"version {version} has changed since it was written: train it anew"
            )
        return self.path(version)

    @property
    def numbers(self) -> list[int]:
        """All whole versions, oldest first."""
        names = (int(p.stem) for p in self.folder.glob("[0-9]*.json"))
        return sorted(number for number in names if self.path(number).is_file())

    def about(self, version: int) -> dict[str, Any]:
        """What is known of a version.

        Raises:
            ValueError: there is no such version.
        """
        if version not in self.numbers:
            raise ValueError(f"there is no version {version}: there are {self.numbers}")
        about: dict[str, Any] = json.loads(self.path(version).with_suffix(".json").read_text())
        return about

    @property
    def history(self) -> list[int]:
        """Which versions served, in turn."""
        served: list[int] = json.loads(self._pointer.read_text())["served"]
        return served

    @property
    def current(self) -> int:
        """The version that serves."""
        return self.history[-1]

    # ---- what changes ------------------------------------------------------------------------

    def add(self, write: Callable[[Path], object], about: Mapping[str, Any]) -> int:
        """Adds a version, which does not serve yet.

        Args:
            write: writes the model's file.
            about: figures and settings, as JSON; never a path or a patient's name.

        Returns:
            Its number.

        Raises:
            CheckpointError: what was written is no model, or has weights that are not finite.
        """
        with self._lock:
            taken = [int(p.stem) for p in self.folder.glob("[0-9]*.*")]  # also those cut off
            version = max(taken, default=-1) + 1
            path = self.path(version)

            def write_checked(temporary: Path) -> None:
                write(temporary)
                check_model(temporary)

            save_atomic(write_checked, path)
            content = json.dumps({**about, "sha256": _digest(path)}, indent=1)
            write_text(path.with_suffix(".json"), content)
            return version

    def promote(self, version: int) -> None:
        """Makes a version current, if its file is what was written.

        Raises:
            ValueError, CheckpointError: it is not; the one that serves goes on.
        """
        self.checked_path(version)
        with self._lock:
            if version != self.current:
                self._point([*self.history, version])

    def roll_back(self) -> int:
        """Goes back to the version that served before; its number.

        Raises:
            ValueError: there was none.
        """
        with self._lock:
            served = self.history
            if len(served) < 2:
                raise ValueError(f"version {served[0]} is the first: there is none to go back to")
            self._point(served[:-1])
            return served[-2]

    def _point(self, served: list[int]) -> None:
        write_text(self._pointer, json.dumps({"served": served}))


def check_model(path: Path) -> None:
    """Reads a model as inference would.

    Raises:
        CheckpointError, ValueError: it is none, or some weight is not finite.
    """
    for name, value in read_checkpoint(path)["network"].items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"the new version's {name} is not finite: the training diverged")
    load_model(path)


def better(candidate: Mapping[str, float], serving: Mapping[str, float]) -> bool:
    """Whether the candidate's mean Dice on held-out labels is above the serving version's.

    >>> better({"dice_mean": 0.9}, {"dice_mean": 0.8})
    True
    >>> better({"dice_mean": float("nan")}, {"dice_mean": 0.8})
    False
    """
    new, old = candidate["dice_mean"], serving["dice_mean"]
    return math.isfinite(new) and (new > old or not math.isfinite(old))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
