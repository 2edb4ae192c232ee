"""From label maps to what a clinician reads: Simpson volumes and EF."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

DISCS = 20


def dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Dice of two bool masks, 2 |A and B| / (|A| + |B|); NaN if both are empty.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    total = truth.sum() + predicted.sum()
    return float(2 * (truth & predicted).sum() / total) if total else float("nan")


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a bool mask."""
    labels, count = ndimage.label(mask)
    if count < 2:
        return mask
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def simpson_volume(cavity: np.ndarray, spacing: Sequence[float]) -> float:
    """Single-plane Simpson volume of the LV cavity, pi / 4 sum_i d_i^2 L / 20.

    L is the length of the largest component along its principal axis, and d_i its mean width across
    the axis in each of 20 discs of equal height.

    Args:
        cavity: (H, W) bool.
        spacing: (row, column) in mm.

    Returns:
        mL (with spacing in mm); 0 for an empty mask.
    """
    mask = largest_component(cavity)
    if mask.sum() < 3:
        return 0.0
    points = np.argwhere(mask) * np.asarray(spacing, float)  # (n, 2) mm
    centred = points - points.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    along = centred @ directions[0]
    pixel = float(np.prod(spacing))  # mm^2 of one pixel
    length = along.max() - along.min() + np.sqrt(pixel)
    edges = np.linspace(along.min() - 1e-9, along.max() + 1e-9, DISCS + 1)
    areas = np.histogram(along, edges)[0] * pixel  # mm^2 of each disc's slice
    widths = areas / (length / DISCS)  # mm
    return float(np.pi / 4 * (widths**2).sum() * length / DISCS / 1000)


def ejection_fraction(volumes: np.ndarray, ed: int | None = None, es: int | None = None) -> float:
    """EF in percent from a curve of volumes, 100 (EDV - ESV) / EDV; NaN if EDV is 0.

    Args:
        volumes: (T,), in any unit.
        ed, es: frames of end diastole and end systole. Without them, EDV and ESV are the 95th and
            the 5th percentile of the curve, so that one bad frame does not decide.

    >>> ejection_fraction(np.array([120.0, 48.0, 110.0]), ed=0, es=1)
    60.0
    """
    high = float(volumes[ed]) if ed is not None else float(np.percentile(volumes, 95))
    low = float(volumes[es]) if es is not None else float(np.percentile(volumes, 5))
    return 100 * (1 - low / high) if high > 0 else float("nan")


def grid_ceiling(mask: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """The label map that a token grid allows: each label's area is averaged onto the grid and
    upsampled, and the largest wins.

    Args:
        mask: (H, W) int labels.
        grid: (h, w) tokens.
        classes: with background.

    Returns:
        (H, W) int labels.
    """
    import torch
    import torch.nn.functional as F

    hot = torch.from_numpy(np.eye(classes, dtype=np.float32)[mask]).permute(2, 0, 1)[None]
    coarse = F.adaptive_avg_pool2d(hot, grid)
    full = F.interpolate(coarse, mask.shape, mode="bilinear", align_corners=False)
    return full[0].argmax(0).numpy()
