"""The ultrasound of a cine, without the rest of the screen, at the network's size."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from discovr_monai.base.types import Cine, CineError
from discovr_monai.data.read.fan import LIT, MOVES, fit_fan, hull, moving_part
from discovr_monai.data.read.pixels import COLOUR_LEVELS, to_grey


def sector_mask(frames: np.ndarray) -> np.ndarray:
    """Where the ultrasound sector is: the fan that fits, else the hull of what moves.

    Text, menus and logos stand still and ECG traces are thin, so they fall outside.

    Args:
        frames: (T, H, W) uint8.

    Returns:
        (H, W) bool; all True when nothing moves.
    """
    part = moving_part(frames)
    if part is None:
        return np.ones(frames.shape[1:], bool)
    fan = fit_fan(*part)
    return hull(part[1]) if fan is None else fan.mask(part[0].shape)


def graphics(frames: np.ndarray) -> np.ndarray:
    """(H, W) bool: marks and letters, lit pixels that stand still on a black background.

    Args:
        frames: (T, H, W) uint8.
    """
    sample = frames[np.linspace(0, len(frames) - 1, min(len(frames), 64)).astype(int)]
    darkest, brightest = sample.min(0), sample.max(0)
    still = (brightest - darkest <= MOVES) & (darkest > LIT)
    if not still.any():
        return still
    crowd = ndimage.uniform_filter((brightest >= LIT).astype(np.float32), 15)
    alone = still & (crowd < 0.4)
    # what a letter's lossy compression left around it goes too
    return np.asarray(ndimage.binary_dilation(alone, iterations=2)) if alone.any() else alone


def is_sweep(frames: np.ndarray) -> bool:
    """Whether a display is written column by column, as M-mode and spectral Doppler are.

    Args:
        frames: (T, H, W) uint8.
    """
    sample = frames[: min(len(frames), 64)].astype(np.int16)
    changed = (np.abs(np.diff(sample, axis=0)) > MOVES).mean(1) > 0.02  # (T - 1, W)
    ever = changed.any(0).sum()
    if ever < 0.3 * frames.shape[2] or not changed.any():
        return False
    count = changed.sum(1)
    some = count > 0
    place = (changed * np.arange(changed.shape[1])).sum(1)[some] / count[some]
    steps = np.sign(np.diff(place))
    forward = len(steps) > 2 and np.mean(steps > 0) > 0.8  # but for where it starts over
    return bool(forward and np.median(count[some]) < 0.25 * ever)


def isolate_sector(cine: Cine, name: str = "cine") -> tuple[np.ndarray, tuple[int, int]]:
    """Blanks everything outside the sector and crops to it.

    Args:
        cine: grey (T, H, W), or (T, H, W, 3) where colour shows somewhere on the screen.
        name: for errors.

    Returns:
        (T, h, w[, 3]) uint8, the sector's bounding box, and its first row and column.

    Raises:
        CineError: the sector shows colour Doppler, or there is none but a sweeping display.
    """
    frames, top, left = cine.frames, 0, 0
    if cine.region is not None:
        frames = frames[:, *cine.region]
        top, left = (part.start or 0 for part in cine.region)
    grey = frames if frames.ndim == 3 else to_grey(frames)
    remedy = "Only single 2-D grey cines train: leave it out"
    if is_sweep(grey):
        raise CineError(name, "it shows M-mode or spectral Doppler", remedy, "not a cine")
    part = moving_part(grey)
    fan = fit_fan(*part) if part is not None else None
    if part is None:
        mask = np.ones(grey.shape[1:], bool)
    else:
        mask = hull(part[1]) if fan is None else fan.mask(grey.shape[1:])
    if frames.ndim == 4 and shows_doppler(frames, mask):
        raise CineError(name, "it shows colour Doppler", remedy, "not a cine")
    mask = mask & ~graphics(grey) if part is not None else mask
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise CineError(name, "it shows no ultrasound sector", remedy, "not a cine")
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = mask[box] if frames.ndim == 3 else mask[box][..., None]
    return frames[:, *box] * inside, (top + int(rows[0]), left + int(columns[0]))


def shows_doppler(rgb: np.ndarray, mask: np.ndarray) -> bool:
    """Whether colours inside the sector are flow: more than one hue on over 1 % of it.

    Tinted grey maps (sepia, blue) have one hue.

    Args:
        rgb: (T, H, W, 3) uint8; mask: (H, W) bool.
    """
    sample = rgb[np.linspace(0, len(rgb) - 1, min(8, len(rgb))).astype(int)][:, mask]
    pixels = sample.reshape(-1, 3).astype(np.int16)
    chroma = pixels.max(-1) - pixels.min(-1)
    coloured = pixels[chroma > 2 * COLOUR_LEVELS].astype(np.float32)
    if len(coloured) < 0.01 * len(pixels):
        return False
    red, green, blue = coloured.T
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    one_hue = float(np.hypot(np.cos(hue).mean(), np.sin(hue).mean()))  # 1: all the same
    return one_hue < 0.95 or len(coloured) < 0.5 * (pixels.max(-1) > COLOUR_LEVELS).sum()


@lru_cache(maxsize=32)
def _area_weights(old: int, new: int) -> torch.Tensor:
    """(new, old) shares of the old pixels in each new one."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    first = torch.arange(old, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], first)
    high = torch.minimum(edges[1:, None], first + 1)
    return ((high - low).clamp(min=0) * new / old).float()


def resize_square(frames: np.ndarray, size: int) -> np.ndarray:
    """Pads to a square with black, then resizes: by areas where it halves or more.

    Args:
        frames: (T, H, W) or (T, H, W, 3) uint8.
        size: side in pixels.

    Returns:
        (T, size, size[, 3]) uint8.
    """
    height, width = frames.shape[1:3]
    if height == width == size:
        return np.ascontiguousarray(frames)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padding = [(0, 0), (top, side - height - top), (left, side - width - left)]
    frames = np.pad(frames, padding + [(0, 0)] * (frames.ndim - 3))
    out = np.empty((len(frames), size, size, *frames.shape[3:]), np.uint8)
    for first in range(0, len(frames), 32):  # bounds the float copy
        chunk = torch.from_numpy(frames[first : first + 32]).float()
        chunk = chunk[:, None] if chunk.dim() == 3 else chunk.permute(0, 3, 1, 2)
        if side >= 2 * size:
            weights = _area_weights(side, size)
            chunk = weights @ chunk @ weights.T
        else:  # areas of a pixel and a bit would beat with the grid
            chunk = F.interpolate(chunk, (size, size), mode="bilinear", antialias=True)
        done = chunk.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        out[first : first + 32] = done if frames.ndim == 4 else done[..., 0]
    return out


def prepare_cine(
    cine: Cine, size: int | None, sector: bool | str, *, color: bool = True, name: str = "cine"
) -> Cine:
    """Sector isolation and resizing of a decoded cine.

    Args:
        cine: as read.
        size: side of the square frames in pixels; None keeps the file's own size.
        sector: True, False, or "auto": for what may show a scanner's screen
            (:attr:`Cine.raw_screen`).
        color: keep three channels; else luma.
        name: for errors.

    Raises:
        CineError: a screen that shows colour Doppler, M-mode or spectral Doppler.
    """
    frames, corner = cine.frames, (0, 0)
    if cine.raw_screen if sector == "auto" else sector:
        frames, corner = isolate_sector(cine, name)
    if not color and frames.ndim == 4:
        frames = to_grey(frames)
    window = (*cine.frames.shape[1:3], *corner, *frames.shape[1:3])
    if size is not None:
        frames = resize_square(frames, size)
    return replace(cine, frames=frames, region=None, window=window)
