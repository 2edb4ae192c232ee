"""Reads the cine of a datalist row and cuts it into windows, in a process of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from discovr_monai.base.privacy import load_salt
from discovr_monai.base.types import DatalistRow
from discovr_monai.data.clips.transforms import LoadCined, SampleClipd
from discovr_monai.data.lists.owners import salted_owners
from discovr_monai.data.read.kinds import failure_of, file_below

THUMBNAIL = 64  # pixels per side


@dataclass
class Seen:
    """A cine as inference sees it.

    Attributes:
        row: its datalist row, with the salted "id".
        patient, study: salted ids. Where the study is unknown, all cines of a patient, or else of
            a folder, count as one study.
        cine: (C, T, S, S) uint8.
        clips: (n, C, t, S, S) uint8, evenly spaced windows of the cine.
        fps: frames per second, or None if unknown.
        spacing: mm between rows and between columns of the file's own frames, None if unknown.
        window: where the square lies in the file's frames; see
            :class:`discovr_monai.base.types.Cine`.
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
        """(64, 64) uint8: the middle frame, made small."""
        from PIL import Image

        middle = self.cine[self.cine.shape[0] // 2, self.cine.shape[1] // 2]
        return np.asarray(Image.fromarray(np.asarray(middle)).resize((THUMBNAIL,) * 2))


@dataclass
class CineReader:
    """Reads the cine of one row. An unusable cine gives a reason, never an exception.

    Attributes:
        loader: reads and prepares cines.
        num_frames: frames of a window.
        clip: how the checkpoint's clips were sampled: stride or duration, pad_mode, default_fps.
        least: the smallest number of windows, which a short cine gets.
        overlap: the share of a window that the next one repeats in a long cine, in [0, 1).
        salt: makes the ids.

    Raises:
        ValueError: ``overlap`` lies outside [0, 1).
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
        """The number of evenly spaced windows that cover a cine.

        Args:
            length: frames of the cine.
            stride: frames of the cine from one frame of a window to the next.
        """
        span = (self.num_frames - 1) * stride + 1
        step = max(1.0, span * (1 - self.overlap))
        return max(self.least, 1 + math.ceil(max(0.0, length - span) / step))

    def __call__(self, row: DatalistRow) -> dict[str, Any]:
        """{"seen": Seen}, or {"bad": (kind, problem, remedy)}."""
        try:
            file_below(self.loader.root, row["image"])
            return {"seen": self._read(row)}
        except Exception as error:
            return {"bad": failure_of(error)}

    def _read(self, row: DatalistRow) -> Seen:
        item = self.loader({**row})  # type: ignore[dict-item]
        cine = np.ascontiguousarray(item["image"])
        sample = SampleClipd(
            num_frames=self.num_frames,
            stride=self.clip["stride"],
            duration=self.clip["duration"],
            pad_mode=self.clip["pad_mode"],
            default_fps=self.clip["default_fps"],
        )
        stride = sample.stride_of(item["fps"], row["image"])
        sample.num_clips = self.windows(cine.shape[1], stride)
        indices = sample.indices(cine.shape[1], item["fps"], row["image"])
        clips = np.stack([cine[:, np.maximum(i, 0)] for i in indices])
        clips[np.broadcast_to((indices < 0)[:, None], clips.shape[:3])] = 0
        spacing = item.get("spacing")
        patient, study = salted_owners(row, self.loader.root, row["id"], self.salt)
        return Seen(
            row=row,
            patient=patient,
            study=study,
            cine=cine,
            clips=clips,
            fps=item["fps"],
            spacing=(float(spacing[0]), float(spacing[1])) if spacing else None,
            window=item["window"],
        )

    def at(self, size: int) -> CineReader:
        """A reader of the same cines at another size, in pixels per side."""
        other = LoadCined(root=self.loader.root, size=size, sector=self.loader.sector)
        return replace(self, loader=other)
