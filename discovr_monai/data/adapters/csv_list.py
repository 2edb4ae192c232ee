"""A CSV of ``Path,class``, as the public DISCOVR code reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from discovr_monai.base.tables import number, read_table
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.layout import missing, relative, split_name

TITLE = "CSV of Path,class"
LICENCE = "yours"
SOURCE = "yours"
CLASSES = {"normal": 0, "abnormal": 1, "0": 0, "1": 1}
OPTIONAL = {"ef": "ef", "edv": "edv", "esv": "esv", "fps": "fps"}


def rows(root: Path, *, table: str | None = None) -> Iterator[DatalistRow | CineError]:
    """Rows of a table with Path and class, or whose first two columns are these.

    More columns are used where they are called patient, study, view, split, ef, edv, esv or fps.
    Absolute paths are taken if they lie below ``root``.

    Args:
        root: the folder that the paths are relative to.
        table: the CSV, relative to ``root``; None for the only one in it.

    Raises:
        ValueError, FileNotFoundError: no table, or more than one.
    """
    tables = [root / table] if table else sorted(root.glob("*.csv"))
    if len(tables) != 1:
        raise FileNotFoundError(
            f"{root.name!r} holds {len(tables)} CSV files; say which with --table NAME.csv"
        )
    base = root.resolve()
    for item in read_table(tables[0]):
        names = {k.lower(): k for k in item}
        values = list(item.values())
        path = item[names["path"]] if "path" in names else values[0]
        kind = item[names["class"]] if "class" in names else (values[1] if values[1:] else "")
        place = (root / path).resolve()
        if not place.is_relative_to(base):
            yield CineError(
                PurePosixPath(path).name, "its path leads outside the data folder",
                "Give the folder above it, and paths relative to it", "refused",
            )  # fmt: skip
            continue
        if not place.is_file():
            yield missing(PurePosixPath(path).name if path.startswith("/") else path)
            continue
        row: DatalistRow = {"image": relative(place, base)}
        if kind and kind.lower() not in CLASSES:
            yield CineError(
                row["image"], f"its class {kind!r} is unknown", "Use Normal or Abnormal"
            )
            continue
        if kind:
            row["label"] = CLASSES[kind.lower()]
        row["patient"] = item[names["patient"]] if "patient" in names else row["image"]
        for key in ("study", "view"):
            if key in names and item[names[key]]:
                row[key] = item[names[key]]  # type: ignore[literal-required]
        if "split" in names and (split := split_name(item[names["split"]])):
            row["split"] = split
        for column, key in OPTIONAL.items():
            if column in names and (value := number(item[names[column]])) is not None:
                row[key] = value  # type: ignore[literal-required]
        yield row
