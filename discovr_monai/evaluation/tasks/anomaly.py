"""Anomaly detection: how far a heart is from the normal ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from discovr_monai.evaluation.features.extract import Features, subset_by_patient
from discovr_monai.evaluation.report.nearest import show_nearest, unit
from discovr_monai.evaluation.report.pictures import show_map
from discovr_monai.evaluation.report.plots import draw_roc
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import auroc, average_precision, best_threshold, f1
from discovr_monai.evaluation.tasks.targets import class_labels


def anomaly_scores(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """(Q,) mean cosine distance, 0..2, of each query (Q, D) to its k nearest of the bank (M, D).

    Raises:
        ValueError: if the bank holds fewer than k.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(
            f"k {k} needs 1 to {len(bank)} normal cines, the bank's size: lower k or enlarge it"
        )
    distance = 1 - unit(queries) @ unit(bank).T  # (Q, M)
    return np.sort(distance, axis=1)[:, :k].mean(1)


class Anomaly:
    """Nearest-neighbour anomaly detection on frozen features.

    The bank holds the normal cines (class 0) of the training section only; the threshold with the
    best F1 on the validation section is used on the test sections.

    Args:
        features, results: as in :class:`KNN`.
        classes: class 0 is normal, all others are abnormal.
        label_key: row key of the class.
        train, validation, test: sections.
        k: neighbours.
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        label_fractions: shares of the training and validation patients, 1 among them.
        seed: of the shares.
    """

    def __init__(
        self,
        features: Features,
        results: Results,
        *,
        classes: Sequence[str],
        label_key: str = "label",
        train: str = "training",
        validation: str = "validation",
        test: Sequence[str] = ("test",),
        k: int = 5,
        pooling: str = "mean",
        label_fractions: Sequence[float] = (1.0,),
        seed: int = 0,
    ) -> None:
        self.features, self.results, self.classes = features, results, list(classes)
        self.label_key, self.train, self.validation = label_key, train, validation
        self.test, self.k, self.pooling = list(test), k, pooling
        self.label_fractions, self.seed = list(label_fractions), seed

    def run(self) -> dict:
        """Evaluates, writes, returns the results."""
        rows = self.features.rows
        labels = {
            name: class_labels(rows[name], self.label_key, self.classes, name)
            for name in (self.train, self.validation, *self.test)
        }
        x = {name: self.features[name].pooled(self.pooling) for name in labels}
        for fraction in self.label_fractions:
            self._evaluate(x, labels, fraction)
        return self.results.finish()

    def _evaluate(
        self, x: dict[str, np.ndarray], labels: dict[str, np.ndarray], fraction: float
    ) -> None:
        rows, kept = self.features.rows, {}
        for name in (self.train, self.validation):
            kept[name] = subset_by_patient(rows[name], fraction, self.seed, labels[name])
        training, held = kept[self.train], kept[self.validation]
        bank = x[self.train][training][labels[self.train][training] == 0]
        tuning = anomaly_scores(bank, x[self.validation][held], self.k)
        threshold = best_threshold(labels[self.validation][held] > 0, tuning)
        self.results.facts.setdefault("thresholds", []).append(float(f"{threshold:.6g}"))
        for section in self.test:
            truth, scores = labels[section] > 0, anomaly_scores(bank, x[section], self.k)
            method = f"{self.k} nearest"

            def metrics(w: np.ndarray, t: np.ndarray = truth, s: np.ndarray = scores) -> dict:
                said = s >= threshold
                return {
                    "auroc": auroc(t, s, w),
                    "aupr": average_precision(t, s, w),
                    "f1": f1(t, said, w),
                }

            headlines = {"auroc": "anomaly AUROC"} if fraction == 1 else None
            self.results.add(
                section,
                method,
                rows[section],
                metrics,
                label_fraction=fraction,
                headlines=headlines,
            )
            self.results.predict(
                section, method, rows[section], fraction, truth=truth, score=scores
            )
            if fraction == 1:
                normal = training[labels[self.train][training] == 0]
                self._show(section, x[section], truth, scores, normal)

    def _show(
        self,
        section: str,
        x: np.ndarray,
        truth: np.ndarray,
        scores: np.ndarray,
        normal: np.ndarray,
    ) -> None:
        """Pictures, and the two most and the two least anomalous cines beside the normal ones."""
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
