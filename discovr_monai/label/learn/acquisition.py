"""Which cine to annotate next: the one that covers the archive best, the least sure, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from torch import Tensor

from discovr_monai.evaluation.heads.segmenter import Segmenter

STRATEGIES = ("coverage", "uncertainty", "both", "random")


@torch.no_grad()
def mean_entropy(network: Segmenter, clips: Tensor) -> float:
    """How unsure a segmentation head is of a cine.

    This is the entropy of its classes, averaged over all frames and places of the head's own grid
    and divided by the logarithm of their number. Background counts as a class: a head that is sure
    that there is nothing is sure.

    Args:
        network: encoder and head.
        clips: (n, 3, T, H, W) normalised.

    Returns:
        0 (sure) to 1 (no idea).
    """
    logits = network.every_frame(clips).float()  # (n, T, C, h', w')
    entropy = -(logits.softmax(2) * logits.log_softmax(2)).sum(2).mean()
    return float(entropy) / math.log(logits.shape[2])


def farthest(features: np.ndarray, centres: Sequence[int]) -> np.ndarray:
    """Distance of each cine to the nearest centre.

    Without centres it is minus the distance to the mean of all, so that the most usual cine is
    the farthest.

    >>> farthest(np.array([[0.0], [3.0], [4.0]]), [0])
    array([0., 3., 4.])

    Args:
        features: (M, D).
        centres: which of the M cines.

    Returns:
        (M,).
    """
    if not len(centres):
        return -np.linalg.norm(features - features.mean(0), axis=1)
    return np.asarray(cdist(features, features[list(centres)]).min(1))


def choose(
    strategy: str,
    features: np.ndarray,
    labelled: Sequence[int],
    count: int = 1,
    *,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
) -> list[int]:
    """The next cines to annotate, best first.

    * "coverage": greedy k-centre (Gonzalez 1985): the cine that lies farthest from all labelled
      and chosen ones. The covering radius is at most twice the best one.
    * "uncertainty": the cine of which the head is least sure.
    * "both": the cine with the highest sum of its ranks by these two.
    * "random".

    >>> choose("coverage", np.array([[0.0], [1.0], [9.0]]), labelled=[0], count=2)
    [2, 1]

    Args:
        strategy: one of STRATEGIES.
        features: (M, D) of all cines, by the frozen encoder.
        labelled: those of the M cines that have labels.
        count: how many to choose; there may be fewer left.
        uncertainty: (M,), see :func:`mean_entropy`.
        seed: of "random".

    Raises:
        ValueError: for another strategy, or if uncertainty is needed and not given.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} must be one of {', '.join(STRATEGIES)}")
    if strategy in ("uncertainty", "both") and (
        uncertainty is None or len(uncertainty) != len(features)
    ):
        raise ValueError(f"strategy {strategy!r} needs the uncertainty of every cine")
    unsure = np.zeros(len(features)) if uncertainty is None else np.asarray(uncertainty, float)
    left = [i for i in range(len(features)) if i not in set(labelled)]
    if strategy == "random":
        return [int(i) for i in np.random.default_rng(seed).permutation(left)[:count]]
    chosen: list[int] = []
    for _ in range(min(count, len(left))):
        distance = farthest(features, [*labelled, *chosen])[left]
        if strategy == "coverage":
            worth = distance
        elif strategy == "uncertainty":
            worth = unsure[left]
        else:
            worth = rankdata(distance) + rankdata(unsure[left])
        chosen.append(left.pop(int(np.argmax(worth))))
    return chosen
