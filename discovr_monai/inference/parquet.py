"""Parquet files with a row of results for each cine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.files import save_atomic
from discovr_monai.base.notice import NOTICE


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], schema: Any) -> None:
    """Writes rows as a Parquet file, atomically; a column that a row lacks is null there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema.with_metadata({"notice": NOTICE})
    columns = {name: [r.get(name) for r in rows] for name in schema.names}
    table = pa.table(columns, schema=schema)
    save_atomic(lambda temporary: pq.write_table(table, temporary), path)


def join_parquet(path: Path, files: Sequence[Path]) -> int:
    """Joins Parquet files with only one in memory at a time; returns the number of rows."""
    import pyarrow.parquet as pq

    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        schema = pq.read_schema(files[0])
        with pq.ParquetWriter(temporary, schema) as writer:
            for file in files:
                part = pq.read_table(file)
                writer.write_table(part)
                count += part.num_rows

    save_atomic(write, path)
    return count


def read_parquet(path: Path, leave_out: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a Parquet file, without the columns named in ``leave_out``."""
    import pyarrow.parquet as pq

    names = [n for n in pq.read_schema(path).names if n not in leave_out]
    rows: list[dict[str, Any]] = pq.read_table(path, columns=names).to_pylist()
    return rows


def read_embeddings(path: Path) -> np.ndarray:
    """The "embedding" column of a Parquet file as (M, D) float32, a row per cine."""
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1) if len(column) else flat.reshape(0, 0)
