"""CardiacUDA (CardiacUDC on Kaggle): two sites, four views, chambers segmented in NIfTI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.layout import missing, relative

TITLE = "CardiacUDA"
LICENCE = "Kaggle xiaoweixumedicalai/cardiacudc-dataset: research use"
SOURCE = "https://www.kaggle.com/datasets/xiaoweixumedicalai/cardiacudc-dataset"
NUMBERED = re.compile(r"(normal|patient)-?(\d+)-(\d)_image\.nii(\.gz)?$", re.IGNORECASE)
VIEWS = {"1": "LVLA", "2": "PALA", "3": "LVSA", "4": "A4C"}


def rows(root: Path, *, site: str | None = None) -> Iterator[DatalistRow | CineError]:
    """Rows of every *_image.nii.gz; the site is in the folder's name (Site_G_100 is G).

    In "label_all_frame" the names begin with normal or patient: that is the label. Labels of
    chambers are kept as they are; name them under ``structures`` of the segmentation config.

    Args:
        root: the unpacked folder.
        site: "G" or "R" only; None for both.

    Raises:
        FileNotFoundError: for another folder.
    """
    images = sorted(p for p in root.rglob("*_image.nii*") if p.is_file())
    if not images:
        raise FileNotFoundError(
            f"{root.name!r} does not look like CardiacUDA: there is no *_image.nii.gz in it. "
            "Unpack its parts first"
        )
    for path in images:
        name = relative(path, root)
        match = NUMBERED.search(path.name)
        if match is None:
            yield missing(name, "its name is not of the form patient12-4_image.nii.gz")
            continue
        where = re.search(r"Site_([A-Z])", name)
        if site is not None and (where is None or where.group(1) != site.upper()):
            continue
        row: DatalistRow = {
            "image": name,
            "patient": f"{'/'.join(path.parts[len(root.parts) : -1])}/{match[1]}{match[2]}".lower(),
            "view": VIEWS.get(match[3], match[3]),
        }
        if where is not None:
            row["site"] = where.group(1)
        if "label_all_frame" in path.parts:
            row["label"] = int(match[1].lower() == "patient")
        mask = path.with_name(path.name.replace("_image.nii", "_label.nii"))
        if mask.is_file():
            row["mask"] = relative(mask, root)
        yield row
