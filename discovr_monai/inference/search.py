"""Nearest neighbours among embeddings: exact in small sets, by a graph index in large ones."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.files import save_atomic
from discovr_monai.inference.parquet import read_embeddings, read_parquet

EXACT = 100_000  # up to so many rows, every distance is computed
OWN = 200  # so many cines of the same patient are searched past, at most


class Neighbours:
    """Finds the embeddings with the largest cosine similarity.

    Args:
        embeddings: (M, D) float32.
        exact: whether to compute every distance instead of asking an HNSW graph (usearch,
            float16); None computes them up to M = 100,000.
        file: where the graph is kept. If it holds these embeddings already, it is loaded.

    Raises:
        ValueError: there are no embeddings, or they are no matrix.

    >>> search = Neighbours(np.eye(3, dtype=np.float32))
    >>> rows, similarities = search(np.array([[1.0, 0.5, 0.0]]), k=2)
    >>> rows.tolist(), np.round(similarities.astype(float), 2).tolist()
    ([[0, 1]], [[0.89, 0.45]])
    """

    def __init__(
        self, embeddings: np.ndarray, *, exact: bool | None = None, file: Path | None = None
    ) -> None:
        from usearch.index import Index

        if embeddings.ndim != 2 or not embeddings.size:
            raise ValueError(f"embeddings of shape {embeddings.shape} are none to search")
        self.embeddings = np.ascontiguousarray(embeddings, np.float32)
        self.exact = len(embeddings) <= EXACT if exact is None else exact
        if self.exact:
            return
        self.index = Index(ndim=embeddings.shape[1], metric="cos", dtype="f16")
        if file is not None and file.exists():
            self.index.load(str(file))
            if self._fits():
                return
            self.index.reset()
        self.index.add(np.arange(len(embeddings)), self.embeddings, log="index")
        if file is not None:
            save_atomic(self._save, file)

    def _fits(self) -> bool:
        """Whether the graph holds these embeddings; a thousand of them are compared."""
        count = len(self.embeddings)
        if len(self.index) != count or self.index.ndim != self.embeddings.shape[1]:
            return False
        rows = np.unique(np.linspace(0, count - 1, 1000).astype(np.int64))
        a, b = np.asarray(self.index.get(rows), np.float32), self.embeddings[rows]
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        return bool((cosines > 0.999).all())

    def _save(self, path: Path) -> None:
        self.index.save(str(path))

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, D) -> (Q, k) rows and cosine similarities, the nearest first."""
        k = min(k, len(self.embeddings))
        queries = np.ascontiguousarray(queries, np.float32)
        if self.exact:
            from usearch.index import search

            matches = search(self.embeddings, queries, k, metric="cos", exact=True)
        else:
            matches = self.index.search(queries, k)
        keys = np.asarray(matches.keys).reshape(len(queries), -1)
        far = np.asarray(matches.distances).reshape(len(queries), -1)
        return keys.astype(np.int64), 1 - far


def nearest_cases(
    table: Sequence[dict[str, Any]],
    embeddings: np.ndarray,
    k: int,
    wanted: Container[str],
) -> dict[str, list[tuple[int, float]]]:
    """For the id of each wanted row, the (row number, similarity) of up to ``k`` nearest cines.

    Cines of the same patient are left out.
    """
    search = Neighbours(embeddings)
    counts: dict[str, int] = {}
    for row in table:
        counts[row["patient"]] = counts.get(row["patient"], 0) + 1
    out = {}
    for i, row in enumerate(table):
        if row["id"] not in wanted:
            continue
        spare = min(counts[row["patient"]], OWN)  # one's own cines come first
        keys, similar = search(embeddings[i : i + 1], k + spare)
        pairs = zip(keys[0].tolist(), similar[0].tolist(), strict=True)
        others = [(j, s) for j, s in pairs if table[j]["patient"] != row["patient"]]
        out[row["id"]] = others[:k]
    return out


def find_nearest(file: str | Path, query: str, k: int = 10) -> list[dict[str, Any]]:
    """The cines of an inference that are most similar to one of them.

    Args:
        file: embeddings.parquet.
        query: the id of a cine in it.
        k: how many cines to return.

    Returns:
        The cines' rows without the embedding, with "similarity" (cosine), the nearest first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no such id.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} does not exist: run configs/inference.yaml first")
    table = read_parquet(path, leave_out=("embedding", "thumbnail"))
    rows = [i for i, row in enumerate(table) if row["id"] == query]
    if not rows:
        raise ValueError(f"{path.name} has no cine {query!r}: take an id from its first column")
    embeddings = read_embeddings(path)
    index = path.with_suffix(".usearch")
    keys, similar = Neighbours(embeddings, file=index)(embeddings[rows], k + 1)
    pairs = zip(keys[0].tolist(), similar[0].tolist(), strict=True)
    others = [{**table[i], "similarity": round(s, 4)} for i, s in pairs if i != rows[0]]
    return others[:k]
