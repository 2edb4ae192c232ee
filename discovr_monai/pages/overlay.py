"""A cine with its label maps as an animation that any viewer shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224  # pixels of a picture
COLOURS = np.array([[0, 0, 0], [255, 210, 0], [0, 220, 120], [90, 160, 255], [255, 90, 160]])


def save_overlay(
    path: Path,
    frames: np.ndarray,
    predicted: np.ndarray,
    truth: np.ndarray | None,
    fps: float,
    caption: str = "",
) -> str:
    """Writes a looping GIF of a cine with the predicted outlines.

    Args:
        path: of the file.
        frames: (T, s, s) uint8.
        predicted: (T, S, S) uint8 label maps; S may differ from s.
        truth: the true label maps, likewise. Their areas are drawn on a second picture beside
            the first one; None leaves it out.
        fps: frames per second of the animation.
        caption: is written below.

    Returns:
        A sentence that says what the animation shows, for those who do not see it.
    """
    pictures = []
    for i, frame in enumerate(frames):
        grey, labels = _resized(frame, "BILINEAR"), _resized(predicted[i], "NEAREST")
        panels = [_tint(grey, labels, _edges(labels), 1.0)]
        if truth is not None:
            labels = _resized(truth[i], "NEAREST")
            panels.append(_tint(grey, labels, labels > 0, 0.35))
        pixels = np.concatenate(panels, axis=1)
        picture = Image.fromarray(np.pad(pixels, ((0, 14 if caption else 0), (0, 0), (0, 0))))
        if caption:
            ImageDraw.Draw(picture).text((4, SIDE + 1), caption, fill=(230, 230, 230))
        # Few colours without dithering halve the file, and speckle still looks like speckle.
        pictures.append(picture.quantize(64, dither=Image.Dither.NONE))
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
    )
    beside = "" if truth is None else ", beside them the true areas"
    return f"Animation of {len(frames)} frames with the predicted outlines{beside}."


def _resized(pixels: np.ndarray, method: str) -> np.ndarray:
    """(s, s) uint8 -> (SIDE, SIDE)."""
    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling[method]))


def _edges(labels: np.ndarray) -> np.ndarray:
    """(S, S) bool: pixels whose right or lower neighbour has another label."""
    edges = np.zeros(labels.shape, bool)
    edges[:-1] |= labels[:-1] != labels[1:]
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return edges


def _tint(grey: np.ndarray, labels: np.ndarray, where: np.ndarray, opacity: float) -> np.ndarray:
    """(S, S, 3) uint8: a grey picture with its labels' colours at some of its pixels."""
    rgb = grey[..., None].repeat(3, -1).astype(np.float32)
    colours = COLOURS[np.minimum(labels, len(COLOURS) - 1)]
    rgb[where] = (1 - opacity) * rgb[where] + opacity * colours[where]
    return rgb.round().astype(np.uint8)
