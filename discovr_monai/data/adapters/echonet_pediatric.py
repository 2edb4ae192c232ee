"""EchoNet-Pediatric: A4C and PSAX AVI of children with study-level EF and ten folds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.tables import number, read_table
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.echonet_dynamic import TRACINGS, add_tracing
from discovr_monai.data.adapters.layout import (
    files_by_stem,
    find_folder,
    missing,
    percent,
    relative,
)
from discovr_monai.data.read.masks import clip_key, read_tracings

TITLE = "EchoNet-Pediatric"
LICENCE = "Stanford University Dataset Research Use Agreement: not to be redistributed"
SOURCE = "https://echonet.github.io/pediatric"
VIEWS = ("A4C", "PSAX")


def rows(
    root: Path, *, view: str | None = None, threshold: float = 55.0
) -> Iterator[DatalistRow | CineError]:
    """Rows of both views' FileList.csv; ``fold`` is the set's own, 0 to 9.

    Args:
        root: the unpacked folder (or one above).
        view: "A4C" or "PSAX" only; None for both.
        threshold: EF in percent below which a heart is labelled abnormal.

    Raises:
        ValueError: for an unknown view.
    """
    if view is not None and view.upper() not in VIEWS:
        raise ValueError(f"view {view!r} must be one of {', '.join(VIEWS)}")
    wanted = [view.upper()] if view else list(VIEWS)
    folders = [
        (v, folder)
        for v in wanted
        for folder in sorted(root.glob(f"**/{v}"))
        if (folder / "FileList.csv").is_file()
    ]
    if not folders:
        find_folder(root, f"{wanted[0]}/FileList.csv", TITLE)
    for name, folder in folders:
        yield from _view(root, folder, name, threshold)


def _view(
    root: Path, folder: Path, view: str, threshold: float
) -> Iterator[DatalistRow | CineError]:
    videos = files_by_stem(folder / "Videos", (".avi",))
    tracings = folder / TRACINGS
    traced = read_tracings(tracings) if tracings.is_file() else {}
    for item in read_table(folder / "FileList.csv", ("FileName", "EF", "Split")):
        key = clip_key(item["FileName"])
        if key not in videos:
            yield missing(f"{view}/Videos/{item['FileName']}")
            continue
        parts = Path(item["FileName"]).stem.split("-")  # patient-accession-instance
        row: DatalistRow = {
            "image": relative(videos[key], root),
            "patient": parts[0],
            "study": "-".join(parts[:2]),
            "view": view,
        }
        if (fold := number(item["Split"])) is not None:
            row["fold"] = int(fold)
        if (ef := percent(number(item["EF"]))) is not None:
            row["ef"], row["label"] = ef, int(ef < threshold)
        add_tracing(row, traced.get(key, {}), relative(tracings, root), "polygon", key)
        yield row
