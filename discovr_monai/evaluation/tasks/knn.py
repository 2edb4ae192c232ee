"""Zero-shot classification: a weighted vote of the nearest labelled cines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from discovr_monai.evaluation.features.extract import Features, subset_by_patient
from discovr_monai.evaluation.report.nearest import show_nearest, telling_cases, unit
from discovr_monai.evaluation.report.pictures import show_classes, show_map
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import classification_metrics
from discovr_monai.evaluation.tasks.targets import class_labels

HEADLINES = {"macro_f1": "kNN macro F1", "auroc": "kNN AUROC"}


def knn_scores(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    k: int,
    temperature: float,
    classes: int,
) -> np.ndarray:
    """Share of each class in the vote of the k nearest, weighted by exp(cosine / temperature).

    Wu et al. 2018, as DINO and the public DISCOVR code use it.

    Args:
        bank: (M, D); labels: (M,) int; queries: (Q, D).

    Returns:
        (Q, C), rows sum to 1.

    Raises:
        ValueError: if the bank holds fewer than k.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(
            f"k {k} needs 1 to {len(bank)} labelled cines, the bank's size: lower k or enlarge it"
        )
    cosine = unit(queries) @ unit(bank).T  # (Q, M)
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    near = np.take_along_axis(cosine, nearest, axis=1)
    weight = np.exp((near - near[:, :1]) / temperature)  # the constant factor cancels
    votes = np.zeros((len(queries), classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[nearest]), weight)
    return votes / votes.sum(1, keepdims=True)


class KNN:
    """kNN on frozen features, for each k.

    Args:
        features: of all sections.
        results: collects the figures.
        classes: names of the classes.
        label_key: row key of the class.
        bank: section that votes: the training section, or validation as the public code has it.
        test: sections that are classified.
        k: neighbours, several.
        temperature: of the vote.
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        label_fractions: shares of the bank's patients, 1 among them.
        seed: of the shares.
    """

    def __init__(
        self,
        features: Features,
        results: Results,
        *,
        classes: Sequence[str],
        label_key: str = "label",
        bank: str = "training",
        test: Sequence[str] = ("test",),
        k: Sequence[int] = (1, 5, 10, 20),
        temperature: float = 0.07,
        pooling: str = "mean",
        label_fractions: Sequence[float] = (1.0,),
        seed: int = 0,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature {temperature} must be above 0")
        self.features, self.results = features, results
        self.classes, self.label_key = list(classes), label_key
        self.bank, self.test = bank, list(test)
        self.k, self.temperature, self.pooling = list(k), temperature, pooling
        self.label_fractions, self.seed = list(label_fractions), seed

    def run(self) -> dict:
        """Evaluates, writes, returns the results."""
        rows = self.features.rows
        labels = {
            name: class_labels(rows[name], self.label_key, self.classes, name)
            for name in (self.bank, *self.test)
        }
        bank, voters = self.features[self.bank].pooled(self.pooling), labels[self.bank]
        for section in self.test:
            queries, truth = self.features[section].pooled(self.pooling), labels[section]
            for fraction in self.label_fractions:
                kept = subset_by_patient(rows[self.bank], fraction, self.seed, voters)
                for k in self.k:
                    scores = knn_scores(
                        bank[kept], voters[kept], queries, k, self.temperature, len(self.classes)
                    )
                    self._report(section, f"k={k}", scores, truth, fraction)
                    if k == self.k[-1] and fraction == 1:
                        title = f"{section}, k={k}"
                        show_classes(self.results, section, title, truth, scores, self.classes)
                        self._nearest(section, kept, scores, labels)
            show_map(self.results, section, queries, truth, self.classes, section)
        return self.results.finish()

    def _report(
        self, section: str, method: str, scores: np.ndarray, truth: np.ndarray, fraction: float
    ) -> None:
        rows = self.features.rows[section]
        self.results.add(
            section,
            method,
            rows,
            lambda w: classification_metrics(truth, scores, w),
            label_fraction=fraction,
            headlines=HEADLINES if method == f"k={self.k[-1]}" and fraction == 1 else None,
        )
        self.results.predict(section, method, rows, fraction, truth=truth, score=scores)

    def _nearest(
        self, section: str, kept: np.ndarray, scores: np.ndarray, labels: dict[str, np.ndarray]
    ) -> None:
        truth, said = labels[section], scores.argmax(1)
        chosen = {
            i: self.classes[truth[i]]
            + (", called so" if said[i] == truth[i] else f", called {self.classes[said[i]]}")
            for i in telling_cases(truth, scores)
        }
        names = {
            r["id"]: self.classes[v]
            for r, v in zip(self.features.rows[self.bank], labels[self.bank], strict=True)
        }
        bank = (self.bank, kept)
        show_nearest(
            self.results, self.features, (section, chosen), bank, self.pooling,
            lambda row: names[row["id"]],
        )  # fmt: skip
