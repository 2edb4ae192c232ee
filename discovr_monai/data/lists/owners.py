"""Whose a cine is: its patient and study as salted ids."""

from __future__ import annotations

from pathlib import Path

from discovr_monai.base.privacy import salted_id
from discovr_monai.base.types import DatalistRow
from discovr_monai.data.read.dicom import owners_of


def salted_owners(row: DatalistRow, root: Path, identity: str, salt: bytes) -> tuple[str, str]:
    """Salted patient and study of a cine, from its datalist row or else from its DICOM header.

    A file of which neither tells a patient counts as a patient of its own. Without a study, all
    cines of a patient are one study; without a patient too, all cines of a folder are.

    Args:
        row: of a datalist over ``root``.
        root: the data folder.
        identity: the file's own salted id, which stands in where nothing else is known.
        salt: see :func:`discovr_monai.base.privacy.load_salt`.
    """
    path = root / row["image"]
    patient, study = owners_of(path)
    patient = row.get("patient") or patient
    folder = path.parent.relative_to(root)
    place = f"folder {folder}" if folder.parts else f"file {identity}"
    return (
        salted_id(str(patient or f"file {identity}"), salt),
        salted_id(str(row.get("study") or study or patient or place), salt),
    )
