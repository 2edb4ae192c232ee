"""Label maps of a DICOM cine as a DICOM Segmentation of its frames.

It is as identifying as its source; see :mod:`discovr_monai.data.write.derived`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import CineError
from discovr_monai.data.read.dicom import whole_number
from discovr_monai.data.write.derived import (
    MAKER,
    REFERRED,
    check_labels,
    clean_text,
    is_uid,
    new_dataset,
    new_uid,
    open_source,
    other_size,
    quiet,
    refuse_empty,
    save_dataset,
)
from discovr_monai.data.write.dicom import coded

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
        if not is_uid(value):
            return f"its {keyword} is not a UID"
    if dataset.SOPClassUID in STILLS and whole_number(dataset.get("NumberOfFrames")) > 1:
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
        cine = open_source(source, name, path)
        if why := obstacle(cine):
            raise CineError(
                name,
                f"{why}, so no segmentation can refer to it",
                "Use write_dicom_labels, which draws the outlines instead",
            )
        frames = whole_number(cine.get("NumberOfFrames", 1))
        size = (frames, whole_number(cine.get("Rows")), whole_number(cine.get("Columns")))
        if size != labels.shape:
            raise other_size(name, size, labels)
        refuse_empty(labels, name)
        stored = [
            (number, int(t))
            for number in range(1, len(structures) + 1)
            for t in np.flatnonzero((labels == number).any((1, 2)))
        ]
        dataset = _describe(cine, labels, structures, model)
        for segment in dataset.SegmentSequence if corrected else ():
            segment.SegmentAlgorithmType = "SEMIAUTOMATIC"
        _add_frames(dataset, cine, stored, frames)
        save_dataset(dataset, _pack(labels, stored), path)


def _pack(labels: np.ndarray, stored: Sequence[tuple[int, int]]) -> bytes:
    """One bit per pixel, without padding between frames: any eight of them fill whole bytes."""
    eights = (stored[i : i + 8] for i in range(0, len(stored), 8))
    packed = [
        np.packbits([labels[t] == number for number, t in some], bitorder="little").tobytes()
        for some in eights
    ]
    return b"".join(packed)


def _describe(cine: Any, labels: np.ndarray, structures: Sequence[str], model: str) -> Any:
    """A Segmentation but for its frames."""
    seed = (cine.SOPInstanceUID, model, *structures, str(labels.shape),
            labels.astype(np.uint8).tobytes())  # fmt: skip
    dataset = new_dataset(cine, "SEG", "1.2.840.10008.5.1.4.1.1.66.4", seed)
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
    algorithm.AlgorithmFamilyCodeSequence = [coded("123110", "DCM", "Artificial Intelligence")]
    algorithm.AlgorithmName, algorithm.AlgorithmVersion = MAKER, clean_text(model)
    item.SegmentationAlgorithmIdentificationSequence = [algorithm]
    item.SegmentedPropertyCategoryCodeSequence = [coded(*ANATOMY)]
    snomed = CODES.get(structure)
    kind = (snomed[0], "SCT", snomed[1]) if snomed else ANATOMY
    item.SegmentedPropertyTypeCodeSequence = [coded(*kind)]
    return item


def _add_frames(dataset: Any, cine: Any, stored: Sequence[tuple[int, int]], frames: int) -> None:
    """Adds the functional groups, dimensions and references that say what each frame shows.

    Args:
        dataset: to be filled.
        cine: the source's dataset.
        stored: (segment number, index of the source's frame) of each frame, in order.
        frames: how many the source has.
    """
    from pydicom.dataset import Dataset

    def reference() -> Any:
        item = Dataset()
        item.ReferencedSOPClassUID = cine.SOPClassUID
        item.ReferencedSOPInstanceUID = cine.SOPInstanceUID
        return item

    _add_dimensions(dataset)
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
        purpose = coded("121322", "DCM", "Source image for image processing operation")
        origin.PurposeOfReferenceCodeSequence = [purpose]
        origin.SpatialLocationsPreserved = "YES"
        derivation.DerivationCodeSequence = [coded("113076", "DCM", "Segmentation")]
        derivation.SourceImageSequence = [origin]
        segment.ReferencedSegmentNumber = number
        item.FrameContentSequence, item.DerivationImageSequence = [content], [derivation]
        item.SegmentIdentificationSequence = [segment]
        dataset.PerFrameFunctionalGroupsSequence.append(item)
    dataset.SharedFunctionalGroupsSequence = [Dataset()]
    dataset.NumberOfFrames = len(stored)
    series = Dataset()
    series.SeriesInstanceUID = cine.SeriesInstanceUID
    series.ReferencedInstanceSequence = [reference()]
    dataset.ReferencedSeriesSequence = [series]


def _add_dimensions(dataset: Any) -> None:
    """Says that frames are sorted by segment, then by time."""
    from pydicom.dataset import Dataset

    organisation = Dataset()
    organisation.DimensionOrganizationUID = new_uid("dimensions", dataset.SOPInstanceUID)
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
