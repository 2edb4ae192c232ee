"""From a file to a prepared cine, without MONAI: processes that only read start in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from discovr_monai.base.types import Cine, CineError, PreparedCine
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.sector import prepare_cine
from discovr_monai.data.read.store import CineStore, prepared


class CineLoader:
    """Reads cines, isolates the sector, resizes, through a store if one is given.

    Args:
        root: folder that relative paths start from.
        store: cache of prepared cines.
        size: side in pixels, or None.
        sector: "auto", True or False (see :func:`prepare_cine`).
        color: three channels instead of luma.

    Raises:
        CineError: as :func:`read_cine`, naming the file relative to ``root``.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        store: CineStore | None = None,
        size: int | None = 112,
        sector: bool | str = "auto",
        color: bool = False,
    ) -> None:
        if sector not in (True, False, "auto"):
            raise ValueError(f"sector_mask {sector!r} must be auto, true or false")
        self.root = Path(root) if root is not None else Path()
        self.store, self.size, self.sector, self.color = store, size, sector, color

    def load(self, name: str, first: int | None = None, frames: int | None = None) -> PreparedCine:
        """One cine, prepared.

        Args:
            name: its file below the root.
            first, frames: which frames of a shard of many cines it is; None for the whole file.
        """
        path = self.root / name
        if path.suffix == ".npy":
            return self._ready(path, name, first, frames)

        def make() -> Cine:
            cine = read_cine(path, name=name, color="rgb" if self.color else "auto")
            return prepare_cine(cine, self.size, self.sector, color=self.color, name=name)

        if self.store is None:
            return prepared(make())
        preparation = f"{self.size}|{self.sector}|{self.color}"
        return self.store.get(path, name, preparation, make)

    def _ready(self, path: Path, name: str, first: int | None, frames: int | None) -> PreparedCine:
        """From discovr-monai prepare or shards: the sector only; no store if the size is right."""
        cine = read_cine(path, name=name, color="rgb" if self.color else "auto")
        if first is not None:
            last = first + (frames or 0)
            if not 0 <= first < last <= len(cine.frames):
                raise CineError(
                    name,
                    f"frames {first} to {last - 1} are not in this shard of {len(cine.frames)}",
                    "Make the shards again",
                )
            cine = replace(cine, frames=cine.frames[first:last])

        def make() -> Cine:
            return prepare_cine(cine, self.size, False, color=self.color, name=name)

        if self.store is None or self.size in (None, cine.frames.shape[1]):
            return prepared(make())
        part = name if first is None else f"{name}#{first}"
        return self.store.get(path, part, f"{self.size}|ready|{self.color}", make)
