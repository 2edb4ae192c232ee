"""A plain folder of cines: every file that a reader knows, nothing about its labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.read.dicom import patient_of
from discovr_monai.data.read.kinds import known_name, walk

TITLE = "a folder of cines"
LICENCE = "yours"
SOURCE = "yours"


def rows(root: Path, *, patient_from: str = "file") -> Iterator[DatalistRow | CineError]:
    """A row per file that looks like a cine by its name (or has none, as DICOM often).

    Args:
        root: any folder.
        patient_from: "folder" takes the first folder's name as the patient, "file" the
            DICOM's PatientID, else each file by itself.

    Raises:
        ValueError: for another ``patient_from``, or an empty folder.
    """
    if patient_from not in ("file", "folder"):
        raise ValueError(f"patient_from {patient_from!r} must be 'file' or 'folder'")
    names = sorted(walk(root))
    if not names:
        raise ValueError(f"{root.name!r} is empty")
    for name in names:
        if not known_name(name):
            yield CineError(name, "its name is of no cine", "Convert it", "not a cine")
            continue
        first, slash, _ = name.partition("/")
        if patient_from == "folder" and slash:
            patient = first
        else:
            patient = patient_of(root / name) or f"file {name}"
        yield {"image": name, "patient": patient}
