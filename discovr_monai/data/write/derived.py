"""What every DICOM object that we derive from a cine takes from its source, and how it is saved.

Such an object carries the patient and the study of its source, so that an archive files both
together. It is as identifying as the source: keep it beside it, never in anything that is shared.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai import __version__
from discovr_monai.base.files import save_atomic
from discovr_monai.base.types import CineError
from discovr_monai.data.read.dicom import open_dicom
from discovr_monai.data.read.kinds import is_dicom
from discovr_monai.data.write.dicom import ROOT

MAKER = "discovr-monai"
# what an archive recognises a patient and a study by: taken over to the letter
IDENTITY = ("PatientName", "PatientID", "StudyInstanceUID")
# the rest of the two modules that a file must have: left empty where the source breaks the rules
REQUIRED = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
            "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
OPTIONAL = ("StudyDescription", "PatientIdentityRemoved", "DeidentificationMethod",
            "DeidentificationMethodCodeSequence", "LongitudinalTemporalInformationModified",
            "IssuerOfPatientID")  # fmt: skip
LOSSY = ("LossyImageCompressionRatio", "LossyImageCompressionMethod")
OTHERS = ("SpecificCharacterSet", "NumberOfFrames", "Rows", "Columns", "LossyImageCompression",
          "BurnedInAnnotation", "FrameTime", "FrameTimeVector", "CineRate",
          "RecommendedDisplayFrameRate")  # fmt: skip
REFERRED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")


def quiet() -> AbstractContextManager[None]:
    """Keeps pydicom from warning of invalid values: it quotes them, birth dates and all."""
    from pydicom.config import disable_value_validation

    return disable_value_validation()


def open_source(source: Path, name: str, path: Path) -> Any:
    """The source's dataset without its pixels; ``path`` is where its labels will go.

    Raises:
        CineError: no such file, no DICOM, or it would be overwritten.
    """
    if not source.is_file():
        raise CineError(name, "it does not exist", "Check the path and --dataset_dir")
    refuse_overwriting(source, name, path)
    if not is_dicom(source):
        raise CineError(name, "it is not DICOM", "Write its labels as NIfTI", "not a cine")
    try:
        dataset = open_dicom(source, name, pixels=False)
        for keyword in (*REFERRED, *IDENTITY, *REQUIRED, *OPTIONAL, *LOSSY, *OTHERS):
            dataset.get(keyword)  # decodes it
    except CineError:
        raise
    except Exception as error:  # pydicom has many kinds for a damaged element
        raise CineError(
            name,
            f"its header cannot be read ({type(error).__name__})",
            "Export it again from the archive",
        ) from error
    return dataset


def check_labels(labels: np.ndarray, count: int = 255) -> None:
    """Refuses what is not (T, H, W) whole labels of 0 to ``count``.

    Raises:
        ValueError: with the shape, type or value.
    """
    if labels.ndim != 3 or not labels.size or labels.dtype.kind not in "iub":
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}, not (T, H, W) uint8")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > count:
        raise ValueError(f"labels run from {low} to {high}, but must be 0 to {count}")


def other_size(name: str, size: Sequence[int], labels: np.ndarray) -> CineError:
    """For a source of (T, H, W) ``size``."""
    return CineError(
        name,
        f"it has {size[0]} frames of {size[1]} x {size[2]}, the labels "
        f"{labels.shape[0]} of {labels.shape[1]} x {labels.shape[2]}",
        "Bring them to the file's own frames with full_frame_labels",
    )


def refuse_empty(labels: np.ndarray, name: str) -> None:
    """Refuses labels of background only, since DICOM has no image without frames."""
    if not labels.any():
        raise CineError(
            name, "no structure was found in any of its frames", "There is nothing to write"
        )


def refuse_overwriting(source: Path, name: str, path: Path) -> None:
    """Keeps a cine from being replaced by its own labels."""
    if path.exists() and path.samefile(source):
        raise CineError(name, "its labels would overwrite it", "Write them to another file")


def is_uid(value: Any) -> bool:
    parts = str(value).split(".")
    return len(str(value)) <= 64 and len(parts) > 1 and all(
        part.isascii() and part.isdigit() for part in parts
    )  # fmt: skip


def new_uid(*seed: str | bytes) -> str:
    """A UID that is the same whenever ``seed`` is."""
    digest = hashlib.sha256()
    for part in seed:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return ROOT + str(uuid.UUID(bytes=digest.digest()[:16], version=5).int)


def clean_text(value: str) -> str:
    """At most 64 characters that a short text of DICOM can hold in any character set.

    >>> clean_text("Übersicht 4\\\\Kammer")
    '_bersicht 4_Kammer'
    """
    fits = (c if c.isascii() and c.isprintable() and c != "\\" else "_" for c in value)
    kept = "".join(fits)[:64].strip()
    if not kept:
        raise ValueError(f"{value!r} names no model or structure: give it a name")
    return kept


def new_dataset(source: Any, modality: str, sop_class: str, seed: Sequence[str | bytes]) -> Any:
    """A dataset with the modules that all of ours have: patient, study, series, equipment, SOP.

    Args:
        source: the cine's dataset, of which patient and study are taken over.
        modality: such as "SEG".
        sop_class: UID of the kind of object.
        seed: what its UIDs follow from.
    """
    from pydicom.dataset import Dataset

    dataset = Dataset()
    if source.get("SpecificCharacterSet"):
        dataset.SpecificCharacterSet = source.SpecificCharacterSet  # names keep their bytes
    lossy = source.get("LossyImageCompression") == "01"  # of the pixels that it was made from
    dataset.LossyImageCompression = "01" if lossy else "00"
    for keyword in (*IDENTITY, *REQUIRED, *OPTIONAL, *(LOSSY if lossy else ())):
        _copy(dataset, source, keyword)
    if not is_uid(dataset.StudyInstanceUID):
        dataset.StudyInstanceUID = new_uid("study", *seed)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, new_uid("instance", *seed)
    dataset.SeriesInstanceUID = new_uid("series", *seed)  # viewers show one of these per series
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = modality, 9000, 1
    dataset.Manufacturer = dataset.ManufacturerModelName = MAKER
    dataset.SoftwareVersions = __version__
    now = datetime.now()
    dataset.ContentDate, dataset.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset.PatientOrientation = None  # unknown: the probe is held by hand
    dataset.BodyPartExamined = "HEART"  # which is no paired part, so there is no Laterality
    return dataset


def _copy(dataset: Any, source: Any, keyword: str) -> None:
    """Takes an element over; one that must be there is empty where it is missing or invalid."""
    from pydicom import config
    from pydicom.datadict import dictionary_VM, dictionary_VR
    from pydicom.valuerep import validate_value

    if keyword in (*IDENTITY, *REQUIRED):
        setattr(dataset, keyword, None)
    vr, element = dictionary_VR(keyword), source.get(keyword) and source[keyword]
    if not element or (element.VR == "SQ") != (vr == "SQ") or isinstance(element.value, bytes):
        return
    if vr == "SQ":
        setattr(dataset, keyword, element.value)
        return
    values = [str(value) for value in (element.value if element.VM > 1 else [element.value])]
    try:
        for value in values:
            validate_value(vr, value, config.RAISE)
        valid = "".join(values).isprintable() and dictionary_VM(keyword) in ("1-n", str(element.VM))
    except ValueError:
        valid = False
    if valid or keyword in IDENTITY:
        setattr(dataset, keyword, element.value if keyword in IDENTITY else values)


def save_dataset(dataset: Any, pixels: bytes, path: Path) -> None:
    """Writes a dataset and its pixels as an uncompressed DICOM file, whole or not at all."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta = meta
    dataset.add_new("PixelData", "OB", pixels + b"\0" * (len(pixels) % 2))
    save_atomic(partial(dataset.save_as, enforce_file_format=True), path)
