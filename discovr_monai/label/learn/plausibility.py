"""Whether label maps of a cine may be true: whole parts, a smooth beat, an EF that hearts have."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from discovr_monai.evaluation.heads.contours import dice, ejection_fraction, simpson_volume

JUMP = 0.15  # by which share of the median area a frame may differ from its neighbours' median
PART = 0.02  # share of a structure's pixels that may lie apart from its largest component
EF_RANGE = (5.0, 90.0)  # percent
NEIGHBOURS = 5  # frames


@dataclass(frozen=True)
class Plausibility:
    """What speaks for and against the labels of a cine.

    Attributes:
        score: share of the labelled frames in which nothing is wrong; 0 if the EF is wrong.
        ef: percent, of the cavity's Simpson volumes over the cine; NaN with too few frames.
        roughness: root mean square of the area's second differences over its range; 0 is smooth.
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

    EF, roughness and jumps are judged if the labelled frames are at least five in a row.

    Args:
        labels: (T, H, W); unlabelled frames are 0 throughout.
        cavity: the label whose area and volume are looked at.

    Raises:
        ValueError: no frame is labelled.
    """
    frames = np.flatnonzero(labels.any((1, 2)))
    if not len(frames):
        raise ValueError("no frame is labelled: there is nothing to look at")
    reasons: dict[int, str] = {}
    for t in frames:
        if not (labels[t] == cavity).any():
            reasons[int(t)] = "no cavity"
        elif any(_is_scattered(labels[t] == value) for value in np.unique(labels[t]) if value):
            reasons[int(t)] = "a structure in several parts"
    roughness, ef, wrong = float("nan"), float("nan"), False
    if len(frames) >= NEIGHBOURS and (np.diff(frames) == 1).all():
        cavities = labels[frames] == cavity
        areas = cavities.sum((1, 2)).astype(float)
        usual = ndimage.median_filter(areas, NEIGHBOURS, mode="nearest")
        for t in frames[np.abs(areas - usual) > JUMP * np.median(areas)]:
            reasons.setdefault(int(t), "the area jumps")
        bends = np.diff(areas, 2)
        roughness = float(np.sqrt((bends**2).mean()) / max(float(np.ptp(areas)), 1.0))
        ef = ejection_fraction(np.array([simpson_volume(mask, (1.0, 1.0)) for mask in cavities]))
        wrong = not EF_RANGE[0] <= ef <= EF_RANGE[1]
    score = 0.0 if wrong else 1 - len(reasons) / len(frames)
    return Plausibility(score, ef, roughness, reasons, wrong)


def agreement(a: np.ndarray, b: np.ndarray, structures: int) -> dict[int, float]:
    """Mean Dice of two label maps of a cine over the frames that both label, by label.

    >>> agreement(np.array([[[1, 2]]]), np.array([[[1, 1]]]), 2)
    {1: 0.6666666666666666, 2: 0.0}

    Args:
        a, b: (T, H, W); frames that one of them leaves empty are left out.
        structures: the number of labels 1, 2, ...

    Returns:
        label -> 0..1; labels that neither has are left out, all where no frame is shared.

    Raises:
        ValueError: they have different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"label maps of shapes {a.shape} and {b.shape} are not of one cine")
    shared = a.any((1, 2)) & b.any((1, 2))
    means = {}
    for value in range(1, structures + 1):
        dices = [dice(x == value, y == value) for x, y in zip(a[shared], b[shared], strict=True)]
        if defined := [d for d in dices if np.isfinite(d)]:
            means[value] = float(np.mean(defined))
    return means


def _is_scattered(mask: np.ndarray) -> bool:
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())[1:]
    return count > 1 and bool(sizes.sum() - sizes.max() > PART * sizes.sum())
