"""Multi-frame ultrasound DICOM without a trace of the patient."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai import __version__
from discovr_monai.base.files import save_atomic

ROOT = "2.25."  # UIDs made of random 128-bit numbers


def salted_uid(value: str, salt: bytes) -> str:
    """A valid UID, the same for the same value and salt."""
    digest = hmac.new(salt, value.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()
    return ROOT + str(int.from_bytes(digest[:16], "big"))


def write_dicom(
    path: Path,
    frames: np.ndarray,
    *,
    fps: float | None = None,
    spacing: tuple[float, float] | None = None,
    region: tuple[int, int, int, int] | None = None,
    uids: Mapping[str, str] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> None:
    """Writes an uncompressed Ultrasound Multi-frame Image, built from nothing but what is given.

    Args:
        path: written under a temporary name and renamed.
        frames: (T, H, W) or (T, H, W, 3) uint8.
        fps: frames per second; None: unknown, or a still.
        spacing: (row, column) mm; region: (x0, y0, x1, y1) of the 2-D tissue, inclusive.
        uids: "study", "series", "instance"; new ones where missing.
        tags: more elements by keyword.
    """
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence
    from pydicom.uid import (
        UID,
        ExplicitVRLittleEndian,
        UltrasoundMultiFrameImageStorage,
        generate_uid,
    )

    uids = uids or {}
    instance = UID(uids.get("instance") or generate_uid(None))
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = instance
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = UltrasoundMultiFrameImageStorage, instance
    dataset.StudyInstanceUID = uids.get("study") or generate_uid(None)
    dataset.SeriesInstanceUID = uids.get("series") or generate_uid(None)
    dataset.Modality, dataset.ImageType = "US", ["DERIVED", "PRIMARY"]
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate",
                 "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName",
                 "Manufacturer"):  # fmt: skip
        setattr(dataset, name, "")  # type 2: present, empty
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.BodyPartExamined = "HEART"  # which is no paired part, so there is no Laterality
    dataset.PatientOrientation = None  # unknown: the probe is held by hand
    colour = frames.ndim == 4
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape[:3]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.UltrasoundColorDataPresent = int(colour)
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    # ultrasound must have one; 0 says that there is none (PS3.3 C.7.6.6.1.2)
    dataset.FrameTime = f"{1000 / fps:.6f}"[:16] if fps else "0"
    dataset.FrameIncrementPointer = 0x00181063
    if fps:
        dataset.CineRate = dataset.RecommendedDisplayFrameRate = max(1, round(fps))
    if spacing is not None or region is not None:
        item = Dataset()
        x0, y0, x1, y1 = region or (0, 0, frames.shape[2] - 1, frames.shape[1] - 1)
        item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = 1, 1, 0
        item.RegionLocationMinX0, item.RegionLocationMinY0 = int(x0), int(y0)
        item.RegionLocationMaxX1, item.RegionLocationMaxY1 = int(x1), int(y1)
        unit, row, column = (0, 1.0, 1.0) if spacing is None else (3, *(v / 10 for v in spacing))
        item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = unit  # none, or cm
        item.PhysicalDeltaX, item.PhysicalDeltaY = column, row
        dataset.SequenceOfUltrasoundRegions = Sequence([item])
    for name, value in (tags or {}).items():
        setattr(dataset, name, value)
    pixels = np.ascontiguousarray(frames).tobytes()
    dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
    save_atomic(partial(dataset.save_as, enforce_file_format=True), path, durable=False)


def deidentified_tags(patient: str) -> dict[str, Any]:
    """What a cleaned file says of its cleaning (PS3.15 annex E, PS3.3 C.12.1)."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    codes = []
    for value, meaning in (
        ("113100", "Basic Application Confidentiality Profile"),
        ("113101", "Clean Pixel Data Option"),
    ):
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
        codes.append(code)
    return {
        "PatientID": patient,
        "PatientName": patient,
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": f"discovr-monai {__version__}: new file, sector only",
        "DeidentificationMethodCodeSequence": Sequence(codes),
        "BurnedInAnnotation": "NO",
        "LongitudinalTemporalInformationModified": "REMOVED",
    }
