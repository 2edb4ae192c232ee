"""Nearest neighbours among many embeddings: the graph index against every distance.

    python benchmarks/speed/search.py [--rows 1000000] [--width 128]

Clustered random embeddings; prints the time to build, the time of a query both ways and its ratio,
and which share of the exact 10 nearest the graph finds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from discovr_monai.inference.search import Neighbours


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(1000, options.width)).astype(np.float32)
    rows = centres[rng.integers(0, 1000, options.rows)]
    rows += rng.normal(size=rows.shape).astype(np.float32)
    queries = rows[rng.integers(0, len(rows), 100)]
    start = time.perf_counter()
    graph = Neighbours(rows, exact=False)
    built = time.perf_counter() - start
    exact = Neighbours(rows, exact=True)
    took = {}
    neighbours = {}
    for name, search in (("graph", graph), ("exact", exact)):
        start = time.perf_counter()
        neighbours[name], _ = search(queries, 10)
        took[name] = (time.perf_counter() - start) / len(queries)
    pairs = zip(neighbours["graph"], neighbours["exact"], strict=True)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])
    print(f"{options.rows} rows of {options.width}: built in {built:.0f} s")
    print(
        f"a query: graph {1e3 * took['graph']:.2f} ms, exact {1e3 * took['exact']:.2f} ms, ", end=""
    )
    print(f"ratio {took['exact'] / took['graph']:.0f}; recall of the 10 nearest {recall:.3f}")


if __name__ == "__main__":
    main()
