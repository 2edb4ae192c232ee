"""From a datalist row to a cine's windows, in a process of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.data.datalist import owners_of
from discovr_monai.data.privacy import load_salt, salted_id
from discovr_monai.data.transforms import LoadCined, SampleClipd
from discovr_monai.types import CineError, DatalistRow

THUMBNAIL = 64  # pixels per side


@dataclass
class Seen:
    """A cine as inference sees it.

    Attributes:
        row: of the datalist, with "id".
        patient, study: salted; where no study is known, all of a patient is one, or of a folder.
        cine: (C, T, S, S) uint8.
        clips: (n, C, t, S, S) uint8, evenly spaced windows.
        fps: frames per second, or None.
        spacing: (row, column) mm of the file's own frames, or None.
        window: see :class:`discovr_monai.types.Cine`.
    """

    row: DatalistRow
    patient: str
    study: str
    cine: np.ndarray
    clips: np.ndarray
    fps: float | None
    spacing: tuple[float, float] | None
    window: tuple[int, int, int, int, int, int]

    @property
    def thumbnail(self) -> np.ndarray:
        """(64, 64) uint8, the middle frame."""
        from PIL import Image

        middle = self.cine[self.cine.shape[0] // 2, self.cine.shape[1] // 2]
        return np.asarray(Image.fromarray(np.asarray(middle)).resize((THUMBNAIL,) * 2))


@dataclass
class CineReader:
    """Reads one row; what cannot be used becomes a reason, never an exception.

    Attributes:
        loader: reads and prepares cines.
        num_frames: of a window.
        clip: how the checkpoint's clips were sampled: stride or duration, pad_mode, default_fps.
        least: windows of a short cine.
        overlap: share of a window that the next one repeats in a long cine, in [0, 1).
        salt: of the ids.
    """

    loader: LoadCined
    num_frames: int
    clip: dict[str, Any]
    least: int
    overlap: float
    salt: bytes = field(default_factory=load_salt, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap {self.overlap} must lie in [0, 1)")

    def windows(self, length: int, stride: float) -> int:
        """How many evenly spaced windows cover a cine of ``length`` frames."""
        span = (self.num_frames - 1) * stride + 1
        step = max(1.0, span * (1 - self.overlap))
        return max(self.least, 1 + math.ceil(max(0.0, length - span) / step))

    def __call__(self, row: DatalistRow) -> dict[str, Any]:
        """{"seen": Seen}, or {"bad": (kind, problem, remedy)}."""
        name = row["image"]
        try:
            path = self.loader.root / name
            if not path.resolve().is_relative_to(self.loader.root.resolve()):
                problem = "it is a link that leads outside the folder"
                raise CineError(name, problem, "Copy the file", "refused")
            return {"seen": self._read(row, path)}
        except CineError as error:
            return {"bad": (error.kind, error.problem, error.remedy)}
        except MemoryError:
            return {"bad": ("unreadable", "it does not fit into memory", "Shorten or shrink it")}
        except Exception as error:  # a reader's own bug must not end an archive's run
            kind = type(error).__name__
            return {"bad": ("unreadable", f"reading it failed ({kind})", "Report it, leave it out")}

    def _read(self, row: DatalistRow, path: Path) -> Seen:
        found = self.loader({**row})  # type: ignore[dict-item]
        cine = np.ascontiguousarray(found["image"])
        sample = SampleClipd(
            num_frames=self.num_frames,
            stride=self.clip["stride"],
            duration=self.clip["duration"],
            pad_mode=self.clip["pad_mode"],
            default_fps=self.clip["default_fps"],
        )
        stride = sample.stride_of(found["fps"], row["image"])
        sample.num_clips = self.windows(cine.shape[1], stride)
        indices = sample.indices(cine.shape[1], found["fps"], row["image"])
        clips = np.stack([cine[:, np.maximum(i, 0)] for i in indices])
        clips[np.broadcast_to((indices < 0)[:, None], clips.shape[:3])] = 0
        patient, study = owners_of(path)
        owner, spacing = row.get("patient") or patient, found.get("spacing")
        folder = path.parent.relative_to(self.loader.root)
        there = f"folder {folder}" if folder.parts else f"file {row['id']}"
        return Seen(
            row=row,
            patient=salted_id(str(owner or f"file {row['id']}"), self.salt),
            study=salted_id(str(row.get("study") or study or owner or there), self.salt),
            cine=cine,
            clips=clips,
            fps=found["fps"],
            spacing=(float(spacing[0]), float(spacing[1])) if spacing else None,
            window=found["window"],
        )

    def at(self, size: int) -> CineReader:
        """The same for pictures of another size."""
        other = LoadCined(root=self.loader.root, size=size, sector=self.loader.sector)
        return replace(self, loader=other)
