"""Whose a cine is: patient and study, salted, and splits that keep patients apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from discovr_monai.base.privacy import salted_id
from discovr_monai.base.types import DatalistRow
from discovr_monai.data.read.dicom import owners_of


def split_by_patient(
    rows: Sequence[DatalistRow], val_fraction: float, seed: int
) -> dict[str, list[DatalistRow]]:
    """Training and validation rows without a patient in both; all train if there is one only."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction} must lie in [0, 1)")
    order = {p: salted_id(p, str(seed).encode()) for p in {r["patient"] for r in rows}}
    patients = sorted(order, key=lambda p: order[p])
    held = set(patients[: round(len(patients) * val_fraction)])
    return {
        "training": [r for r in rows if r["patient"] not in held],
        "validation": [r for r in rows if r["patient"] in held],
    }


def salted_owners(row: DatalistRow, root: Path, identity: str, salt: bytes) -> tuple[str, str]:
    """Salted patient and study of a cine: the datalist's, else its DICOM header's.

    Without either, a file is a patient of its own, and a study is a patient's, or a folder's.

    Args:
        identity: of the file, for one that is alone.
    """
    path = root / row["image"]
    patient, study = owners_of(path)
    owner = row.get("patient") or patient
    folder = path.parent.relative_to(root)
    there = f"folder {folder}" if folder.parts else f"file {identity}"
    return (
        salted_id(str(owner or f"file {identity}"), salt),
        salted_id(str(row.get("study") or study or owner or there), salt),
    )
