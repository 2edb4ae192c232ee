"""Whether label maps of a cine may be true: whole parts, a smooth beat, an EF that hearts have."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from discovr_monai.evaluation.heads.contours import dice, ejection_fraction, simpson_volume

JUMP = 0.15  # of the median area, that one frame may differ from its neighbours' median
PART = 0.02  # of a structure's pixels, that may lie apart from its largest component
EF_RANGE = (5.0, 90.0)  # percent
NEIGHBOURS = 5  # frames


@dataclass(frozen=True)
class Plausibility:
    """What was found.

    Attributes:
        score: share of the labelled frames in which nothing is wrong, 0 where the EF is.
        ef: percent, of the cavity's Simpson volumes over the cine; NaN with too few frames.
        roughness: root mean square of the area's second differences over its range, 0 is smooth.
        reasons: frame -> what is wrong with it.
        ef_out_of_range: whether the EF is one that hearts do not have.
    """

    score: float
    ef: float
    roughness: float
    reasons: dict[int, str] = field(default_factory=dict)
    ef_out_of_range: bool = False


def plausibility(labels: np.ndarray, cavity: int = 1) -> Plausibility:
    """Looks at the label maps of a cine; frames without any label are left out.

    Args:
        labels: (T, H, W); unlabelled frames are 0 throughout.
        cavity: the label whose area and volume are looked at.

    Raises:
        ValueError: if no frame is labelled.
    """
    frames = np.flatnonzero(labels.any((1, 2)))
    if not len(frames):
        raise ValueError("no frame is labelled: there is nothing to look at")
    reasons: dict[int, str] = {}
    for t in frames:
        if not (labels[t] == cavity).any():
            reasons[int(t)] = "no cavity"
        elif any(_scattered(labels[t] == value) for value in np.unique(labels[t]) if value):
            reasons[int(t)] = "a structure in several parts"
    areas = (labels[frames] == cavity).sum((1, 2)).astype(float)
    whole = len(frames) >= NEIGHBOURS and bool((np.diff(frames) == 1).all())
    roughness, ef = float("nan"), float("nan")
    if whole:
        usual = ndimage.median_filter(areas, NEIGHBOURS, mode="nearest")
        for t in frames[np.abs(areas - usual) > JUMP * np.median(areas)]:
            reasons.setdefault(int(t), "the area jumps")
        second = np.diff(areas, 2)
        roughness = float(np.sqrt((second**2).mean()) / max(float(np.ptp(areas)), 1.0))
        volumes = np.array([simpson_volume(labels[t] == cavity, (1.0, 1.0)) for t in frames])
        ef = ejection_fraction(volumes)
    wrong = whole and not EF_RANGE[0] <= ef <= EF_RANGE[1]
    score = 0.0 if wrong else 1 - len(reasons) / len(frames)
    return Plausibility(score, ef, roughness, reasons, wrong)


def agreement(a: np.ndarray, b: np.ndarray, structures: int) -> dict[int, float]:
    """Mean Dice of two cines' label maps over the frames that both label, by label.

    Args:
        a, b: (T, H, W); frames that one of them leaves empty are left out.
        structures: labels 1, 2, ... of them.

    Returns:
        label -> 0..1; labels that neither has are left out, all where no frame is shared.
    """
    if a.shape != b.shape:
        raise ValueError(f"label maps of shapes {a.shape} and {b.shape} are not of one cine")
    shared = a.any((1, 2)) & b.any((1, 2))
    out = {}
    for value in range(1, structures + 1):
        found = [dice(x == value, y == value) for x, y in zip(a[shared], b[shared], strict=True)]
        defined = [f for f in found if np.isfinite(f)]
        if defined:
            out[value] = float(np.mean(defined))
    return out


def _scattered(mask: np.ndarray) -> bool:
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    if count < 2:
        return False
    sizes = np.bincount(parts.ravel())[1:]
    return bool(sizes.sum() - sizes.max() > PART * sizes.sum())
