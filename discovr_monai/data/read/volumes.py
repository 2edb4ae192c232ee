"""NIfTI, MHD, MHA and NRRD to frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.types import Cine, CineError
from discovr_monai.data.read.pixels import (
    check_size,
    choose_colour,
    grey_or_rgb,
    plausible_fps,
    to_uint8,
)


def read_nifti(path: Path, name: str, color: str) -> Cine:
    import nibabel

    try:
        image = nibabel.load(path)
        header = image.header
        check_size(path, name, (1, 1, 1, image.get_data_dtype().itemsize, *image.shape))  # type: ignore[attr-defined]
        array = np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    except CineError:
        raise
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise CineError(
            name, "it cannot be read as NIfTI (cut short or damaged)", "Copy or export it again"
        ) from error
    zooms = [float(z) for z in header.get_zooms()]  # type: ignore[attr-defined]
    if array.dtype.names:  # RGB voxels
        array = np.stack([array[n] for n in array.dtype.names[:3]], -1)
    while array.ndim == 4 and array.shape[2] == 1:  # (X, Y, 1, T)
        array, zooms = array[:, :, 0], [*zooms[:2], *zooms[3:]]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3):
        raise CineError(
            name, f"its shape {array.shape} is not (X, Y, T)", "Save it as 2-D + time", "not a cine"
        )
    frames = to_uint8(np.swapaxes(array, 0, 2), name)  # (T, Y, X[, 3])
    unit = header.get_xyzt_units()[1]  # type: ignore[attr-defined]
    seconds = (zooms[2] if len(zooms) > 2 else 0) * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1)
    has_pace = seconds > 0 and (unit != "unknown" or seconds < 0.5)  # 1 is the empty default
    fps = plausible_fps(1 / seconds) if has_pace else None
    if frames.ndim == 4:
        frames = choose_colour(frames, color)
    return Cine(grey_or_rgb(frames, color), fps, "header" if fps else "unknown",
                _millimetres(header, zooms))  # fmt: skip


def _millimetres(header: Any, zooms: Sequence[float]) -> tuple[float, float] | None:
    """(row, column) spacing of a NIfTI; None where it is the header's empty default."""
    unit = header.get_xyzt_units()[0]
    if unit == "unknown" and zooms[0] == zooms[1] == 1:
        return None
    scale = {"meter": 1e3, "micron": 1e-3}.get(unit, 1.0)
    return zooms[1] * scale, zooms[0] * scale


def check_itk_header(path: Path, name: str) -> None:
    """Refuses headers that ITK crashes on, and those that point at files elsewhere."""
    with path.open("rb") as file:
        text = file.read(4096).decode("latin-1")
    fields = {
        key.strip().lower(): value.strip()
        for line in text.splitlines()
        for key, sign, value in [line.partition("=" if path.suffix.lower() != ".nrrd" else ":")]
        if sign
    }
    data = fields.get("elementdatafile") or fields.get("data file") or "local"
    if "/" in data or "\\" in data or data.startswith(".."):
        raise CineError(
            name, "its header points at a file in another folder", "Put both in one folder",
            "refused",
        )  # fmt: skip
    dimensions = fields.get("ndims") or fields.get("dimension") or ""
    sizes = (fields.get("dimsize") or fields.get("sizes") or "").split()
    whole = dimensions.isdigit() and all(s.isdigit() for s in sizes)
    if not whole or not 2 <= int(dimensions) <= 4 or len(sizes) != int(dimensions):
        raise CineError(
            name,
            f"its header says {dimensions[:20] or 'nothing'} of the dimensions and "
            f"{' '.join(sizes)[:40] or 'nothing'} of the sizes",
            "Export it again",
        )


def read_itk(path: Path, name: str, color: str) -> Cine:
    import itk

    check_itk_header(path, name)

    try:
        about = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
        about.SetFileName(str(path))
        about.ReadImageInformation()
        sides = [about.GetDimensions(i) for i in range(about.GetNumberOfDimensions())]
        pixels = path.with_suffix(".raw")  # where the bytes are, for a header of text
        content = pixels if path.suffix.lower() == ".mhd" and pixels.is_file() else path
        check_size(content, name, (1, 1, 1, about.GetImageSizeInBytes() // np.prod(sides), *sides))
        image = itk.imread(str(path))
        array = itk.array_from_image(image)  # (T, Y, X[, 3])
        spacing = [float(s) for s in image.GetSpacing()]
    except CineError:
        raise
    except Exception as error:  # ITK raises its own kinds, which differ by version
        raise CineError(
            name, "ITK cannot read it (damaged, or its raw file is missing)", "Export it again"
        ) from error
    if array.ndim == 2 or (array.ndim == 3 and len(spacing) == 2):
        array, spacing = array[None], [*spacing, 0.0]
    if array.ndim not in (3, 4) or len(spacing) != 3:
        raise CineError(
            name, f"its shape {array.shape} is not (T, Y, X)", "Save it as 2-D + time", "not a cine"
        )
    frames = to_uint8(array, name)
    if frames.ndim == 4:
        frames = choose_colour(frames[..., :3], color)
    fps = plausible_fps(1 / spacing[2]) if 0 < spacing[2] < 0.5 else None
    return Cine(grey_or_rgb(frames, color), fps, "header" if fps else "unknown",
                (spacing[1], spacing[0]))  # fmt: skip
