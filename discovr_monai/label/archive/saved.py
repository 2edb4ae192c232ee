"""The label maps that are saved beside the presented cines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from discovr_monai.data.read.masks import read_masks
from discovr_monai.label.archive.identifiers import check_tag

if TYPE_CHECKING:
    from monailabel.interfaces.datastore import Datastore

SUFFIX = ".nii.gz"
FINAL = "final"  # the tag of what annotators submit
PROPOSED = "original"  # the tag of what a model's inference saves


def identity_of(image: str | Path) -> str:
    """The id of a presented cine's file.

    >>> identity_of("work/0a1b2c.nii.gz")
    '0a1b2c'
    """
    return Path(image).name.removesuffix(SUFFIX)


def saved_labels(image: Path, tag: str, shape: tuple[int, int, int]) -> np.ndarray | None:
    """(T, H, W) labels saved for the file of a presented cine of this shape, None if none are."""
    name = f"labels/{check_tag(tag)}/{image.name}"
    return read_masks(image.parent, name, shape) if (image.parent / name).is_file() else None


def datastore_labels(datastore: Datastore, identity: str, tag: str) -> np.ndarray:
    """(T, H, W) labels of a cine of a datastore.

    Raises:
        ValueError: it has none of this tag.
    """
    import nibabel

    image = Path(datastore.get_image_uri(identity))
    loaded: Any = nibabel.load(image)
    columns, rows, frames = loaded.shape
    labels = saved_labels(image, tag, (frames, rows, columns))
    if labels is None:
        raise ValueError(f"{identity} has no label {tag!r}")
    return labels
