"""Versions of a model in a folder: written beside, scored, made current by one rename.

    FOLDER/0003.pt        a version, as inference takes it; never changed once it is there
    FOLDER/0003.json      what is known of it; a version without it was cut off and does not count
    FOLDER/current.json   which versions served, in turn; the last one serves

A file is used only if it is the one that was written (its hash), and nothing is unpickled.
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
        folder: made if it is missing.
        base: the model that serves first, taken in as version 0 where the folder is new.

    Raises:
        CheckpointError: if the base is no model.
        ValueError: if the folder is new and there is no base.
    """

    @classmethod
    def of(cls, folder: Path, base: Path) -> Versions:
        """Those that began with this very model, in a folder for many models' versions."""
        return cls(folder / _digest(base)[:12], base)

    def __init__(self, folder: str | Path, base: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(self.folder / ".lock"))
        with self._lock:
            if self._pointer.exists():
                return
            if base is None:
                raise ValueError(f"{self.folder.name!r} holds no version: name a model to begin")
            source = Path(base)
            if not self.numbers:
                self._add(lambda path: path.write_bytes(source.read_bytes()), {"origin": "base"})
            self._point([min(self.numbers)])

    # ---- what there is -----------------------------------------------------------------------

    @property
    def _pointer(self) -> Path:
        return self.folder / "current.json"

    def path(self, version: int) -> Path:
        """The file of a version."""
        return self.folder / f"{version:04d}.pt"

    def checked_path(self, version: int) -> Path:
        """The same, if it is what was written.

        Raises:
            ValueError: there is no such version; CheckpointError: its file has changed.
        """
        wanted = self.about(version)["sha256"]
        if _digest(self.path(version)) != wanted:
            raise CheckpointError(
                f"version {version} has changed since it was written: train it anew"
            )
        return self.path(version)

    @property
    def numbers(self) -> list[int]:
        """All whole versions, oldest first."""
        found = (p.stem for p in self.folder.glob("[0-9]*.json"))
        return sorted(int(name) for name in found if self.path(int(name)).is_file())

    def about(self, version: int) -> dict[str, Any]:
        """What is known of a version.

        Raises:
            ValueError: if there is none of this number.
        """
        if version not in self.numbers:
            raise ValueError(f"there is no version {version}: there are {self.numbers}")
        found: dict[str, Any] = json.loads(self._about(version).read_text())
        return found

    @property
    def history(self) -> list[int]:
        """Which versions served, in turn."""
        found: list[int] = json.loads(self._pointer.read_text())["served"]
        return found

    @property
    def current(self) -> int:
        """The version that serves."""
        return self.history[-1]

    @property
    def current_path(self) -> Path:
        """Its file."""
        return self.path(self.current)

    # ---- what changes ------------------------------------------------------------------------

    def add(self, write: Callable[[Path], object], about: Mapping[str, Any]) -> int:
        """A new version, which does not serve yet.

        Args:
            write: writes the model's file.
            about: figures and settings, JSON; never a path or a patient's name.

        Returns:
            Its number.

        Raises:
            CheckpointError: if what was written is no model, or has weights that are no numbers.
        """
        with self._lock:
            return self._add(write, about)

    def promote(self, version: int) -> None:
        """Makes a version current, if it is what was written.

        Raises:
            ValueError, CheckpointError: it is not; the one that serves goes on.
        """
        self.checked_path(version)
        with self._lock:
            if version != self.current:
                self._point([*self.history, version])

    def roll_back(self) -> int:
        """Goes back to the version that served before.

        Returns:
            Its number.

        Raises:
            ValueError: if there was none.
        """
        with self._lock:
            served = self.history
            if len(served) < 2:
                raise ValueError(f"version {served[0]} is the first: there is none to go back to")
            self._point(served[:-1])
            return served[-2]

    # ---- parts -------------------------------------------------------------------------------

    def _about(self, version: int) -> Path:
        return self.folder / f"{version:04d}.json"

    def _add(self, write: Callable[[Path], object], about: Mapping[str, Any]) -> int:
        taken = [int(p.stem) for p in self.folder.glob("[0-9]*.*")]  # also those cut off
        version = max(taken, default=-1) + 1

        def checked(path: Path) -> None:
            write(path)
            check_model(path)

        save_atomic(checked, self.path(version))
        content = json.dumps({**about, "sha256": _digest(self.path(version))}, indent=1)
        write_text(self._about(version), content)
        return version

    def _point(self, served: list[int]) -> None:
        write_text(self._pointer, json.dumps({"served": served}))


def check_model(path: Path) -> None:
    """Reads a model as inference would.

    Raises:
        CheckpointError, ValueError: if it is none, or some weight is not finite.
    """
    for name, value in read_checkpoint(path)["network"].items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"the new version's {name} is not finite: the training diverged")
    load_model(path)


def better(candidate: Mapping[str, float], serving: Mapping[str, float]) -> bool:
    """Whether a version's mean Dice on held-out labels is above that of the serving one."""
    new, old = candidate["dice_mean"], serving["dice_mean"]
    return math.isfinite(new) and (new > old or not math.isfinite(old))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
