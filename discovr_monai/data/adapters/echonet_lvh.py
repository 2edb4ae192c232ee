"""EchoNet-LVH: 12,000 parasternal long axis AVI with wall and cavity callipers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from discovr_monai.base.tables import number, read_table
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.layout import (
    files_by_stem,
    find_folder,
    missing,
    relative,
    split_name,
)

TITLE = "EchoNet-LVH"
LICENCE = "Stanford University Dataset Research Use Agreement: not to be redistributed"
SOURCE = "https://echonet.github.io/lvh"
TABLE = "MeasurementsList.csv"
WALLS = ("IVSd", "LVPWd")


def rows(root: Path, *, threshold: float = 12.0) -> Iterator[DatalistRow | CineError]:
    """One row per clip of the long table; ``measurements`` in mm (the table has cm).

    The frame rate is the table's: the files' own headers are wrong. ``spacing`` is what the
    callipers' lengths in cm and in pixels say.

    Args:
        root: the unpacked folder (or one above).
        threshold: mm of the septum or the posterior wall in diastole above which a heart is
            labelled abnormal (hypertrophy).
    """
    folder = find_folder(root, TABLE, TITLE)
    videos = files_by_stem(folder, (".avi",))
    clips: dict[str, list[dict[str, str]]] = {}
    for item in read_table(folder / TABLE, ("HashedFileName", "Calc", "CalcValue")):
        clips.setdefault(item["HashedFileName"], []).append(item)
    for name, items in clips.items():
        path = videos.get(name.lower().removesuffix(".avi"))
        if path is None:
            yield missing(f"{name}.avi")
            continue
        row: DatalistRow = {
            "image": relative(path, root),
            "patient": name.lower(),  # the set has no patients' ids
            "view": "PLAX",
        }
        _measure(row, items)
        walls = [row["measurements"][w] for w in WALLS if w in row["measurements"]]
        if walls:
            row["label"] = int(max(walls) > threshold)
        if (split := split_name(items[0].get("split") or items[0].get("Split") or "")) is not None:
            row["split"] = split
        if fps := number(items[0].get("FPS")):
            row["fps"], row["fps_source"] = fps, TABLE
        yield row


def _measure(row: DatalistRow, items: list[dict[str, str]]) -> None:
    lengths: dict[str, list[float]] = {}
    scales = []
    for item in items:
        centimetres = number(item["CalcValue"])
        if not centimetres or centimetres <= 0:
            continue
        lengths.setdefault(item["Calc"], []).append(10 * centimetres)
        ends = [number(item.get(k)) for k in ("X1", "X2", "Y1", "Y2")]
        if None not in ends:
            x1, x2, y1, y2 = (float(e) for e in ends if e is not None)
            pixels = float(np.hypot(x2 - x1, y2 - y1))
            if pixels > 1:
                scales.append(10 * centimetres / pixels)
        frame = number(item.get("Frame"))
        if frame is not None and item["Calc"] in ("LVIDd", "LVIDs"):
            row["ed_frame" if item["Calc"] == "LVIDd" else "es_frame"] = int(frame)
    row["measurements"] = {name: round(float(np.mean(v)), 3) for name, v in lengths.items()}
    if scales:
        row["spacing"] = [round(float(np.median(scales)), 5)] * 2
