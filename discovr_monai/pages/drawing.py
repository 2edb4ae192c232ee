"""Frames and label maps in forms that a page can hold: JPEG sheets, data URIs, SVG outlines."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

QUALITY = 85  # of JPEG
SHOWN = 256  # pixels per side of a square cine that is read for a page
LONGEST = 512  # pixels of a frame's longer side; larger frames are made smaller
SHEET = 4_000_000  # pixels of a sheet of frames at most; every browser can hold so many
BLOCK = 8  # JPEG codes blocks of 8 x 8: cells of whole blocks leave no traces in their neighbours
UNITS = 10  # units of an outline's coordinates to a pixel
SMOOTH = 4.0  # standard deviation of an outline's smoothing, in pixels along it
FLAT = 0.05  # pixels by which a simplified outline may deviate


def data_uri(content: bytes) -> str:
    """A PNG, GIF or JPEG as a data URI.

    Raises:
        ValueError: if the content is none of them.

    >>> data_uri(b"GIF89a")
    'data:image/gif;base64,R0lGODlh'
    """
    kinds = {b"\x89PNG": "png", b"GIF8": "gif", b"\xff\xd8\xff": "jpeg"}
    for start, kind in kinds.items():
        if content.startswith(start):
            return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    raise ValueError("is neither PNG, GIF nor JPEG")


def jpeg(picture: np.ndarray) -> str:
    """(H, W) uint8 as a data URI of a JPEG."""
    written = io.BytesIO()
    Image.fromarray(picture).save(written, "JPEG", quality=QUALITY, optimize=True)
    return data_uri(written.getvalue())


def shrink(frames: np.ndarray) -> np.ndarray:
    """(T, H, W) uint8 -> (T, h, w), whose longer side is at most ``LONGEST``."""
    height, width = frames.shape[1:]
    factor = LONGEST / max(height, width)
    if factor >= 1:
        return frames
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return np.stack([np.asarray(Image.fromarray(f).resize(size)) for f in frames])


@dataclass(frozen=True)
class Sheets:
    """A cine as a few pictures, each a grid of cells with a frame each in reading order.

    Attributes:
        pictures: data URIs.
        cell: (width, height) of a cell; the frame is at its top left.
        size: (width, height) of a frame.
        columns: cells in a row.
        per_sheet: frames of each picture but the last.
    """

    pictures: list[str]
    cell: tuple[int, int]
    size: tuple[int, int]
    columns: int
    per_sheet: int


def draw_sheets(frames: np.ndarray) -> Sheets:
    """Sheets of (T, H, W) uint8 frames."""
    frames = shrink(frames)
    count, height, width = frames.shape
    padding = ((0, 0), (0, -height % BLOCK), (0, -width % BLOCK))
    cells = np.pad(frames, padding, mode="edge")
    rows, columns = cells.shape[1:]
    per_sheet = max(SHEET // (rows * columns), 1)
    across = max(int(np.ceil(np.sqrt(min(per_sheet, count)))), 1)
    pictures = []
    for start in range(0, count, per_sheet):
        part = cells[start : start + per_sheet]
        missing = -len(part) % across
        part = np.concatenate([part, np.zeros((missing, rows, columns), np.uint8)])
        grid = part.reshape(-1, across, rows, columns).swapaxes(1, 2)
        pictures.append(jpeg(np.ascontiguousarray(grid.reshape(-1, across * columns))))
    return Sheets(pictures, (columns, rows), (width, height), across, per_sheet)


def resize_labels(labels: np.ndarray, side: int) -> np.ndarray:
    """(T, S, S) labels -> (T, side, side), each pixel with the label of its nearest one.

    >>> resize_labels(np.array([[[0, 1], [2, 3]]]), 4)[0, 0].tolist()
    [0, 0, 1, 1]
    """
    places = ((np.arange(side) + 0.5) * labels.shape[1] / side).astype(int)
    return labels[:, places][:, :, places]


def outlines(labels: np.ndarray, structures: Sequence[str]) -> list[str]:
    """The outline of each structure of one label map, as an SVG path.

    The stairs of the pixels are smoothed away. Coordinates are tenths of a pixel from the top left
    corner of the map.

    Args:
        labels: (H, W) uint8, 1 for the first structure.
        structures: names of labels 1, 2, ...

    Returns:
        For each structure ``d`` of a path; "" where it is absent.
    """
    return [_outline(labels == label) for label in range(1, len(structures) + 1)]


def _outline(mask: np.ndarray) -> str:
    from contourpy import contour_generator

    if not mask.any():
        return ""
    field = np.pad(mask, 1).astype(float)  # outlines close at the border
    lines = contour_generator(z=field).lines(0.5)
    return "".join(_path(_smooth(np.asarray(line)[:-1]) - 0.5) for line in lines)


def _smooth(points: np.ndarray) -> np.ndarray:
    """A closed (n, 2) line without its stairs, smoothed along it so that nothing thin is lost."""
    sigma = min(SMOOTH, len(points) / 16)

    def soft(line: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter1d(line, sigma, axis=0, mode="wrap")

    once = soft(points)
    return once + soft(points - once)  # the second pass gives back the area that the first took


def _path(points: np.ndarray) -> str:
    """A closed (n, 2) line of x, y as relative integer steps."""
    from matplotlib.path import Path as Outline

    line = Outline(np.concatenate([points, points[:1]]))
    line.simplify_threshold = FLAT
    kept = line.cleaned(simplify=True)
    corners = np.asarray(kept.vertices)[np.asarray(kept.codes) != Outline.STOP]
    steps = np.rint(corners * UNITS).astype(int)
    if np.array_equal(steps[0], steps[-1]):
        steps = steps[:-1]  # z closes it
    moves = np.diff(steps, axis=0)
    moves = moves[moves.any(1)]
    drawn = re.sub(" -", "-", " ".join(map(str, moves.ravel().tolist())))  # as short as SVG allows
    return f"M{steps[0, 0]} {steps[0, 1]}l{drawn}z"
