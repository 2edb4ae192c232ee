"""What all readers share: a limit on decoded size, grey or RGB, plausible frame rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.types import CineError

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


# Grey cines stored in colour differ between channels by JPEG's rounding; markers and menus are
# small. Colour is what more than 1 % of the pixels show by more than 24 grey levels.
COLOUR_LEVELS, COLOUR_SHARE = 24, 0.01


# What a file may grow to when decoded: far more than any codec makes of a cine, far less than a
# decompression bomb.
LARGEST, SMALLEST, GROWTH = 2 << 30, 256 << 20, 300
SIDE = 8192  # pixels


def check_size(path: Path, name: str, shape: Sequence[int]) -> None:
    """Refuses what would fill the memory, before it is decoded.

    Args:
        path: the file; a small file may not grow as large as a large one.
        name: for the error.
        shape: of the decoded frames in bytes, as far as it is known.

    Raises:
        CineError: over the limit.
    """
    limit = min(LARGEST, max(SMALLEST, GROWTH * path.stat().st_size))
    size = 1
    for n in shape:
        size *= max(int(n), 1)
    sides = [n for n in shape[1:3] if n > SIDE]
    if size > limit or sides:
        raise CineError(
            name,
            f"it would grow to {size / 1e9:.1f} GB of {' x '.join(str(n) for n in shape)}",
            "It is damaged, or too long: cut it into shorter cines",
        )


def to_grey(rgb: np.ndarray) -> np.ndarray:
    """Luma of RGB uint8: (T, H, W, 3) -> (T, H, W), by ITU-R BT.601, rounded.

    >>> to_grey(np.array([[[[255, 0, 0], [7, 7, 7]]]], np.uint8)).tolist()
    [[[76, 7]]]
    """
    if (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return np.ascontiguousarray(rgb[..., 0])
    return np.stack([(frame @ LUMA + 0.5).astype(np.uint8) for frame in rgb])


def is_coloured(rgb: np.ndarray) -> bool:
    """Whether (T, H, W, 3) uint8 shows colour, judged on up to 8 evenly spaced frames."""
    sample = rgb[np.linspace(0, len(rgb) - 1, min(8, len(rgb))).astype(int)].astype(np.int16)
    chroma = sample.max(-1) - sample.min(-1)
    return bool((chroma > COLOUR_LEVELS).mean() > COLOUR_SHARE)


def choose_colour(rgb: np.ndarray, color: str) -> np.ndarray:
    """RGB or its luma, as ``color`` asks."""
    if color == "rgb" or (color == "auto" and is_coloured(rgb)):
        return rgb
    return to_grey(rgb)


def plausible_fps(value: Any) -> float | None:
    """A frame rate in 1/s as a float; None for what cannot be one, such as 0, 1000 or text.

    >>> plausible_fps("29.97"), plausible_fps(0), plausible_fps(None)
    (29.97, None, None)
    """
    try:
        fps = float(value)
    except (TypeError, ValueError):
        return None
    return fps if 1 <= fps < 1000 else None


def grey_or_rgb(frames: np.ndarray, color: str) -> np.ndarray:
    if color == "rgb" and frames.ndim == 3:
        return frames[..., None].repeat(3, -1)
    return np.ascontiguousarray(frames)


def to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Frames as uint8: other types are rounded where they lie in 0..255, else stretched to it."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf" or not array.size:
        raise CineError(name, f"its values are of type {array.dtype}", "Save it as numbers")
    values = np.nan_to_num(array.astype(np.float32))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255 or (array.dtype.kind == "f" and high <= 1):
        values = (values - low) * (255 / max(high - low, 1e-12))
    return np.rint(values).astype(np.uint8)
