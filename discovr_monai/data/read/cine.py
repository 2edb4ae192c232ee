"""One reader for every kind of cine: AVI, MP4, MOV, MKV, DICOM, NIfTI, MHD, prepared NPY.

Codec libraries are imported when a file needs them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.types import Cine, CineError
from discovr_monai.data.read.kinds import ITK, NIFTI, VIDEO, is_dicom
from discovr_monai.data.read.pixels import check_size, choose_colour, grey_or_rgb
from discovr_monai.data.read.video import read_video
from discovr_monai.data.read.volumes import read_itk, read_nifti


def read_cine(path: str | Path, *, name: str | None = None, color: str = "auto") -> Cine:
    """Reads a 2-D cine.

    Args:
        path: AVI (MJPEG), MP4/MOV/MKV (H.264), multi-frame ultrasound DICOM, NIfTI (X, Y, T) or
            MHD/MHA 2-D + t. The first bytes say which it is; where they do not, the suffix does.
        name: what errors call the file, best relative to the data root; the file's name if None.
        color: "auto" gives (T, H, W) for grey cines and (T, H, W, 3) RGB for coloured ones, in
            which more than 1 % of the pixels differ by over 24 levels between channels; "grey"
            and "rgb" force one or the other.

    Returns:
        The cine: frames uint8 0..255, frames per second and where they came from, pixel spacing
        in mm. No tag of the patient is among it.

    Raises:
        CineError: naming the file, what is wrong and what to do.
        ValueError: for an unknown ``color``.
    """
    if color not in ("auto", "grey", "rgb"):
        raise ValueError(f"color {color!r} must be 'auto', 'grey' or 'rgb'")
    path = Path(path)
    name = name or path.name
    head = _head(path, name)
    reader = _reader(path, head, name)
    try:
        cine = reader(path, name, color)
    except CineError:
        raise
    except MemoryError as error:
        raise CineError(name, "it does not fit into memory", "Shorten or shrink it") from error
    except Exception as error:  # a library's own kinds for what it cannot read
        raise CineError(
            name, f"reading it failed ({type(error).__name__})", "Copy or export it again"
        ) from error
    frames = cine.frames
    if not all(frames.shape) or frames.dtype != np.uint8 or frames.ndim not in (3, 4):
        raise CineError(
            name, f"its frames have shape {frames.shape[1:]}", "Export it again", "not a cine"
        )
    if len(frames) < 2:
        raise CineError(
            name, "it is a still: one frame", "Only cines of 2 or more frames train", "not a cine"
        )
    return cine


def _head(path: Path, name: str) -> bytes:
    if not path.exists():
        raise CineError(name, "it does not exist", "Check the path and --dataset_dir")
    if path.is_dir():
        raise CineError(name, "it is a folder", "Give a file, or scan the folder", "not a cine")
    if not os.access(path, os.R_OK):
        raise CineError(name, "no permission to read it", "Change its permissions (chmod u+r)")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CineError(name, f"it cannot be read ({error.strerror})", "Check the disk") from error
    if not head:
        raise CineError(name, "it is empty (0 bytes)", "Copy it again from its source")
    return head


def _reader(path: Path, head: bytes, name: str) -> Any:
    suffix = path.suffix.lower()
    if head[:6] == b"\x93NUMPY":
        return _read_npy
    if is_dicom(path, head):
        from discovr_monai.data.read.dicom import read_dicom

        return read_dicom
    if path.name.lower().endswith(NIFTI):
        return read_nifti
    if suffix in ITK:
        return read_itk
    containers = (head[:4] == b"RIFF", head[4:8] == b"ftyp", head[:4] == b"\x1aE\xdf\xa3")
    if suffix in VIDEO or any(containers):
        return read_video
    what = "text" if _is_text(head) else "not a cine format that we know"
    formats = "AVI, MP4, MOV, MKV, DICOM, NIfTI, MHD or NPY"
    raise CineError(
        name, f"it is {what}", f"Convert it to {formats}, or leave it out", "not a cine"
    )


def _is_text(head: bytes) -> bool:
    return not set(head) & (set(range(9)) | set(range(14, 32)))


def _read_npy(path: Path, name: str, color: str) -> Cine:
    """A prepared cine, (T, H, W[, 3]) uint8, memory-mapped."""
    frames = np.load(path, mmap_mode="r", allow_pickle=False)
    if frames.dtype != np.uint8 or not (frames.ndim == 3 or frames.shape[3:] == (3,)):
        raise CineError(
            name,
            f"it holds {frames.dtype} of shape {frames.shape}",
            "Prepared cines are (T, H, W) uint8: make it with discovr-monai prepare",
            "not a cine",
        )
    if frames.ndim == 4 or color == "rgb":
        check_size(path, name, (*frames.shape[:3], 3))
        frames = choose_colour(frames, color) if frames.ndim == 4 else grey_or_rgb(frames, color)
    return Cine(frames, None, "unknown")
