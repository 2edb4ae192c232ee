"""Queries beside the cases that are nearest to them, for an evaluation's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from discovr_monai.base.types import DatalistRow
from discovr_monai.evaluation.features.extract import Features
from discovr_monai.evaluation.report.results import Results
from discovr_monai.pages.page import Nearest

CASES = 6  # of a query


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def telling_cases(truth: np.ndarray, scores: np.ndarray, each: int = 2) -> list[int]:
    """Which of M classified cines to look at: the surest that are right, the surest that are wrong.

    Args:
        truth: (M,) int; scores: (M, C).
        each: of both; right ones are of different classes as long as there are classes.
    """
    said, sure = scores.argmax(1), scores.max(1)
    order = np.argsort(-sure, kind="stable")
    right = [int(i) for i in order if said[i] == truth[i]]
    first = {int(truth[i]): i for i in reversed(right)}  # the surest of each class
    ahead = sorted(first.values(), key=right.index)
    right = ahead + [i for i in right if i not in ahead]
    wrong = [int(i) for i in order if said[i] != truth[i]]
    return right[:each] + wrong[:each]


def show_nearest(
    results: Results,
    features: Features,
    queries: tuple[str, Mapping[int, str]],
    bank: tuple[str, np.ndarray],
    pooling: str,
    note: Callable[[DatalistRow], str],
) -> None:
    """Adds queries with their nearest cases, by cosine similarity, to the page.

    Args:
        queries: section, and number of a row -> what is said of it.
        bank: section, and numbers of the rows that are searched.
        pooling: of the features.
        note: what is said of a case.
    """
    section, chosen = queries
    source, kept = bank
    known = unit(features[source].pooled(pooling)[kept])
    asked = features[section].pooled(pooling)
    for number, words in chosen.items():
        similar = known @ unit(asked[[number]])[0]
        near = np.argsort(-similar, kind="stable")[:CASES]
        rows = [features.rows[source][kept[i]] for i in near]
        query = features.rows[section][number]
        results.retrieval.append(
            (
                Nearest(query["id"], None, features.thumbnail(query), words),
                [
                    Nearest(row["id"], float(similar[i]), features.thumbnail(row), note(row))
                    for i, row in zip(near, rows, strict=True)
                ],
            )
        )
