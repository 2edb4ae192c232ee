"""HMC-QU: 162 A4C and 160 A2C recordings with segment-wise infarction labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.layout import files_by_stem, missing, relative

TITLE = "HMC-QU"
LICENCE = "Kaggle aysendegerli/hmcqu-dataset: research use"
SOURCE = "https://www.kaggle.com/datasets/aysendegerli/hmcqu-dataset"
WALL = 2  # CAMUS's number for the myocardium


def rows(root: Path, *, view: str | None = None) -> Iterator[DatalistRow | CineError]:
    """Rows of HMC_QU.xlsx; abnormal where any segment shows an infarction.

    Frames count from 1 in the table. Wall masks (Mask_<name>.mat, "predicted") cover the frames
    from "Reference Frame" to "End of Cycle".

    Args:
        root: the unpacked folder.
        view: "A2C" or "A4C" only; None for both.

    Raises:
        ValueError, FileNotFoundError: for an unknown view, another folder or another table.
    """
    if view not in (None, "A2C", "A4C"):
        raise ValueError(f"view {view!r} must be A2C or A4C")
    tables = sorted(root.rglob("HMC_QU.xlsx"))
    if not tables:
        raise FileNotFoundError(
            f"{root.name!r} does not look like HMC-QU: there is no HMC_QU.xlsx in it"
        )
    videos = {_key(stem): p for stem, p in files_by_stem(root, (".avi",)).items()}
    masks = {_key(stem): p for stem, p in files_by_stem(root, (".mat",)).items()}
    for item in _table(tables[0]):
        name = str(item["ECHO"]).strip()
        here = "A4C" if re.search(r"4CH|CH4", name, re.IGNORECASE) else "A2C"
        if view not in (None, here):
            continue
        path = videos.get(_key(name))
        if path is None:
            yield missing(f"{name}.avi")
            continue
        row: DatalistRow = {
            "image": relative(path, root),
            "patient": re.split(r"[ _]", name)[0],
            "view": here,
        }
        segments = [str(v) for k, v in item.items() if re.fullmatch(r"SEG\s?\d+", str(k)) and v]
        if segments:
            row["label"] = int(any(_infarcted(s) for s in segments))
        start, end = item.get("Reference Frame"), item.get("End of Cycle")
        mask = masks.get(_key(f"Mask_{name}"))
        if isinstance(start, (int, float)) and isinstance(end, (int, float)):
            row["ed_frame"] = int(start) - 1
            if mask is not None:
                row["mask"] = {
                    "kind": "mat", "file": relative(mask, root), "key": "predicted",
                    "first": int(start) - 1, "frames": int(end) - int(start) + 1, "label": WALL,
                }  # fmt: skip
        yield row


def _key(name: str) -> str:
    """Names differ in blanks and case between table and files."""
    return re.sub(r"\s+", "", name).lower()


def _infarcted(cell: str) -> bool:
    text = cell.strip().lower()
    return text in ("mi", "stemi", "1", "1.0", "true", "yes") or (
        "mi" in re.split(r"[^a-z]+", text) and "non" not in text
    )


def _table(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of every sheet that has a column ECHO."""
    import openpyxl

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zip, XML and key errors of a damaged file
        raise ValueError(f"{path.name} is not an Excel file that can be read") from error
    has_table = False
    for sheet in book.worksheets:
        lines = sheet.iter_rows(values_only=True)
        header = next((line for line in lines if line and "ECHO" in line), None)
        if header is None:
            continue
        has_table = True
        names = [str(name).strip() if name is not None else "" for name in header]
        for line in lines:
            item = dict(zip(names, line, strict=False))
            if item.get("ECHO"):
                yield item
    if not has_table:
        raise ValueError(f"{path.name} has no column ECHO")
