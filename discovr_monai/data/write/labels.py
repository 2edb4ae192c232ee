"""Label maps of a cine as files that other tools open: on the file's own frames, NIfTI, DICOM."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from discovr_monai.base.files import save_atomic
from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import CineError
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.kinds import NIFTI
from discovr_monai.data.write.capture import draw_outlines, write_secondary_capture
from discovr_monai.data.write.derived import (
    check_labels,
    open_source,
    other_size,
    quiet,
    refuse_empty,
    refuse_overwriting,
)
from discovr_monai.data.write.segmentation import obstacle, write_dicom_segmentation

# Where a NIfTI file says which voxel lies where; all else in a header may name a patient.
GEOMETRY = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c",
            "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y",
            "srow_z")  # fmt: skip


def full_frame_labels(
    labels: np.ndarray, window: tuple[int, int, int, int, int, int]
) -> np.ndarray:
    """Labels of the network's square frames on the file's own: undoes what the frames went through.

    The inverse of :func:`discovr_monai.data.read.masks.window_masks`, at any size S.

    Args:
        labels: (T, S, S) uint8 labels, resized to the window by nearest neighbour; or soft maps
            (T, K, S, S) float of K classes, 0 the background, resized linearly before the
            largest wins, which gives smoother outlines.
        window: see :class:`discovr_monai.base.types.Cine`.

    Returns:
        (T, H, W) uint8, 0 outside the window.

    Raises:
        ValueError: for other shapes, or a window that does not lie inside its frame.
    """
    height, width, top, left, h, w = window
    if min(top, left) < 0 or min(h, w) < 1 or top + h > height or left + w > width:
        raise ValueError(f"window {window} (H, W, top, left, height, width) leaves its frame")
    if labels.ndim not in (3, 4) or labels.shape[-1] != labels.shape[-2] or not labels.size:
        raise ValueError(f"labels of shape {labels.shape} must be (T, S, S) or (T, K, S, S)")
    if (labels.dtype.kind == "f") != (labels.ndim == 4):
        raise ValueError(
            f"labels are {labels.dtype} of shape {labels.shape}: give (T, S, S) uint8 labels "
            "or (T, K, S, S) float maps"
        )
    size, side = labels.shape[-1], max(h, w)
    rows = (side - h) // 2 + np.arange(h)  # of the window in the padded square
    columns = (side - w) // 2 + np.arange(w)
    out = np.zeros((len(labels), height, width), np.uint8)
    inside = out[:, top : top + h, left : left + w]
    if labels.ndim == 3:  # the middle of a pixel decides: (p + 1/2) S / side
        at_rows, at_columns = ((2 * p + 1) * size // (2 * side) for p in (rows, columns))
        inside[:] = labels[:, at_rows][:, :, at_columns]
        return out
    for t, maps in enumerate(labels):  # a frame at a time: K float maps of a screen are large
        soft = torch.from_numpy(np.ascontiguousarray(maps, np.float32))[None]
        if size != side:
            soft = F.interpolate(soft, (side, side), mode="bilinear", antialias=size > side)
        winner = soft[0].argmax(0).numpy()  # (side, side)
        inside[t] = winner[rows][:, columns]
    return out


def write_nifti_labels(
    path: Path,
    labels: np.ndarray,
    spacing: tuple[float, float] | None,
    fps: float | None,
    like: Path | None = None,
    *,
    name: str | None = None,
) -> None:
    """Writes label maps as NIfTI that lie exactly on their cine.

    A NIfTI cine's own geometry is taken over bit by bit. Any other knows no patient's axes, and x
    and y run as ITK, and so MONAI, has them in an image without orientation (diagonal -, -, +).

    Args:
        path: .nii or .nii.gz; written under a temporary name and renamed, the same bytes for
            the same labels.
        labels: (T, H, W) labels, stored as (X, Y, T) uint8.
        spacing: (row, column) mm, None where it is unknown.
        fps: frames per second or None.
        like: the cine's file; if it is NIfTI, its geometry, axes and units win over the numbers.
        name: what errors call ``like``; its file name if None.

    Raises:
        CineError: ``like`` cannot be read, is of another size, or is ``path`` itself.
        ValueError: labels that are none, or another suffix.
    """
    import nibabel

    check_labels(labels)
    if not path.name.lower().endswith(NIFTI):
        raise ValueError(f"{path.name} must end in .nii or .nii.gz")
    voxels = np.ascontiguousarray(labels.astype(np.uint8).transpose(2, 1, 0))  # (X, Y, T)
    header = nibabel.Nifti1Header()
    if like is not None and like.name.lower().endswith(NIFTI):
        refuse_overwriting(like, name or like.name, path)
        voxels = _place_like(voxels, header, like, name or like.name)
    else:
        header.set_data_shape(voxels.shape)
        place_anywhere(header, spacing, fps)
    header.set_data_dtype(np.uint8)
    header.set_intent("label", allow_unknown=False)
    header["descrip"] = NOTICE.encode()
    content = nibabel.Nifti1Image(voxels, None, header).to_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, mtime=0)
    save_atomic(lambda temporary: Path(temporary).write_bytes(content), path)


def place_anywhere(header: Any, spacing: tuple[float, float] | None, fps: float | None) -> None:
    """Gives a NIfTI header the geometry of a cine that knows no patient's axes.

    Args:
        header: its shape is set already.
        spacing, fps: see :func:`write_nifti_labels`.
    """
    row, column = spacing or (1.0, 1.0)
    affine = np.diag([-column, -row, 1 / fps if fps else 1.0, 1.0])
    header.set_qform(affine, "aligned")
    header.set_sform(affine, "aligned")
    header.set_xyzt_units("mm" if spacing else "unknown", "sec" if fps else "unknown")


def write_dicom_labels(
    path: Path,
    labels: np.ndarray,
    structures: Sequence[str],
    source: Path,
    model: str,
    *,
    name: str | None = None,
    corrected: bool = False,
) -> str:
    """A Segmentation where the source can be referred to, else its frames with outlines drawn.

    What it writes is as identifying as the source: keep it beside it.

    Args:
        path, labels, structures, source, model, name, corrected: see
            :func:`write_dicom_segmentation`.

    Returns:
        "segmentation", or "secondary capture: " and what the source lacks for one.

    Raises:
        CineError, ValueError: as :func:`write_dicom_segmentation`; where outlines are drawn also
            as :func:`discovr_monai.data.read.cine.read_cine`.
    """
    name = name or source.name
    with quiet():
        why = obstacle(open_source(source, name, path))
    if not why:
        write_dicom_segmentation(
            path, labels, structures, source, model, name=name, corrected=corrected
        )
        return "segmentation"
    check_labels(labels, len(structures))
    refuse_empty(labels, name)
    frames = read_cine(source, name=name, color="rgb").frames
    if frames.shape[:3] != labels.shape:
        raise other_size(name, frames.shape[:3], labels)
    write_secondary_capture(path, draw_outlines(frames, labels), source, model, name=name)
    return f"secondary capture: {why}"


def _place_like(voxels: np.ndarray, header: Any, like: Path, name: str) -> np.ndarray:
    """Takes over a NIfTI's geometry into ``header``; (X, Y, T) in the shape of its voxels."""
    import nibabel

    try:
        source: Any = nibabel.load(like)
        shape = tuple(source.shape)
        geometry = {field: source.header[field] for field in GEOMETRY}
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise CineError(
            name, "it cannot be read as NIfTI (cut short or damaged)", "Copy or export it again"
        ) from error
    # as cines are read: (X, Y, T), (X, Y, 1, T), or (X, Y, T, 3) with colours
    axes = shape[:3] if len(shape) == 4 and shape[2] != 1 else shape
    if (*axes[:2], math.prod(axes[2:])) != voxels.shape:
        raise CineError(
            name,
            f"its voxels are {' x '.join(map(str, shape))}, the labels "
            f"{' x '.join(map(str, voxels.shape))}",
            "Give the cine that the labels are of",
        )
    header.set_data_shape(axes)
    for field, value in geometry.items():
        header[field] = value
    return voxels.reshape(axes)
