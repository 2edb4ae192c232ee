"""Label maps of a DICOM cine as a DICOM Segmentation of its frames.

It carries the patient and the study of its source, so that an archive files it with it. It is as
identifying as the source: keep it beside it, never in anything that is shared.
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
from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import CineError
from discovr_monai.data.read.dicom import open_dicom
from discovr_monai.data.read.kinds import is_dicom
from discovr_monai.data.write.dicom import ROOT

MAKER = "discovr-monai"
# SNOMED CT by the names that heads give their structures (meanings as in PS3.16, CID 7151 and
# 12305). SNOMED's left ventricle is what is used for its cavity: PS3.16 has no code of that.
CODES = {
    "lv_cavity": ("87878005", "Left ventricle"),
    "left_ventricle": ("87878005", "Left ventricle"),
    "myocardium": ("49848007", "Left Ventricle Myocardium"),
    "lv_myocardium": ("49848007", "Left Ventricle Myocardium"),
    "left_atrium": ("82471001", "Left atrium"),
    "right_ventricle": ("53085002", "Right ventricle"),
    "right_atrium": ("73829009", "Right atrium"),
}
ANATOMY = ("91723000", "SCT", "Anatomical Structure")
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

# Ultrasound Image, today's and the retired one; Secondary Capture
STILLS = ("1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.6", "1.2.840.10008.5.1.4.1.1.7")


def obstacle(dataset: Any) -> str:
    """Why no Segmentation can refer to a source; "" if nothing stands against it.

    A Segmentation names its source's SOP Class, SOP Instance and Series (Common Instance
    Reference, PS3.3 C.12.2), shares its Study, and counts the frames of a class that has frames.
    Leading zeros, which some scanners write against the rules, are no obstacle: the source is
    called so.
    """
    for keyword in REFERRED:
        value = dataset.get(keyword)
        if not value:
            return f"it has no {keyword}"
        if not _is_uid(value):
            return f"its {keyword} is not a UID"
    if dataset.SOPClassUID in STILLS and _whole(dataset.get("NumberOfFrames")) > 1:
        return "its SOPClassUID is that of stills, whose frames have no numbers"
    return ""


def write_dicom_segmentation(
    path: Path,
    labels: np.ndarray,
    structures: Sequence[str],
    source: Path,
    model: str,
    *,
    name: str | None = None,
    corrected: bool = False,
) -> None:
    """Writes a BINARY DICOM Segmentation of a cine, one segment per structure.

    Ultrasound has no Frame of Reference, and a Segmentation needs none where each of its frames
    names the frame that it was derived from, on the same pixel grid (PS3.3 A.51.3, A.51.5.1).
    So every frame has a Derivation Image and no plane is invented. Frames of a structure that are
    empty are not stored. The UIDs follow from source, model, structures and labels: writing again
    replaces in an archive what was there.

    The file is as identifying as its source: keep it beside it.

    Args:
        path: written under a temporary name and renamed.
        labels: (T, H, W) 0 background, k for structures[k - 1], at the source's own size.
        structures: names of labels 1, 2, ...; see ``CODES`` for those that have a SNOMED code of
            their own, others are an anatomical structure by that label.
        source: the cine's DICOM file.
        model: a hash or name of what made the labels.
        name: what errors call the source; its file name if None.
        corrected: a person drew or corrected them: SEMIAUTOMATIC, else AUTOMATIC.

    Raises:
        CineError: no DICOM, nothing to refer to (:func:`obstacle`), another size, or no label
            in any frame.
        ValueError: labels or structures that are none.
    """
    name = name or source.name
    check_labels(labels, len(structures))
    with quiet():
        found = open_source(source, name, path)
        if why := obstacle(found):
            raise CineError(
                name,
                f"{why}, so no segmentation can refer to it",
                "Use write_dicom_labels, which draws the outlines instead",
            )
        frames = _whole(found.get("NumberOfFrames", 1))
        size = (frames, _whole(found.get("Rows")), _whole(found.get("Columns")))
        if size != labels.shape:
            raise other_size(name, size, labels)
        refuse_empty(labels, name)
        stored = [
            (number, int(t))
            for number in range(1, len(structures) + 1)
            for t in np.flatnonzero((labels == number).any((1, 2)))
        ]
        dataset = _describe(found, labels, structures, model)
        for segment in dataset.SegmentSequence if corrected else ():
            segment.SegmentAlgorithmType = "SEMIAUTOMATIC"
        _add_frames(dataset, found, stored, frames)
        # one bit per pixel and no padding between frames: any eight of them fill whole bytes
        eights = (stored[i : i + 8] for i in range(0, len(stored), 8))
        packed = [
            np.packbits([labels[t] == number for number, t in some], bitorder="little").tobytes()
            for some in eights
        ]
        save_dataset(dataset, b"".join(packed), path)


# ---- parts -------------------------------------------------------------------------------


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


def refuse_overwriting(source: Path, name: str, path: Path) -> None:
    """Keeps a cine from being replaced by its own labels."""
    if path.exists() and path.samefile(source):
        raise CineError(name, "its labels would overwrite it", "Write them to another file")


def _whole(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 0


def _is_uid(value: Any) -> bool:
    parts = str(value).split(".")
    return len(str(value)) <= 64 and len(parts) > 1 and all(
        part.isascii() and part.isdigit() for part in parts
    )  # fmt: skip


def _uid(*seed: str | bytes) -> str:
    """A UID that follows from what it is of."""
    digest = hashlib.sha256()
    for part in seed:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return ROOT + str(uuid.UUID(bytes=digest.digest()[:16], version=5).int)


def clean_text(value: str) -> str:
    """What DICOM's short texts can hold of it, whatever the source's character set."""
    fits = (c if c.isascii() and c.isprintable() and c != "\\" else "_" for c in value)
    kept = "".join(fits)[:64].strip()
    if not kept:
        raise ValueError(f"{value!r} names no model or structure: give it a name")
    return kept


def other_size(name: str, size: Sequence[int], labels: np.ndarray) -> CineError:
    """For a source of (T, H, W) ``size``."""
    return CineError(
        name,
        f"it has {size[0]} frames of {size[1]} x {size[2]}, the labels "
        f"{labels.shape[0]} of {labels.shape[1]} x {labels.shape[2]}",
        "Bring them to the file's own frames with full_frame_labels",
    )


def refuse_empty(labels: np.ndarray, name: str) -> None:
    """DICOM has no image without frames."""
    if not labels.any():
        raise CineError(
            name, "no structure was found in any of its frames", "There is nothing to write"
        )


def _code(value: str, scheme: str, meaning: str) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def new_dataset(found: Any, modality: str, sop_class: str, seed: Sequence[str | bytes]) -> Any:
    """A dataset with the modules that all of ours have: patient, study, series, equipment, SOP."""
    from pydicom.dataset import Dataset

    dataset = Dataset()
    if found.get("SpecificCharacterSet"):
        dataset.SpecificCharacterSet = found.SpecificCharacterSet  # names keep their bytes
    lossy = found.get("LossyImageCompression") == "01"  # of the pixels that it was made from
    dataset.LossyImageCompression = "01" if lossy else "00"
    for keyword in (*IDENTITY, *REQUIRED, *OPTIONAL, *(LOSSY if lossy else ())):
        _copy(dataset, found, keyword)
    if not _is_uid(dataset.StudyInstanceUID):
        dataset.StudyInstanceUID = _uid("study", *seed)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, _uid("instance", *seed)
    dataset.SeriesInstanceUID = _uid("series", *seed)  # viewers show one of these per series
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = modality, 9000, 1
    dataset.Manufacturer = dataset.ManufacturerModelName = MAKER
    dataset.SoftwareVersions = __version__
    now = datetime.now()
    dataset.ContentDate, dataset.ContentTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    dataset.PatientOrientation = None  # unknown: the probe is held by hand
    dataset.BodyPartExamined = "HEART"  # which is no paired part, so there is no Laterality
    return dataset


def _copy(dataset: Any, found: Any, keyword: str) -> None:
    """Takes an element over; one that must be there is empty where it is missing or invalid."""
    from pydicom import config
    from pydicom.datadict import dictionary_VM, dictionary_VR
    from pydicom.valuerep import validate_value

    if keyword in (*IDENTITY, *REQUIRED):
        setattr(dataset, keyword, None)
    vr, element = dictionary_VR(keyword), found.get(keyword) and found[keyword]
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


def _describe(found: Any, labels: np.ndarray, structures: Sequence[str], model: str) -> Any:
    """A Segmentation but for its frames."""
    seed = (found.SOPInstanceUID, model, *structures, str(labels.shape),
            labels.astype(np.uint8).tobytes())  # fmt: skip
    dataset = new_dataset(found, "SEG", "1.2.840.10008.5.1.4.1.1.66.4", seed)
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.SeriesDescription = dataset.ContentDescription = NOTICE
    dataset.ContentLabel, dataset.ContentCreatorName = "SEGMENTATION", None
    dataset.DeviceSerialNumber = clean_text(model)  # must not be empty
    dataset.SegmentationType, dataset.SegmentsOverlap = "BINARY", "NO"
    dataset.SegmentSequence = [
        _segment(number, structure, model) for number, structure in enumerate(structures, 1)
    ]
    dataset.Rows, dataset.Columns = labels.shape[1:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = dataset.PixelRepresentation = 0
    return dataset


def _segment(number: int, structure: str, model: str) -> Any:
    from pydicom.dataset import Dataset

    item, algorithm = Dataset(), Dataset()
    item.SegmentNumber, item.SegmentLabel = number, clean_text(structure.replace("_", " "))
    item.SegmentAlgorithmType = "AUTOMATIC"
    item.SegmentAlgorithmName = clean_text(f"{MAKER} {model}")
    algorithm.AlgorithmFamilyCodeSequence = [_code("123110", "DCM", "Artificial Intelligence")]
    algorithm.AlgorithmName, algorithm.AlgorithmVersion = MAKER, clean_text(model)
    item.SegmentationAlgorithmIdentificationSequence = [algorithm]
    item.SegmentedPropertyCategoryCodeSequence = [_code(*ANATOMY)]
    known = CODES.get(structure)
    kind = (known[0], "SCT", known[1]) if known else ANATOMY
    item.SegmentedPropertyTypeCodeSequence = [_code(*kind)]
    return item


def _add_frames(dataset: Any, found: Any, stored: Sequence[tuple[int, int]], frames: int) -> None:
    """Says of each stored (segment, t) what it is of: functional groups, dimensions, references.

    Args:
        dataset: to be filled.
        found: the source.
        stored: segment numbers and the source's frames counted from 0.
        frames: how many the source has.
    """
    from pydicom.dataset import Dataset

    def reference() -> Any:
        item = Dataset()
        item.ReferencedSOPClassUID = found.SOPClassUID
        item.ReferencedSOPInstanceUID = found.SOPInstanceUID
        return item

    organisation, series = Dataset(), Dataset()
    organisation.DimensionOrganizationUID = _uid("dimensions", dataset.SOPInstanceUID)
    dataset.DimensionOrganizationSequence = [organisation]
    dataset.DimensionIndexSequence = []
    for group, pointer, label in (
        (0x0062000A, 0x0062000B, "Segment"),  # Segment Identification, Referenced Segment Number
        (0x00209111, 0x00209128, "Time"),  # Frame Content, Temporal Position Index
    ):
        index = Dataset()
        index.DimensionOrganizationUID = organisation.DimensionOrganizationUID
        index.FunctionalGroupPointer, index.DimensionIndexPointer = group, pointer
        index.DimensionDescriptionLabel = label
        dataset.DimensionIndexSequence.append(index)
    places = {t: i for i, t in enumerate(sorted({t for _, t in stored}), 1)}  # without gaps
    segments = {n: i for i, n in enumerate(sorted({n for n, _ in stored}), 1)}
    dataset.PerFrameFunctionalGroupsSequence = []
    for number, t in stored:
        item, content, derivation, segment = Dataset(), Dataset(), Dataset(), Dataset()
        content.TemporalPositionIndex = places[t]
        content.DimensionIndexValues = [segments[number], places[t]]
        origin = reference()
        if frames > 1:  # a still is referred to as a whole
            origin.ReferencedFrameNumber = t + 1
        purpose = _code("121322", "DCM", "Source image for image processing operation")
        origin.PurposeOfReferenceCodeSequence = [purpose]
        origin.SpatialLocationsPreserved = "YES"
        derivation.DerivationCodeSequence = [_code("113076", "DCM", "Segmentation")]
        derivation.SourceImageSequence = [origin]
        segment.ReferencedSegmentNumber = number
        item.FrameContentSequence, item.DerivationImageSequence = [content], [derivation]
        item.SegmentIdentificationSequence = [segment]
        dataset.PerFrameFunctionalGroupsSequence.append(item)
    dataset.SharedFunctionalGroupsSequence = [Dataset()]
    dataset.NumberOfFrames = len(stored)
    series.SeriesInstanceUID = found.SeriesInstanceUID
    series.ReferencedInstanceSequence = [reference()]
    dataset.ReferencedSeriesSequence = [series]


def save_dataset(dataset: Any, pixels: bytes, path: Path) -> None:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta = meta
    dataset.add_new("PixelData", "OB", pixels + b"\0" * (len(pixels) % 2))
    save_atomic(partial(dataset.save_as, enforce_file_format=True), path)
