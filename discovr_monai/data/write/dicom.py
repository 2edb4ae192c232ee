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
# Elements of type 2: they must be present and may be empty.
EMPTY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
         "StudyID", "AccessionNumber", "ReferringPhysicianName", "Manufacturer")  # fmt: skip


def salted_uid(value: str, salt: bytes) -> str:
    """A valid UID, the same for the same value and salt.

    >>> salted_uid("study 1", b"salt") == salted_uid("study 1", b"salt")
    True
    """
    digest = hmac.new(salt, value.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()
    return ROOT + str(int.from_bytes(digest[:16], "big"))


def coded(value: str, scheme: str, meaning: str) -> Any:
    """An item of a code sequence."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


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
        spacing: (row, column) mm per pixel, None where it is unknown.
        region: (x0, y0, x1, y1) of the 2-D tissue in pixels, both ends included; all of the frame
            if None.
        uids: "study", "series", "instance"; new ones where missing.
        tags: more elements by keyword.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
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
    for name in EMPTY:
        setattr(dataset, name, "")
    dataset.SeriesNumber = dataset.InstanceNumber = 1
    dataset.BodyPartExamined = "HEART"  # which is no paired part, so there is no Laterality
    dataset.PatientOrientation = None  # unknown: the probe is held by hand
    # Ultrasound must have a frame time; 0 says that there is none (PS3.3 C.7.6.6.1.2).
    dataset.FrameTime = f"{1000 / fps:.6f}"[:16] if fps else "0"
    dataset.FrameIncrementPointer = 0x00181063
    if fps:
        dataset.CineRate = dataset.RecommendedDisplayFrameRate = max(1, round(fps))
    if spacing is not None or region is not None:
        corners = region or (0, 0, frames.shape[2] - 1, frames.shape[1] - 1)
        dataset.SequenceOfUltrasoundRegions = [_region(corners, spacing)]
    _add_pixels(dataset, frames)
    for name, value in (tags or {}).items():
        setattr(dataset, name, value)
    save_atomic(partial(dataset.save_as, enforce_file_format=True), path, durable=False)


def _region(corners: tuple[int, int, int, int], spacing: tuple[float, float] | None) -> Any:
    """The 2-D tissue region, with its scale in cm where it is known."""
    from pydicom.dataset import Dataset

    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
    region.RegionLocationMinX0, region.RegionLocationMinY0 = int(corners[0]), int(corners[1])
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = int(corners[2]), int(corners[3])
    unit, row, column = (0, 1.0, 1.0) if spacing is None else (3, *(v / 10 for v in spacing))
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = unit  # none, or cm
    region.PhysicalDeltaX, region.PhysicalDeltaY = column, row
    return region


def _add_pixels(dataset: Any, frames: np.ndarray) -> None:
    colour = frames.ndim == 4
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape[:3]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.UltrasoundColorDataPresent = int(colour)
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    pixels = np.ascontiguousarray(frames).tobytes()
    dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)


def deidentified_tags(patient: str) -> dict[str, Any]:
    """What a cleaned file says of its cleaning (PS3.15 annex E, PS3.3 C.12.1)."""
    cleaning = (
        ("113100", "Basic Application Confidentiality Profile"),
        ("113101", "Clean Pixel Data Option"),
    )
    return {
        "PatientID": patient,
        "PatientName": patient,
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": f"discovr-monai {__version__}: new file, sector only",
        "DeidentificationMethodCodeSequence": [coded(v, "DCM", text) for v, text in cleaning],
        "BurnedInAnnotation": "NO",
        "LongitudinalTemporalInformationModified": "REMOVED",
    }
