"""Metrics under sample weights, and their bootstrap intervals over patients.

Every metric takes weights of shape (..., M) and gives (...): a bootstrap draw is nothing but
integer weights, so all draws of a metric are computed at once.
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
        patients: (M,) whose sample it is; samples of a patient come and go together.
        draws: D.
        seed: of the drawing; the same patients in the same order give the same draws.

    Returns:
        (D, M) float64 counts.
    """
    names: dict[str, int] = {}
    owner = np.array([names.setdefault(str(p), len(names)) for p in patients])
    count = len(names)
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=draws)[:, owner].astype(float)


def estimate(
    metrics: Metrics, patients: Sequence[str], draws: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Each metric with its 95 % percentile bootstrap interval over patients.

    Draws for which a metric is undefined (only one class drawn, say) are left out.

    Args:
        metrics: weights (..., M) -> {name: (...)}.
        patients: (M,).
    """
    weights = np.concatenate(
        (np.ones((1, len(patients))), bootstrap_weights(patients, draws, seed))
    )
    found = {}
    for name, values in metrics(weights).items():
        drawn = values[1:][np.isfinite(values[1:])]
        low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
        found[name] = Estimate(float(values[0]), float(low), float(high))
    return found


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
    truth: np.ndarray, scores: np.ndarray, weights: np.ndarray, predicted: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """macro_f1, balanced_accuracy, auroc, precision, recall, accuracy.

    As scikit-learn defines them: F1 and precision are means over the classes that occur in truth
    or prediction (0 where nothing is right), recall over those in the truth; more than two
    classes: AUROC of each against the rest, averaged.

    Args:
        truth: (M,) int classes 0..C-1.
        scores: (M, C), larger is likelier.
        weights: (..., M).
        predicted: (M,) classes; the largest score's if None.
    """
    n = scores.shape[1]
    predicted = scores.argmax(1) if predicted is None else predicted
    table = confusion(truth, predicted, weights, n)
    right = np.diagonal(table, axis1=-2, axis2=-1)  # (..., C)
    actual, said = table.sum(-1), table.sum(-2)
    present = actual + said > 0

    def over_present(values: np.ndarray) -> np.ndarray:
        return _mean_defined(np.where(present, np.nan_to_num(values), np.nan))

    recall = _mean_defined(_ratio(right, actual))
    classes = range(n) if n > 2 else [1]
    aucs = [auroc(truth == c, scores[:, c], weights) for c in classes]
    return {
        "macro_f1": over_present(_ratio(2 * right, actual + said)),
        "balanced_accuracy": recall,
        "auroc": _mean_defined(np.stack(aucs, -1)),
        "precision": over_present(_ratio(right, said)),
        "recall": recall,
        "accuracy": _ratio(right.sum(-1), actual.sum(-1)),
    }


def _by_score(
    positive: np.ndarray, score: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positives and negatives at each distinct score, ascending: (..., G) each."""
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    ordered = weights[..., order]
    there = positive[order].astype(float)
    return (
        np.add.reduceat(ordered * there, starts, axis=-1),
        np.add.reduceat(ordered * (1 - there), starts, axis=-1),
    )


def auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, ties counted half; NaN with one class only."""
    above, below = _by_score(np.asarray(positive, bool), score, weights)
    lower = np.cumsum(below, -1) - below / 2
    return _ratio((above * lower).sum(-1), above.sum(-1) * below.sum(-1))


def average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under precision against recall, as scikit-learn's step-wise sum."""
    hit, miss = _by_score(np.asarray(positive, bool), score, weights)
    hit, miss = hit[..., ::-1], miss[..., ::-1]
    found = np.cumsum(hit, -1)
    precision = np.nan_to_num(_ratio(found, found + np.cumsum(miss, -1)))
    return _ratio((hit * precision).sum(-1), hit.sum(-1))


def f1(positive: np.ndarray, said: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of the positive class; 0 where nothing is right."""
    table = confusion(np.asarray(positive, int), np.asarray(said, int), weights, 2)
    bottom = 2 * table[..., 1, 1] + table[..., 0, 1] + table[..., 1, 0]
    return np.nan_to_num(_ratio(2 * table[..., 1, 1], bottom))


def best_threshold(positive: np.ndarray, score: np.ndarray) -> float:
    """The score from which on "positive" is said, with the highest F1; the middle of a gap."""
    values = np.unique(score)
    gaps = np.r_[values[0], (values[1:] + values[:-1]) / 2]
    ones = np.ones(len(score))
    return float(gaps[int(np.argmax([f1(positive, score >= g, ones) for g in gaps]))])


def mean_metric(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of (M,) values; NaN values are left out."""
    there = np.isfinite(values).astype(float)
    return _ratio(weights @ np.where(there > 0, values, 0.0), weights @ there)


def regression_metrics(
    truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """mae, rmse, r2, pearson of (M,) values."""
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
    """Half-width of split-conformal intervals from |truth - prediction| on held-out samples.

    The ceil((n + 1) coverage)-th smallest error (Lei et al. 2018); infinite when n is too small.
    """
    rank = int(np.ceil((len(errors) + 1) * coverage))
    return float(np.sort(np.abs(errors))[rank - 1]) if rank <= len(errors) else float("inf")
