"""Which cine to annotate next: the one that covers the archive best, the least sure, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from discovr_monai.evaluation.heads.segmenter import Segmenter

STRATEGIES = ("coverage", "uncertainty", "both", "random")


@torch.no_grad()
def mean_entropy(network: Segmenter, clips: Tensor) -> float:
    """How unsure a segmentation head is of a cine.

    The entropy of its classes, averaged over all frames and places of the head's own grid and
    divided by the logarithm of their number. Background counts: a head that is sure that there is
    nothing is sure.

    Args:
        network: encoder and head.
        clips: (n, 3, T, H, W) normalised.

    Returns:
        0 (sure) to 1 (no idea).
    """
    logits = network.every_frame(clips).float()  # (n, T, C, h', w')
    share = logits.softmax(2)
    entropy = -(share * logits.log_softmax(2)).sum(2).mean()
    return float(entropy) / math.log(logits.shape[2])


def farthest(features: np.ndarray, centres: Sequence[int]) -> np.ndarray:
    """(M,) distance of each of (M, D) features to the nearest centre.

    Without centres, minus the distance to the mean of all: the most usual one comes first.
    """
    if not len(centres):
        return -np.linalg.norm(features - features.mean(0), axis=1)
    found = np.full(len(features), np.inf)
    for centre in centres:
        found = np.minimum(found, np.linalg.norm(features - features[centre], axis=1))
    return found


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

    * "coverage": greedy k-centre (farthest first; within twice the best covering radius), the
      labelled ones being the first centres;
    * "uncertainty": the least sure;
    * "both": the highest sum of the ranks of the two, coverage's anew after each choice;
    * "random".

    Args:
        strategy: one of STRATEGIES.
        features: (M, D) frozen, of all cines.
        labelled: those that have labels.
        count: how many; fewer are given where fewer are left.
        uncertainty: (M,), see :func:`mean_entropy`.
        seed: of "random", and nothing else.

    Raises:
        ValueError: another strategy, or uncertainty is needed and not given.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} must be one of {', '.join(STRATEGIES)}")
    unsure = np.zeros(len(features))
    if strategy in ("uncertainty", "both"):
        if uncertainty is None or len(uncertainty) != len(features):
            raise ValueError(f"strategy {strategy!r} needs the uncertainty of every cine")
        unsure = np.asarray(uncertainty, float)
    left = [i for i in range(len(features)) if i not in set(labelled)]
    if strategy == "random":
        return [int(i) for i in np.random.default_rng(seed).permutation(left)[:count]]
    chosen: list[int] = []
    covered = farthest(features, labelled)
    for _ in range(min(count, len(left))):
        if strategy == "coverage":
            worth = covered[left]
        elif strategy == "uncertainty":
            worth = unsure[left]
        else:
            worth = rankdata(covered[left]) + rankdata(unsure[left])
        best = left.pop(int(np.argmax(worth)))
        apart = np.linalg.norm(features - features[best], axis=1)
        covered = np.minimum(covered, apart) if chosen or len(labelled) else apart
        chosen.append(best)
    return chosen
