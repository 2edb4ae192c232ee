"""MONAI dictionary transforms from a datalist row to a training clip."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

from discovr_monai.base.types import CineError
from discovr_monai.data.read.loader import CineLoader
from discovr_monai.data.read.store import CineStore

PAD_MODES = ("loop", "reflect", "repeat", "zero", "refuse")


class LoadCined(CineLoader, MapTransform):
    """:class:`CineLoader` for dictionaries.

    Row[key] is a path; it becomes (C, T, H, W) uint8, C = 1 (luma) or 3, lazily
    memory-mapped when it comes from the store. Adds "fps" and "spacing" (the row's own win),
    "fps_source" and "window" (see :class:`Cine`).

    Args:
        keys: "image".
        root, store, size, sector, color: as there.

    Raises:
        CineError: as :func:`read_cine`, naming the file relative to ``root``.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        root: str | Path | None = None,
        store: CineStore | None = None,
        size: int | None = 112,
        sector: bool | str = "auto",
        color: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys)
        CineLoader.__init__(self, root, store, size, sector, color)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """See the class."""
        row = dict(data)
        for key in self.key_iterator(row):
            cine = self.load(str(row[key]), row.get("first"), row.get("num_frames"))
            frames, fps, source, row["window"], spacing = cine
            if spacing and not row.get("spacing"):
                row["spacing"] = list(spacing)
            listed = row.get("fps")
            row["name"] = str(row[key])
            row["fps"], row["fps_source"] = (listed, "datalist") if listed else (fps, source)
            row[key] = np.moveaxis(frames, -1, 0) if frames.ndim == 4 else frames[None]
        return row


def clip_indices(
    length: int, num_frames: int, stride: float, start: float, pad_mode: str = "loop"
) -> np.ndarray:
    """Which frames of a cine make a clip.

    Long cines: start, start + stride, ... A cine shorter than the clip's span is padded:
    "loop" and "reflect" keep the pace and wrap or bounce; a frame that would come twice gives
    way to the nearest unused one, so min(num_frames, length) frames are distinct. "repeat" and
    "zero" shorten the stride so that the whole cine is used, then repeat the last frame, or say
    -1 (black). A stride below 1 (slow cines sampled by time) repeats frames by intent.

    Args:
        length: frames in the cine, at least 1.
        num_frames: frames of the clip.
        stride: frames between samples, > 0, not necessarily whole.
        start: first position, in [0, length).
        pad_mode: one of the above.

    Returns:
        (num_frames,) int64 in [0, length), or -1 for black.
    """
    if start + (num_frames - 1) * stride <= length - 1:
        return np.rint(start + np.arange(num_frames) * stride).astype(np.int64)
    if pad_mode in ("repeat", "zero"):
        if stride > 1 and num_frames > 1:
            stride = max(1.0, min(stride, (length - 1) / (num_frames - 1)))
        positions = np.rint(np.arange(num_frames) * stride).astype(np.int64)
        last = length - 1 if pad_mode == "repeat" else -1
        return np.where(positions < length, positions, last)
    walk = np.rint(start + np.arange(num_frames) * stride).astype(np.int64)
    if pad_mode == "loop" or length == 1:
        walk %= length
    else:
        walk %= 2 * (length - 1)
        walk = np.minimum(walk, 2 * (length - 1) - walk)
    return _distinct(walk, length) if stride >= 1 else walk


def _distinct(walk: np.ndarray, length: int) -> np.ndarray:
    """Replaces repeated frames by the nearest unused ones, while there are any."""
    unused = np.ones(length, bool)
    out = walk.copy()
    for i, frame in enumerate(walk):
        if not unused[frame] and unused.any():
            free = np.flatnonzero(unused)
            out[i] = free[np.abs(free - frame).argmin()]
        unused[out[i]] = False
    return out


class SampleClipd(RandomizableTransform, MapTransform):
    """Cuts clips of fixed length out of cines, by stride or by time.

    (C, T, H, W) becomes (C, num_frames, H, W) uint8 tensors; with ``num_clips`` > 1,
    (num_clips, C, num_frames, H, W).

    Args:
        keys: "image".
        num_frames: frames of a clip.
        stride: frames between samples (3 in the paper). Exactly one of stride and duration.
        duration: seconds that a clip spans, whatever the cine's fps.
        random: a random start (training) instead of the centre or evenly spaced ones.
        num_clips: evenly spaced clips, for evaluation.
        pad_mode: for cines that are too short, see :func:`clip_indices`; "refuse" raises.
        default_fps: for sampling by time where the file does not tell; None refuses those.
        speed: s plays a random clip at 1 / s to s times the pace, log-uniform; 1 at its own.

    Raises:
        ValueError: for senseless options.
        CineError: a cine is too short (pad_mode "refuse"), or by time without fps.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        num_frames: int = 64,
        stride: int | None = None,
        duration: float | None = None,
        random: bool = False,
        num_clips: int = 1,
        pad_mode: str = "loop",
        default_fps: float | None = None,
        speed: float = 1.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        if not 1 <= speed <= 4:
            raise ValueError(f"speed {speed} must lie in 1..4")
        self.speed = speed
        if num_frames < 1 or num_clips < 1:
            raise ValueError(
                f"num_frames {num_frames} and num_clips {num_clips} must be at least 1"
            )
        if (stride is None) == (duration is None):
            raise ValueError("set exactly one of stride (frames) and duration (seconds)")
        if stride is not None and stride < 1:
            raise ValueError(f"stride {stride} must be at least 1 frame")
        if duration is not None and duration <= 0:
            raise ValueError(f"duration {duration} must be above 0 seconds")
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode {pad_mode!r} must be one of {', '.join(PAD_MODES)}")
        self.num_frames, self.stride, self.duration = num_frames, stride, duration
        self.random, self.num_clips = random, num_clips
        self.pad_mode, self.default_fps = pad_mode, default_fps

    def indices(self, length: int, fps: float | None, name: str = "cine") -> np.ndarray:
        """(num_clips, num_frames) frames for a cine of ``length``; -1 is black."""
        stride = self.stride_of(fps, name)
        if self.random and self.speed > 1:
            stride *= float(np.exp(self.R.uniform(-1, 1) * np.log(self.speed)))
        room = length - 1 - (self.num_frames - 1) * stride  # largest start that fits
        if room < 0 and self.pad_mode == "refuse":
            need = int(np.ceil((self.num_frames - 1) * stride)) + 1
            raise CineError(
                name,
                f"it has {length} frames, a clip needs {need}",
                "Lower num_frames or stride, or set pad_mode to loop",
            )
        if self.random:
            wraps = self.pad_mode in ("loop", "reflect")
            top = room if room >= 0 else (length - 1 if wraps else 0)
            starts = [float(self.R.randint(0, int(top) + 1)) for _ in range(self.num_clips)]
        elif self.num_clips == 1:
            starts = [float(max(room, 0) // 2)]
        else:
            starts = [float(s) for s in np.rint(np.linspace(0, max(room, 0), self.num_clips))]
        clips = [clip_indices(length, self.num_frames, stride, s, self.pad_mode) for s in starts]
        return np.stack(clips)

    def stride_of(self, fps: float | None, name: str) -> float:
        """Frames between samples, for a cine of this frame rate."""
        if self.stride is not None:
            return float(self.stride)
        fps = fps or self.default_fps
        assert self.duration is not None
        if not fps:
            raise CineError(
                name,
                "its frame rate is unknown, but clips are sampled by time",
                "Set default_fps, give fps in the datalist, or sample by stride",
            )
        return self.duration * fps / self.num_frames

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """See the class."""
        row = dict(data)
        for key in self.key_iterator(row):
            cine = row[key]  # (C, T, H, W), perhaps memory-mapped
            clips = []
            name = str(row.get("name", row.get("id", "cine")))
            for index in self.indices(cine.shape[1], row.get("fps"), name):
                clip = np.ascontiguousarray(cine[:, np.maximum(index, 0)])
                clip[:, index < 0] = 0
                clips.append(torch.from_numpy(clip))
            row[key] = clips[0] if self.num_clips == 1 else torch.stack(clips)
        return row


class RandScaleCropd(RandomizableTransform, MapTransform):
    """Crops one random square of a random scale out of all frames, resized back.

    The paper's only augmentation. (C, T, H, W) uint8 stays (C, T, H, W) uint8.

    Args:
        keys: "image".
        scales: shares of the side, each in (0, 1]; (1,) does nothing.
    """

    def __init__(
        self, keys: KeysCollection = "image", scales: Sequence[float] = (1, 0.875, 0.75, 0.66)
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        if not scales or not all(0 < s <= 1 for s in scales):
            raise ValueError(f"crop scales {list(scales)} must lie in (0, 1]")
        self.scales = list(scales)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """See the class."""
        row = dict(data)
        for key in self.key_iterator(row):
            clip = row[key]
            height, width = clip.shape[-2:]
            scale = self.scales[self.R.randint(len(self.scales))]
            h, w = max(1, round(height * scale)), max(1, round(width * scale))
            top, left = self.R.randint(height - h + 1), self.R.randint(width - w + 1)
            if (h, w) == (height, width):
                continue
            crop = clip[..., top : top + h, left : left + w].float()
            crop = F.interpolate(crop, (height, width), mode="bilinear", align_corners=False)
            row[key] = crop.round().clamp(0, 255).byte()
        return row
