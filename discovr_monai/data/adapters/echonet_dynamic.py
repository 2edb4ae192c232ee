"""EchoNet-Dynamic: 10,030 apical four-chamber AVI of 112 x 112 with EF, volumes and tracings."""

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
from discovr_monai.data.read.masks import clip_key, polygon_area, read_tracings

TITLE = "EchoNet-Dynamic"
LICENCE = "Stanford University Dataset Research Use Agreement: not to be redistributed"
SOURCE = "https://echonet.github.io/dynamic"
TRACINGS = "VolumeTracings.csv"


def rows(root: Path, *, threshold: float = 50.0) -> Iterator[DatalistRow | CineError]:
    """Rows of FileList.csv; ED is the larger traced outline, ES the smaller.

    Args:
        root: the unpacked folder (or one above).
        threshold: EF in percent below which a heart is labelled abnormal.
    """
    folder = find_folder(root, "FileList.csv", TITLE)
    videos = files_by_stem(folder / "Videos", (".avi",))
    tracings = folder / TRACINGS
    traced = read_tracings(tracings) if tracings.is_file() else {}
    for item in read_table(folder / "FileList.csv", ("FileName", "EF", "Split")):
        key = clip_key(item["FileName"])
        if key not in videos:
            yield missing(f"Videos/{item['FileName']}")
            continue
        row: DatalistRow = {
            "image": relative(videos[key], root),
            "patient": key,  # one clip per patient, says the set's page
            "view": "A4C",
        }
        if (split := split_name(item["Split"])) is not None:
            row["split"] = split
        if (ef := percent(number(item["EF"]))) is not None:
            row["ef"], row["label"] = ef, int(ef < threshold)
        for ours, theirs in (("edv", "EDV"), ("esv", "ESV")):
            if (volume := number(item.get(theirs))) is not None:
                row[ours] = volume  # type: ignore[literal-required]
        if fps := number(item.get("FPS")):
            row["fps"], row["fps_source"] = fps, "FileList.csv"
        add_tracing(row, traced.get(key, {}), relative(tracings, root), "chords", key)
        yield row


def add_tracing(row: DatalistRow, traced: dict, table: str, kind: str, key: str) -> None:
    """ED and ES by area, and the reference; nothing where fewer than two frames are traced."""
    if len(traced) < 2:
        return
    order = sorted(traced, key=lambda frame: polygon_area(traced[frame]))
    row["es_frame"], row["ed_frame"] = order[0], order[-1]
    row["mask"] = {"kind": kind, "file": table, "key": key}
