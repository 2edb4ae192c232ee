"""A simple sector mask: what moves, its largest part, its convex hull."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from discovr_monai.types import Cine

MOVES = 14  # grey levels between a pixel's darkest and brightest frame; JPEG noise stays below


def sector_mask(frames: np.ndarray) -> np.ndarray:
    """Where the ultrasound sector is.

    Pixels that ever move, without thin bridges to traces and clocks; the largest connected
    part, filled, and its convex hull. Text and menus stand still, so they fall outside unless
    the hull crosses them.

    Args:
        frames: (T, H, W) uint8.

    Returns:
        (H, W) bool; all True when nothing moves.
    """
    sample = frames[np.linspace(0, len(frames) - 1, min(len(frames), 64)).astype(int)]
    moving = np.ptp(sample, axis=0) > MOVES  # (H, W)
    # a place counts where most of its 5 x 5 neighbourhood moves: speckle does, letters do not
    dense = ndimage.uniform_filter(moving.astype(np.float32), 5) > 0.5
    dense = ndimage.binary_opening(dense, iterations=2)
    labels, count = ndimage.label(dense)
    if not count:
        return np.ones(frames.shape[1:], bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return _hull(labels == sizes.argmax())


def _hull(mask: np.ndarray) -> np.ndarray:
    points = np.argwhere(mask)
    try:
        planes = ConvexHull(points).equations  # (E, 3): normal . (row, column) + offset <= 0
    except QhullError:  # a line or a point
        return mask
    row, column = np.ogrid[: mask.shape[0], : mask.shape[1]]
    inside = np.ones(mask.shape, bool)
    for a, b, c in planes:
        inside &= a * row + b * column + c <= 0.5
    return inside


def isolate_sector(cine: Cine) -> tuple[np.ndarray, tuple[int, int]]:
    """Blanks everything outside the sector and crops to it.

    Args:
        cine: grey, (T, H, W).

    Returns:
        (T, h, w) uint8, the sector's bounding box, and its first row and column.
    """
    frames, top, left = cine.frames, 0, 0
    if cine.region is not None:
        frames = frames[:, *cine.region]
        top, left = (part.start or 0 for part in cine.region)
    grey = frames if frames.ndim == 3 else frames[..., 1]
    mask = sector_mask(grey)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = mask[box] if frames.ndim == 3 else mask[box][..., None]
    return frames[:, *box] * inside, (top + int(rows[0]), left + int(columns[0]))


def resize_square(frames: np.ndarray, size: int) -> np.ndarray:
    """Pads to a square with black, then resizes with antialiasing.

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
        chunk = F.interpolate(chunk, (size, size), mode="bilinear", antialias=True)
        done = chunk.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        out[first : first + 32] = done if frames.ndim == 4 else done[..., 0]
    return out
