"""RVENet: apical four-chamber DICOM with right ventricular EF from 3-D echo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.tables import number, read_table
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.layout import (
    files_by_stem,
    find_folder,
    missing,
    percent,
    relative,
    split_name,
)

TITLE = "RVENet"
LICENCE = "Research use after registration; not to be redistributed"
SOURCE = "https://rvenet.github.io/dataset"


def rows(root: Path, *, threshold: float = 45.0) -> Iterator[DatalistRow | CineError]:
    """Rows of codebook.csv; "validation", the set's held-out part, is our "test".

    A part of the training patients becomes our "validation": the set has none to tune on.

    Args:
        root: the unpacked folder (or one above).
        threshold: RVEF in percent below which a heart is labelled abnormal.
    """
    folder = find_folder(root, "codebook.csv", TITLE)
    files = files_by_stem(folder, (".dcm",))
    table = folder / "codebook.csv"
    with table.open(encoding="latin-1") as file:
        delimiter = ";" if ";" in file.readline() else ","
    for item in read_table(table, ("FileName", "RVEF", "Split"), delimiter=delimiter):
        name = item["FileName"].removesuffix(".dcm")
        path = files.get(name.lower())
        if path is None:
            yield missing(f"{name}.dcm")
            continue
        row: DatalistRow = {
            "image": relative(path, root),
            "patient": "_".join(name.split("_")[:2]),
            "view": "A4C",
        }
        if (rvef := percent(number(item["RVEF"]))) is not None:
            row["rvef"], row["label"] = rvef, int(rvef < threshold)
        split = split_name(item["Split"])
        row["split"] = {"validation": "test"}.get(split or "", split or "training")
        if fps := number(item.get("FPS")):
            row["fps"], row["fps_source"] = fps, "codebook.csv"
        yield row
