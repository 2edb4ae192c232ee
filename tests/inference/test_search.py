"""Nearest neighbours: exact where it is said, near-exact where it is fast."""

from __future__ import annotations

import numpy as np
import pytest

from discovr_monai.inference.search import Neighbours, find_nearest, nearest_cases


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 24))
    return (centres[rng.integers(0, 40, 1500)] + 0.3 * rng.normal(size=(1500, 24))).astype("f4")


def by_hand(points, queries, k):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, points))
    similar = a @ b.T
    order = np.argsort(-similar, axis=1)[:, :k]
    return order, np.take_along_axis(similar, order, 1)


def test_small_sets_are_exact(points):
    keys, similar = Neighbours(points)(points[:50], 10)
    wanted, values = by_hand(points, points[:50], 10)
    assert np.array_equal(keys, wanted)
    assert np.abs(similar - values).max() < 1e-5


def test_the_graph_finds_nearly_all_and_is_kept(points, tmp_path):
    file = tmp_path / "index.usearch"
    keys, _ = Neighbours(points, exact=False, file=file)(points[:200], 10)
    wanted, _ = by_hand(points, points[:200], 10)
    found = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(keys, wanted, strict=True)])
    assert found > 0.95
    stamp = file.stat().st_mtime_ns
    again, _ = Neighbours(points, exact=False, file=file)(points[:200], 10)
    assert np.array_equal(again, keys)
    assert file.stat().st_mtime_ns == stamp
    more = np.concatenate((points, points[:5] * -1))  # a table that has grown: built anew
    keys, _ = Neighbours(more, exact=False, file=file)(-points[:1], 1)
    assert keys[0, 0] == 1500


def test_cases_are_of_other_patients(points):
    table = [{"id": f"c{i}", "patient": f"p{i // 3}"} for i in range(60)]
    found = nearest_cases(table, points[:60], 5, {r["id"] for r in table})
    for i in range(60):
        assert len(found[f"c{i}"]) == 5
        assert not {j // 3 for j, _ in found[f"c{i}"]} & {i // 3}


def test_an_unknown_id(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"e.parquet does not exist: run configs/inference"):
        find_nearest(tmp_path / "e.parquet", "x")


def test_a_graph_of_other_embeddings_is_made_anew(tmp_path):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 300, 8)).astype(np.float32)
    file = tmp_path / "index.usearch"
    Neighbours(first, exact=False, file=file)
    keys, similar = Neighbours(second, exact=False, file=file)(second[:50], 1)
    assert (keys[:, 0] == np.arange(50)).mean() > 0.95 and similar.mean() > 0.99
