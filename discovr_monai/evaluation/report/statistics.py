"""Metrics under sample weights, and their bootstrap intervals over patients.

Every metric takes weights of shape (..., M) and returns values of shape (...). A bootstrap draw is
nothing but integer weights, so all draws of a metric are computed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Metrics = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_weights(patients: Sequence[str], draws: int, seed: int) -> np.ndarray:
    """How often each sample occurs when **patients** are drawn with replacement.

    Args:
        patients: (M,) whose sample each one is; the samples of a patient come and go together.
        draws: D, how many.
        seed: of the drawing; the same patients in the same order give the same draws.

    Returns:
        (D, M) float64 counts.

    >>> bootstrap_weights(["a", "a", "b"], draws=2, seed=1).tolist()
    [[1.0, 1.0, 1.0], [2.0, 2.0, 0.0]]
    """
    numbers: dict[str, int] = {}
    owner = np.array([numbers.setdefault(str(p), len(numbers)) for p in patients])
    count = len(numbers)
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=draws)[:, owner].astype(float)


def estimate(
    metrics: Metrics, patients: Sequence[str], draws: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Each metric with its 95 % percentile bootstrap interval over patients.

    Draws in which a metric is undefined, as the AUROC of one class only, are left out.

    Args:
        metrics: weights (..., M) -> {name: (...)}.
        patients: (M,) whose sample each one is.
        draws, seed: of the bootstrap.
    """
    weights = np.concatenate(
        (np.ones((1, len(patients))), bootstrap_weights(patients, draws, seed))
    )
    estimates = {}
    for name, values in metrics(weights).items():
        drawn = values[1:][np.isfinite(values[1:])]
        low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
        estimates[name] = Estimate(float(values[0]), float(low), float(high))
    return estimates


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where the bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(bottom), np.nan), where=bottom > 0)


def _mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN."""
    defined = np.isfinite(values)
    return _ratio(np.where(defined, values, 0).sum(-1), defined.sum(-1).astype(float))


def confusion(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, n: int) -> np.ndarray:
    """(..., n, n) weighted counts, rows truth, columns predicted."""
    pairs = np.zeros((len(truth), n * n))
    pairs[np.arange(len(truth)), truth * n + predicted] = 1
    return (weights @ pairs).reshape(*weights.shape[:-1], n, n)


def classification_metrics(
    truth: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """macro_f1, balanced_accuracy, auroc, precision, recall and accuracy, as in scikit-learn.

    F1 and precision are means over the classes that occur in truth or prediction (0 where nothing
    is right), recall over those in the truth. The AUROC of more than two classes is that of each
    class against the rest, averaged.

    Args:
        truth: (M,) int classes 0..C-1.
        scores: (M, C), larger is likelier; the largest is the prediction.
        weights: (..., M).
    """
    n = scores.shape[1]
    table = confusion(truth, scores.argmax(1), weights, n)
    right = np.diagonal(table, axis1=-2, axis2=-1)  # (..., C)
    actual, called = table.sum(-1), table.sum(-2)
    present = actual + called > 0

    def over_present(values: np.ndarray) -> np.ndarray:
        return _mean_defined(np.where(present, np.nan_to_num(values), np.nan))

    recall = _mean_defined(_ratio(right, actual))
    classes = range(n) if n > 2 else [1]
    aucs = [auroc(truth == c, scores[:, c], weights) for c in classes]
    return {
        "macro_f1": over_present(_ratio(2 * right, actual + called)),
        "balanced_accuracy": recall,
        "auroc": _mean_defined(np.stack(aucs, -1)),
        "precision": over_present(_ratio(right, called)),
        "recall": recall,
        "accuracy": _ratio(right.sum(-1), actual.sum(-1)),
    }


def _by_score(
    positive: np.ndarray, score: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the positives and of the negatives at each of G distinct scores, ascending."""
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    ordered = weights[..., order]
    hits = positive[order].astype(float)
    return (
        np.add.reduceat(ordered * hits, starts, axis=-1),  # (..., G)
        np.add.reduceat(ordered * (1 - hits), starts, axis=-1),
    )


def auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties counted half; NaN with one class only.

    >>> float(auroc(np.array([False, True, True]), np.array([0.1, 0.1, 0.9]), np.ones(3)))
    0.75
    """
    above, below = _by_score(np.asarray(positive, bool), score, weights)
    lower = np.cumsum(below, -1) - below / 2
    return _ratio((above * lower).sum(-1), above.sum(-1) * below.sum(-1))


def average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the curve of precision over recall, by scikit-learn's sum over steps."""
    hit, miss = _by_score(np.asarray(positive, bool), score, weights)
    hit, miss = hit[..., ::-1], miss[..., ::-1]
    hits = np.cumsum(hit, -1)
    precision = np.nan_to_num(_ratio(hits, hits + np.cumsum(miss, -1)))
    return _ratio((hit * precision).sum(-1), hit.sum(-1))


def f1(positive: np.ndarray, called: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of the positive class; 0 where nothing is right."""
    table = confusion(np.asarray(positive, int), np.asarray(called, int), weights, 2)
    bottom = 2 * table[..., 1, 1] + table[..., 0, 1] + table[..., 1, 0]
    return np.nan_to_num(_ratio(2 * table[..., 1, 1], bottom))


def best_threshold(positive: np.ndarray, score: np.ndarray) -> float:
    """The threshold on the score with the highest F1, in the middle between two scores."""
    values = np.unique(score)
    gaps = np.r_[values[0], (values[1:] + values[:-1]) / 2]
    ones = np.ones(len(score))
    return float(gaps[int(np.argmax([f1(positive, score >= g, ones) for g in gaps]))])


def mean_metric(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of (M,) values; NaN values are left out."""
    defined = np.isfinite(values)
    return _ratio(weights @ np.where(defined, values, 0.0), weights @ defined.astype(float))


def regression_metrics(
    truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """mae, rmse, r2 and pearson of (M,) values; the last two are NaN where nothing varies."""
    total = weights.sum(-1)
    error = predicted - truth
    square = _ratio(weights @ error**2, total)
    mean_t, mean_p = _ratio(weights @ truth, total), _ratio(weights @ predicted, total)
    spread_t = _ratio(weights @ truth**2, total) - mean_t**2
    spread_p = _ratio(weights @ predicted**2, total) - mean_p**2
    shared = _ratio(weights @ (truth * predicted), total) - mean_t * mean_p
    tiny = 1e-12
    return {
        "mae": _ratio(weights @ np.abs(error), total),
        "rmse": np.sqrt(square),
        "r2": 1 - _ratio(square, np.where(spread_t > tiny, spread_t, 0)),
        "pearson": _ratio(
            shared, np.sqrt(np.where(spread_t * spread_p > tiny, spread_t * spread_p, 0))
        ),
    }


def conformal_radius(errors: np.ndarray, coverage: float = 0.9) -> float:
    """Half-width of split-conformal prediction intervals (Lei et al. 2018).

    It is the ceil((n + 1) coverage)-th smallest absolute error, and infinite if n is too small.

    Args:
        errors: (n,) truth minus prediction of samples that had no part in the training.
        coverage: share of new samples that the interval shall hold.

    >>> conformal_radius(np.array([1.0, -4.0, 2.0, 3.0]), coverage=0.6)
    3.0
    """
    rank = int(np.ceil((len(errors) + 1) * coverage))
    return float(np.sort(np.abs(errors))[rank - 1]) if rank <= len(errors) else float("inf")
