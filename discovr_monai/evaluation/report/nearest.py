"""Query cines beside the cines whose features are nearest, for an evaluation's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from discovr_monai.base.types import DatalistRow
from discovr_monai.evaluation.features.extract import Features
from discovr_monai.evaluation.report.results import Results
from discovr_monai.pages.page import Nearest

CASES = 6  # that are shown beside a query


def unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, in float64.

    >>> unit(np.array([[3, 4]])).tolist()
    [[0.6, 0.8]]
    """
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def telling_cases(truth: np.ndarray, scores: np.ndarray, each: int = 2) -> list[int]:
    """Indices of the cines to look at: those that are right and surest, then wrong and surest.

    Args:
        truth: (M,) int classes.
        scores: (M, C).
        each: how many of both; the right ones are of different classes as far as possible.
    """
    predicted = scores.argmax(1)
    order = np.argsort(-scores.max(1), kind="stable").tolist()
    right = [i for i in order if predicted[i] == truth[i]]
    surest = {truth[i]: i for i in reversed(right)}.values()  # one of each class
    right = [i for i in right if i in surest] + [i for i in right if i not in surest]
    wrong = [i for i in order if predicted[i] != truth[i]]
    return right[:each] + wrong[:each]


def show_nearest(
    results: Results,
    features: Features,
    queries: tuple[str, Mapping[int, str]],
    bank: tuple[str, np.ndarray],
    pooling: str,
    note: Callable[[DatalistRow], str],
) -> None:
    """Adds queries with their nearest cases by cosine similarity to the page.

    Args:
        queries: a section, and the number of each chosen row with what is said of it.
        bank: a section, and the numbers of the rows that are searched.
        pooling: of the features.
        note: row -> what is said of a case.
    """
    section, chosen = queries
    source, kept = bank
    bank_units = unit(features[source].pooled(pooling)[kept])
    query_features = features[section].pooled(pooling)
    for number, text in chosen.items():
        similar = bank_units @ unit(query_features[[number]])[0]
        near = np.argsort(-similar, kind="stable")[:CASES]
        rows = [features.rows[source][kept[i]] for i in near]
        query = features.rows[section][number]
        results.retrieval.append(
            (
                Nearest(query["id"], None, features.thumbnail(query), text),
                [
                    Nearest(row["id"], float(similar[i]), features.thumbnail(row), note(row))
                    for i, row in zip(near, rows, strict=True)
                ],
            )
        )
