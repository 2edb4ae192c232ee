"""The figures and pictures that several evaluations share, added to the results in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from discovr_monai.base.types import DatalistRow
from discovr_monai.evaluation.report.plots import draw_confusion, draw_map, draw_roc
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import Estimate, classification_metrics, confusion


def report_classes(
    results: Results,
    section: str,
    method: str,
    rows: Sequence[DatalistRow],
    truth: np.ndarray,
    scores: np.ndarray,
    *,
    label_fraction: float,
    headlines: Mapping[str, str] | None,
) -> dict[str, Estimate]:
    """Adds the metrics and the predictions of a classification.

    Args:
        rows: of the section; truth: (M,) int classes; scores: (M, C).
        section, method, label_fraction, headlines: see :meth:`Results.add`.
    """
    metrics = results.add(
        section,
        method,
        rows,
        lambda weights: classification_metrics(truth, scores, weights),
        label_fraction=label_fraction,
        headlines=headlines,
    )
    results.predict(section, method, rows, label_fraction, truth=truth, score=scores)
    return metrics


def show_classes(
    results: Results,
    section: str,
    title: str,
    truth: np.ndarray,
    scores: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Adds the confusion matrix and the ROC curves of a classification.

    Args:
        section: of the datalist; begins the names of the files.
        title: stands above the confusion matrix and begins the captions.
        truth: (M,) int classes.
        scores: (M, C).
        classes: their C names.
    """
    table = confusion(truth, scores.argmax(1), np.ones(len(truth)), len(classes))
    caption = f"{title}: how many cines of each class were called what."
    results.draw(f"{section}_confusion.png", caption, draw_confusion, table, classes, title)
    one_hot = truth[:, None] == np.arange(len(classes))
    caption = f"{title}: each class against the rest."
    results.draw(f"{section}_roc.png", caption, draw_roc, one_hot, scores, classes)


def show_map(
    results: Results,
    section: str,
    features: np.ndarray,
    colour: np.ndarray,
    names: Sequence[str] | None,
    title: str,
) -> None:
    """Adds the t-SNE map of a section's features; see :func:`draw_map` for the arguments."""
    caption = f"{section}: the features, laid out by t-SNE."
    results.draw(f"{section}_map.png", caption, draw_map, features, colour, names, title)
