"""Anomaly detection: how far a heart is from the normal ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np

from discovr_monai.evaluation.features.extract import Features, subset_by_patient
from discovr_monai.evaluation.report.nearest import show_nearest, unit
from discovr_monai.evaluation.report.pictures import show_map
from discovr_monai.evaluation.report.plots import draw_roc
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import auroc, average_precision, best_threshold, f1
from discovr_monai.evaluation.tasks.targets import section_labels


def anomaly_scores(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Mean cosine distance of each query to its k nearest cines of a bank.

    Args:
        bank: (M, D) features; queries: (Q, D) features.

    Returns:
        (Q,) distances in 0..2.

    Raises:
        ValueError: if the bank holds fewer than k.

    >>> anomaly_scores(np.eye(2), np.array([[2.0, 0.0], [-1.0, 0.0]]), k=1).tolist()
    [0.0, 1.0]
    """
    if not 1 <= k <= len(bank):
        raise ValueError(
            f"k {k} needs 1 to {len(bank)} normal cines, the bank's size: lower k or enlarge it"
        )
    distance = 1 - unit(queries) @ unit(bank).T  # (Q, M)
    return np.sort(distance, axis=1)[:, :k].mean(1)


def _metrics(
    truth: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray
) -> dict[str, np.ndarray]:
    return {
        "auroc": auroc(truth, scores, weights),
        "aupr": average_precision(truth, scores, weights),
        "f1": f1(truth, scores >= threshold, weights),
    }


@dataclass(eq=False, repr=False)
class Anomaly:
    """Nearest-neighbour anomaly detection on frozen features.

    The bank holds the normal cines (class 0) of the training section only. A cine of a test section
    is called abnormal from the score on that gives the best F1 on the validation section.

    Args:
        features, results: as in :class:`KNN`.
        classes: class 0 is normal, all others are abnormal.
        label_key: row key of the class.
        train, validation, test: sections.
        k: number of neighbours.
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        label_fractions: shares of the training and validation patients, 1 among them.
        seed: of the choice of these patients.
    """

    features: Features
    results: Results
    _: KW_ONLY
    classes: Sequence[str]
    label_key: str = "label"
    train: str = "training"
    validation: str = "validation"
    test: Sequence[str] = ("test",)
    k: int = 5
    pooling: str = "mean"
    label_fractions: Sequence[float] = (1.0,)
    seed: int = 0

    def run(self) -> dict[str, Any]:
        """Evaluates, writes the results and returns them."""
        names = (self.train, self.validation, *self.test)
        labels = section_labels(self.features.rows, names, self.label_key, self.classes)
        x = {name: self.features[name].pooled(self.pooling) for name in labels}
        for fraction in self.label_fractions:
            self._evaluate(x, labels, fraction)
        return self.results.finish()

    def _evaluate(
        self, x: dict[str, np.ndarray], labels: dict[str, np.ndarray], fraction: float
    ) -> None:
        rows = self.features.rows
        training, held = (
            subset_by_patient(rows[name], fraction, self.seed, labels[name])
            for name in (self.train, self.validation)
        )
        normal = training[labels[self.train][training] == 0]
        bank = x[self.train][normal]
        tuning = anomaly_scores(bank, x[self.validation][held], self.k)
        threshold = best_threshold(labels[self.validation][held] > 0, tuning)
        self.results.facts.setdefault("thresholds", []).append(float(f"{threshold:.6g}"))
        method = f"{self.k} nearest"
        for section in self.test:
            truth, scores = labels[section] > 0, anomaly_scores(bank, x[section], self.k)
            self.results.add(
                section,
                method,
                rows[section],
                partial(_metrics, truth, scores, threshold),
                label_fraction=fraction,
                headlines={"auroc": "anomaly AUROC"} if fraction == 1 else None,
            )
            self.results.predict(
                section, method, rows[section], fraction, truth=truth, score=scores
            )
            if fraction == 1:
                self._show(section, x[section], truth, scores, normal)

    def _show(
        self,
        section: str,
        x: np.ndarray,
        truth: np.ndarray,
        scores: np.ndarray,
        normal: np.ndarray,
    ) -> None:
        """Adds pictures, and the two most and two least anomalous cines beside normal ones."""
        draw, names = self.results.draw, ["abnormal"]
        caption = f"{section}: abnormal against normal by the anomaly score."
        draw(f"{section}_roc.png", caption, draw_roc, truth[:, None], scores[:, None], names)
        show_map(self.results, section, x, scores, None, "anomaly score")
        order = np.argsort(-scores, kind="stable").tolist()
        chosen = {
            i: f"score {scores[i]:.3f}, {'abnormal' if truth[i] else 'normal'}"
            for i in dict.fromkeys(order[:2] + order[-2:])
        }
        bank = (self.train, normal)
        show_nearest(
            self.results, self.features, (section, chosen), bank, self.pooling, lambda _: "normal"
        )
