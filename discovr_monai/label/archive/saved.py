"""Saved label maps, as tasks and scorings read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore

from discovr_monai.data.read.masks import read_masks
from discovr_monai.label.archive.identifiers import check_tag

SUFFIX = ".nii.gz"
FINAL = "final"  # what annotators submit
PROPOSED = "original"  # what a model's inference saves


def identity_of(image: str | Path) -> str:
    """WORK/ID.nii.gz -> ID."""
    return Path(image).name.removesuffix(SUFFIX)


def saved_labels(image: Path, tag: str, shape: tuple[int, int, int]) -> np.ndarray | None:
    """(T, H, W) labels saved for an image of the datastore, None where there are none."""
    name = f"labels/{check_tag(tag)}/{image.name}"
    return read_masks(image.parent, name, shape) if (image.parent / name).is_file() else None


def labels_of(datastore: Datastore, identity: str, tag: str) -> np.ndarray:
    """(T, H, W) labels of a cine.

    Raises:
        ValueError: if it has none of this tag.
    """
    import nibabel

    image = Path(datastore.get_image_uri(identity))
    loaded: Any = nibabel.load(image)
    columns, rows, frames = loaded.shape
    found = saved_labels(image, tag, (frames, rows, columns))
    if found is None:
        raise ValueError(f"{identity} has no label {tag!r}")
    return found
