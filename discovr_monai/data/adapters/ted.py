"""TED: four-chamber full beats of CREATIS with every frame segmented (CAMUS's sister)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.tables import number
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.camus import header_spacing
from discovr_monai.data.adapters.layout import missing, percent, read_cfg, relative

TITLE = "TED"
LICENCE = "CC BY-NC-SA 4.0"
SOURCE = "https://humanheart-project.creatis.insa-lyon.fr/ted.html"


def rows(root: Path, *, threshold: float = 50.0) -> Iterator[DatalistRow | CineError]:
    """Rows of patientNNN_4CH_sequence.mhd; ED and ES count from 1 in the cfg files.

    Args:
        root: the folder that holds "database", or one above.
        threshold: EF in percent below which a heart is labelled abnormal.

    Raises:
        FileNotFoundError: for another folder.
    """
    patients = sorted(p for p in root.rglob("patient[0-9]*") if p.is_dir())
    if not patients:
        raise FileNotFoundError(
            f"{root.name!r} does not look like TED: there is no folder patient001 in it. Give the "
            "folder that holds database"
        )
    for folder in patients:
        base = f"{folder.name}_4CH"
        cine, cfg = folder / f"{base}_sequence.mhd", folder / f"{base}_info.cfg"
        if not cine.is_file():
            yield missing(relative(cine, root))
            continue
        row: DatalistRow = {
            "image": relative(cine, root),
            "patient": folder.name,
            "view": "A4C",
        }
        about = dict(read_cfg(cfg)) if cfg.is_file() else {}
        for key in ("ed", "es"):
            frame = number(about.get(key))
            if frame is not None and frame >= 1:
                row[f"{key}_frame"] = int(frame) - 1  # type: ignore[literal-required]
        if (ef := percent(number(about.get("ef") or about.get("lvef")))) is not None:
            row["ef"], row["label"] = ef, int(ef < threshold)
        if fps := number(about.get("framerate")):
            row["fps"], row["fps_source"] = fps, cfg.name
        if about.get("imagequality"):
            row["quality"] = about["imagequality"].lower()
        mask = folder / f"{base}_sequence_gt.mhd"
        if mask.is_file():
            row["mask"] = relative(mask, root)
        if (spacing := header_spacing(cine)) is not None:
            row["spacing"] = spacing
        yield row
