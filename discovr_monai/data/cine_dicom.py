"""Multi-frame ultrasound DICOM to cines, without a tag of the patient."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.data.cine import choose_colour, plausible_fps
from discovr_monai.types import Cine, CineError

CODECS = "pip install pylibjpeg pylibjpeg-openjpeg pyjpegls"


def read_dicom(path: Path, name: str, color: str) -> Cine:
    """Reads one file; see :func:`discovr_monai.data.cine.read_cine`."""
    import pydicom

    dataset = open_dicom(path, name)
    _check_is_cine(dataset, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # pydicom only warns of missing frames
        try:
            pixels = _pixels(dataset)
        except (pydicom.errors.InvalidDicomError, RuntimeError, NotImplementedError) as error:
            raise _decoding_error(name, error) from error
        except Exception as error:  # truncated data fails in many ways
            raise _truncated(name, dataset) from error
    claimed = int(dataset.get("NumberOfFrames") or 1)
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
        region=tissue_region(dataset),
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
    except (pydicom.errors.InvalidDicomError, EOFError, OSError, ValueError, KeyError) as error:
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


def tissue_region(dataset: Any) -> tuple[slice, slice] | None:
    """Rows and columns of the one 2-D tissue region, clamped to the image; None if not one."""
    regions = [
        r
        for r in dataset.get("SequenceOfUltrasoundRegions") or []
        if r.get("RegionSpatialFormat") == 1 and r.get("RegionDataType") == 1
    ]
    if len(regions) != 1:
        return None
    region = regions[0]
    corners = [
        region.get(f"RegionLocation{corner}") for corner in ("MinX0", "MaxX1", "MinY0", "MaxY1")
    ]
    if any(c is None for c in corners):
        return None
    x0, x1, y0, y1 = (max(0, int(c)) for c in corners)
    x1, y1 = min(x1 + 1, int(dataset.Columns)), min(y1 + 1, int(dataset.Rows))
    if x1 - x0 < 16 or y1 - y0 < 16:
        return None
    return slice(y0, y1), slice(x0, x1)


def _inverse(milliseconds: Any) -> float | None:
    try:
        value = float(milliseconds)
    except (TypeError, ValueError):
        return None
    return 1000 / value if value > 0 else None


def _check_is_cine(dataset: Any, name: str) -> None:
    if "PixelData" not in dataset and "FloatPixelData" not in dataset:
        raise CineError(name, "it holds no pixels (a report?)", "Leave it out", "not a cine")
    if int(dataset.get("NumberOfFrames") or 1) < 2:
        colour = " with colour Doppler" if dataset.get("UltrasoundColorDataPresent") else ""
        raise CineError(
            name,
            f"it is a still{colour}: one frame",
            "Only cines of 2 or more frames train",
            "not a cine",
        )


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
    for region in dataset.get("SequenceOfUltrasoundRegions") or []:
        in_cm = region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == 3
        dx, dy = region.get("PhysicalDeltaX"), region.get("PhysicalDeltaY")
        if in_cm and dx and dy and region.get("RegionSpatialFormat") == 1:
            return abs(float(dy)) * 10, abs(float(dx)) * 10
    spacing = dataset.get("PixelSpacing")
    return (float(spacing[0]), float(spacing[1])) if spacing else None


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
