"""MIMIC-IV-ECHO: half a million hospital DICOM, and the labelled subset LVVol-A4C."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from discovr_monai.base.tables import number, read_table
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.adapters.layout import missing, percent, relative

TITLE = "MIMIC-IV-ECHO"
LICENCE = "PhysioNet Credentialed Health Data License 1.5.0: not to be redistributed"
SOURCE = "https://physionet.org/content/mimic-iv-echo (and mimic-iv-echo-ext-lvvol-a4c)"
MASKS = (".nii.gz", ".npz", ".npy")


def rows(root: Path, *, threshold: float = 50.0) -> Iterator[DatalistRow | CineError]:
    """All records for pretraining, the labelled subset's rows where it lies below ``root`` too.

    Records (echo-record-list.csv) have neither view nor label and go to "pretraining" unless
    their patient is in the labelled subset's validation or test part. Rows of the subset's
    FileList.csv carry EF and volumes; they are split by patient.

    Args:
        root: a folder with either set or both.
        threshold: EF in percent below which a heart is labelled abnormal.

    Raises:
        FileNotFoundError: if neither table exists.
    """
    records = sorted(root.rglob("echo-record-list.csv"))
    labelled = [p for p in sorted(root.rglob("FileList.csv")) if _is_lvvol(p)]
    if not records and not labelled:
        raise FileNotFoundError(
            f"{root.name!r} does not look like MIMIC-IV-ECHO: there is neither "
            "echo-record-list.csv nor LVVol-A4C's FileList.csv in it"
        )
    for table in labelled:
        yield from _labelled(root, table, threshold)
    for table in records:
        for item in read_table(table, ("subject_id", "study_id", "dicom_filepath")):
            path = table.parent / item["dicom_filepath"]
            if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
                yield missing(item["dicom_filepath"])
                continue
            yield {
                "image": relative(path, root),
                "patient": item["subject_id"],
                "study": item["study_id"],
                "split": "pretraining",
            }


def _is_lvvol(table: Path) -> bool:
    with table.open(encoding="latin-1") as file:
        return "LVEF_A4C" in file.readline()


def _labelled(root: Path, table: Path, threshold: float) -> Iterator[DatalistRow | CineError]:
    for item in read_table(table, ("study_id", "patient_id", "LVEF_A4C")):
        study = item["study_id"]
        path = table.parent / "dicom" / f"{study}.dcm"
        if not path.is_file():
            yield missing(f"dicom/{study}.dcm")
            continue
        row: DatalistRow = {
            "image": relative(path, root),
            "patient": item["patient_id"],
            "study": study,
            "view": "A4C",
        }
        if (ef := percent(number(item["LVEF_A4C"]))) is not None:
            row["ef"], row["label"] = ef, int(ef < threshold)
        for ours, theirs in (("edv", "LVEDV_A4C"), ("esv", "LVESV_A4C")):
            if (volume := number(item.get(theirs))) is not None:
                row[ours] = volume  # type: ignore[literal-required]
        if fps := number(item.get("frame_rate")):
            row["fps"], row["fps_source"] = fps, table.name
        masks = (table.parent / "masks" / f"{study}{suffix}" for suffix in MASKS)
        if (mask := next((m for m in masks if m.is_file()), None)) is not None:
            row["mask"] = relative(mask, root)
        yield row
