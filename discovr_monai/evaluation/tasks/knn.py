"""Zero-shot classification: a weighted vote of the nearest labelled cines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from discovr_monai.evaluation.features.extract import Features, subset_by_patient
from discovr_monai.evaluation.report.nearest import show_nearest, telling_cases, unit
from discovr_monai.evaluation.report.pictures import report_classes, show_classes, show_map
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.tasks.targets import section_labels

HEADLINES = {"macro_f1": "kNN macro F1", "auroc": "kNN AUROC"}


def knn_scores(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    k: int,
    temperature: float,
    classes: int,
) -> np.ndarray:
    """Each class's share of the votes of the k nearest, weighted by exp(cosine / temperature).

    This is the classifier of Wu et al. 2018, as DINO and the public DISCOVR code use it.

    Args:
        bank: (M, D) features of the labelled cines.
        labels: (M,) int, their classes.
        queries: (Q, D) features.
        k: neighbours that vote, 1..M.
        temperature: above 0.
        classes: C, how many there are.

    Returns:
        (Q, C) shares; each row sums to 1.

    Raises:
        ValueError: if the bank holds fewer than k.

    >>> knn_scores(np.eye(2), np.array([0, 1]), np.array([[1.0, 1.0]]), 2, 0.07, 2).tolist()
    [[0.5, 0.5]]
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


@dataclass(eq=False, repr=False)
class KNN:
    """Classification of each test cine by its nearest labelled cines, for each k.

    Args:
        features: of all sections.
        results: collects the figures.
        classes: names of the classes.
        label_key: row key of the class.
        bank: section that votes: the training section, or validation as the public code has it.
        test: sections that are classified.
        k: numbers of neighbours; the pictures are those of the last one.
        temperature: of the vote, above 0; the smaller, the more the nearest of them count.
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        label_fractions: shares of the bank's patients, 1 among them.
        seed: of the choice of these patients.
    """

    features: Features
    results: Results
    _: KW_ONLY
    classes: Sequence[str]
    label_key: str = "label"
    bank: str = "training"
    test: Sequence[str] = ("test",)
    k: Sequence[int] = (1, 5, 10, 20)
    temperature: float = 0.07
    pooling: str = "mean"
    label_fractions: Sequence[float] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} must be above 0")

    def run(self) -> dict[str, Any]:
        """Evaluates, writes the results and returns them."""
        rows = self.features.rows
        names = (self.bank, *self.test)
        labels = section_labels(rows, names, self.label_key, self.classes)
        bank, voters = self.features[self.bank].pooled(self.pooling), labels[self.bank]
        for section in self.test:
            queries, truth = self.features[section].pooled(self.pooling), labels[section]
            for fraction in self.label_fractions:
                kept = subset_by_patient(rows[self.bank], fraction, self.seed, voters)
                for k in self.k:
                    scores = knn_scores(
                        bank[kept], voters[kept], queries, k, self.temperature, len(self.classes)
                    )
                    shown = k == self.k[-1] and fraction == 1
                    report_classes(
                        self.results, section, f"k={k}", rows[section], truth, scores,
                        label_fraction=fraction, headlines=HEADLINES if shown else None,
                    )  # fmt: skip
                    if shown:
                        title = f"{section}, k={k}"
                        show_classes(self.results, section, title, truth, scores, self.classes)
                        self._show_nearest(section, kept, scores, labels)
            show_map(self.results, section, queries, truth, self.classes, section)
        return self.results.finish()

    def _show_nearest(
        self, section: str, kept: np.ndarray, scores: np.ndarray, labels: dict[str, np.ndarray]
    ) -> None:
        """Adds cines that were called rightly and wrongly beside the nearest of the bank."""
        truth, predicted = labels[section], scores.argmax(1)
        chosen = {
            i: self.classes[truth[i]]
            + (
                ", called so"
                if predicted[i] == truth[i]
                else f", called {self.classes[predicted[i]]}"
            )
            for i in telling_cases(truth, scores)
        }
        notes = {
            row["id"]: self.classes[label]
            for row, label in zip(self.features.rows[self.bank], labels[self.bank], strict=True)
        }
        show_nearest(
            self.results, self.features, (section, chosen), (self.bank, kept), self.pooling,
            lambda row: notes[row["id"]],
        )  # fmt: skip
