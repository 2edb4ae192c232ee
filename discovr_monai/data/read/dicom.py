"""Multi-frame ultrasound DICOM to cines, without a tag of the patient."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.types import Cine, CineError
from discovr_monai.data.read.kinds import is_dicom
from discovr_monai.data.read.pixels import check_size, choose_colour, plausible_fps

CODECS = "pip install pylibjpeg pylibjpeg-openjpeg pyjpegls"


def read_dicom(path: Path, name: str, color: str) -> Cine:
    """Reads one file; see :func:`discovr_monai.data.read.cine.read_cine`."""
    import pydicom

    dataset = open_dicom(path, name)
    _check_is_cine(dataset, name)
    _check_content(dataset, name)
    sizes = [whole_number(dataset.get(k)) for k in ("NumberOfFrames", "Rows", "Columns")]
    samples = whole_number(dataset.get("SamplesPerPixel")) or 1
    check_size(
        path, name, (*sizes, samples, (whole_number(dataset.get("BitsAllocated")) or 8) // 8)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # pydicom only warns of missing frames
        try:
            pixels = _pixels(dataset)
        except (pydicom.errors.InvalidDicomError, RuntimeError, NotImplementedError) as error:
            raise _decoding_error(name, error) from error
        except Exception as error:  # truncated data fails in many ways
            raise _truncated(name, dataset) from error
    claimed = sizes[0]
    if len(pixels) != claimed:
        raise CineError(
            name,
            f"it claims {claimed} frames but holds {len(pixels)}",
            "Export it again from the archive",
        )
    if pixels.ndim == 4:
        pixels = choose_colour(pixels, color)
    elif color == "rgb":
        pixels = pixels[..., None].repeat(3, -1)
    fps, source = frame_rate(dataset)
    return Cine(
        np.ascontiguousarray(pixels),
        fps,
        source,
        _spacing(dataset),
        region=tissue_region(dataset)[0],
        from_dicom=True,
    )


def open_dicom(path: Path, name: str, *, pixels: bool = True) -> Any:
    """The dataset, or a CineError."""
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, stop_before_pixels=not pixels)
            if "SOPClassUID" not in dataset and "Rows" not in dataset:
                raise ValueError("no image")
    except MemoryError:
        raise
    except Exception as error:  # a header that is cut short fails in many ways
        raise CineError(
            name, "it is not valid DICOM (damaged or cut short)", "Export it again from the archive"
        ) from error
    return dataset


def frame_rate(dataset: Any) -> tuple[float | None, str]:
    """fps and its source: FrameTime, FrameTimeVector, CineRate, RecommendedDisplayFrameRate."""
    if (fps := plausible_fps(_inverse(dataset.get("FrameTime")))) is not None:
        return fps, "FrameTime"
    vector = dataset.get("FrameTimeVector")
    if vector is not None and not isinstance(vector, (str, float, int)) and len(vector) > 1:
        mean = float(np.mean([float(v) for v in vector[1:]]))  # the first is 0 by definition
        if (fps := plausible_fps(_inverse(mean))) is not None:
            return fps, "FrameTimeVector"
    for tag in ("CineRate", "RecommendedDisplayFrameRate"):
        if (fps := plausible_fps(dataset.get(tag))) is not None:
            return fps, tag
    return None, "unknown"


# RegionSpatialFormat, RegionDataType (PS3.3 C.8.5.5): what they say the screen shows
TWO_D, M_MODE, SPECTRAL = 1, 2, 3
TISSUE, COLOUR_FLOW = 1, 2
DOPPLER = (3, 4, 5, 6, 7)
SCREENS = (640, 800, 1024, 1280, 1600)  # pixels across scanners' screens


def whole_number(value: Any) -> int:
    """A tag's value as a whole number of at least 0; 0 for what is none.

    >>> whole_number("12"), whole_number(None), whole_number("many")
    (12, 0, 0)
    """
    try:
        return max(int(value), 0)
    except (TypeError, ValueError, OverflowError):
        return 0


def _regions(dataset: Any) -> list[Any]:
    return list(dataset.get("SequenceOfUltrasoundRegions") or [])


def _check_content(dataset: Any, name: str) -> None:
    """Sets aside what its own region tags say is not one grey 2-D cine."""
    kinds = [_kind(region) for region in _regions(dataset)]
    content = None
    if any(form == M_MODE for form, _ in kinds):
        content = "M-mode"
    elif any(form == SPECTRAL or data in DOPPLER for form, data in kinds):
        content = "spectral Doppler"
    elif (TWO_D, COLOUR_FLOW) in kinds:
        content = "colour Doppler"
    elif kinds.count((TWO_D, TISSUE)) > 1:
        content = "a split screen"
    if content:
        remedy = "Only single 2-D grey cines train: leave it out"
        raise CineError(name, f"it shows {content}", remedy, "not a cine")


def tissue_region(dataset: Any) -> tuple[tuple[slice, slice] | None, float]:
    """Rows and columns of the one 2-D tissue region, and how it was rescaled.

    A rectangle a few pixels over the edge is clamped. One that overshoots the image was written
    for a larger screen of the same form and is rescaled from the smallest usual one that holds
    it. Anything else is not trusted.

    Returns:
        The region, None if there is not exactly one to trust; its pixels per described pixel.
    """
    regions = [r for r in _regions(dataset) if _kind(r) == (TWO_D, TISSUE)]
    if len(regions) != 1:
        return None, 1.0
    names = ("MinX0", "MaxX1", "MinY0", "MaxY1")
    corners = [regions[0].get(f"RegionLocation{corner}") for corner in names]
    if any(c is None for c in corners):
        return None, 1.0
    x0, x1, y0, y1 = (whole_number(c) for c in corners)
    width, height = whole_number(dataset.get("Columns")), whole_number(dataset.get("Rows"))
    x1, y1 = x1 + 1, y1 + 1  # the tags count the last pixel
    over = x1 / width, y1 / height
    scale = 1.0
    if max(over) > 1.02:
        # written for the scanner's own screen, and the pixels were shrunk later
        factors = [w / width for w in SCREENS if w / width >= max(over)]
        if not factors or min(over) < 0.5 * max(over):
            return None, 1.0
        scale = 1 / factors[0]
        x0, x1, y0, y1 = (round(v * scale) for v in (x0, x1, y0, y1))
    x1, y1 = min(x1, width), min(y1, height)
    if x1 - x0 < 16 or y1 - y0 < 16:
        return None, 1.0
    return (slice(y0, y1), slice(x0, x1)), scale


def _kind(region: Any) -> tuple[int, int]:
    return whole_number(region.get("RegionSpatialFormat")), whole_number(
        region.get("RegionDataType")
    )


def _inverse(milliseconds: Any) -> float | None:
    try:
        value = float(milliseconds)
    except (TypeError, ValueError):
        return None
    return 1000 / value if value > 0 else None


def _check_is_cine(dataset: Any, name: str) -> None:
    if "PixelData" not in dataset and "FloatPixelData" not in dataset:
        if _describes_image(dataset):
            raise CineError(
                name,
                "it describes an image but holds no pixels: it may be cut short",
                "Export it again from the archive",
            )
        raise CineError(name, "it holds no pixels (a report?)", "Leave it out", "not a cine")
    if whole_number(dataset.get("NumberOfFrames")) < 2:
        colour = " with colour Doppler" if dataset.get("UltrasoundColorDataPresent") else ""
        raise CineError(
            name,
            f"it is a still{colour}: one frame",
            "Only cines of 2 or more frames train",
            "not a cine",
        )


def _describes_image(dataset: Any) -> bool:
    """Whether pixels belong to it, by its class or its size."""
    from pydicom.config import disable_value_validation
    from pydicom.uid import UID

    meta = getattr(dataset, "file_meta", {})  # in front, where less is cut off
    with disable_value_validation():  # a UID that is cut short is no news
        classes = (dataset.get("SOPClassUID"), meta.get("MediaStorageSOPClassUID"))
        names = [UID(str(c or "")).name for c in classes]
    is_image = any("Image Storage" in n or n == "Enhanced US Volume Storage" for n in names)
    return is_image or "Rows" in dataset


def _pixels(dataset: Any) -> np.ndarray:
    """(T, H, W) or (T, H, W, 3) uint8; YBR becomes RGB, palettes are applied."""
    from pydicom.pixels import apply_color_lut, pixel_array

    photometric = str(dataset.PhotometricInterpretation)
    pixels = pixel_array(dataset, raw=False)
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        bits = pixels.dtype.itemsize * 8
    else:
        bits = int(dataset.BitsStored)
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind == "i" or bits < 8:
            low, high = float(pixels.min()), float(pixels.max())
            pixels = (pixels - low) * (255 / max(high - low, 1))
        else:
            pixels = pixels.astype(np.float32) * (255 / (2**bits - 1))
        pixels = np.rint(pixels).astype(np.uint8)
    return 255 - pixels if photometric == "MONOCHROME1" else pixels


def _spacing(dataset: Any) -> tuple[float, float] | None:
    """(row, column) mm: the tissue region's cm per pixel, else PixelSpacing."""
    for region in _regions(dataset):
        in_cm = region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == 3
        if not in_cm or _kind(region)[0] != TWO_D:
            continue
        delta = _lengths(region.get("PhysicalDeltaY"), region.get("PhysicalDeltaX"), 10.0)
        if delta:
            scale = tissue_region(dataset)[1]  # the delta is of the pixels that the region counts
            return delta[0] / scale, delta[1] / scale
    spacing = dataset.get("PixelSpacing")
    return _lengths(spacing[0], spacing[1], 1.0) if spacing and len(spacing) > 1 else None


def _lengths(row: Any, column: Any, scale: float) -> tuple[float, float] | None:
    try:
        lengths = abs(float(row)) * scale, abs(float(column)) * scale
    except (TypeError, ValueError):
        return None
    return lengths if all(0 < v < 100 for v in lengths) else None


def _decoding_error(name: str, error: Exception) -> CineError:
    text = str(error)
    if ("missing" in text.lower() and "depend" in text.lower()) or "plugin" in text.lower():
        return CineError(name, "its compression needs a codec that is not installed", CODECS)
    return CineError(name, "its pixels cannot be decoded (damaged or cut short)", "Export it again")


def _truncated(name: str, dataset: Any) -> CineError:
    frames = dataset.get("NumberOfFrames")
    return CineError(
        name,
        f"its pixels are cut short or damaged: {frames} frames were promised",
        "Export it again from the archive",
    )


def patient_of(path: Path) -> str | None:
    """A DICOM file's PatientID, None for others; to be salted before it goes anywhere."""
    return owners_of(path)[0]


def owners_of(path: Path) -> tuple[str | None, str | None]:
    """A DICOM file's PatientID and StudyInstanceUID; to be salted before they go anywhere."""
    try:
        if not is_dicom(path):
            return None, None
        dataset = open_dicom(path, path.name, pixels=False)
    except (CineError, OSError):
        return None, None
    patient, study = dataset.get("PatientID"), dataset.get("StudyInstanceUID")
    return f"patient {patient}" if patient else None, f"study {study}" if study else None
