"""Label maps of cines, in the frames that the network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from discovr_monai.types import CineError


def read_masks(path: Path, name: str) -> np.ndarray:
    """(T, H, W) integer labels from .npz ("mask"), .npy, or a NIfTI of (W, H, T).

    Args:
        path: the file.
        name: its name relative to the data root, for errors.

    Raises:
        CineError: missing, unreadable, or not three-dimensional.
    """
    try:
        if path.name.endswith((".nii", ".nii.gz")):
            import nibabel

            masks = np.asarray(nibabel.load(path).dataobj).T  # type: ignore[attr-defined]
        else:
            loaded = np.load(path, allow_pickle=False)
            masks = loaded["mask"] if hasattr(loaded, "files") else loaded
    except FileNotFoundError as error:
        raise CineError(name, "the mask file does not exist", "Correct the datalist") from error
    except Exception as error:  # each library has its own for a damaged file
        raise CineError(
            name,
            f"the mask cannot be read ({type(error).__name__})",
            "Make it again, as npz or NIfTI",
        ) from error
    if masks.ndim != 3:
        raise CineError(
            name, f"the mask has shape {masks.shape}", "Store it as (T, H, W), one map per frame"
        )
    return masks


def window_masks(
    masks: np.ndarray, window: tuple[int, int, int, int, int, int], frames: int, name: str
) -> np.ndarray:
    """Cuts masks like the frames were cut, and pads them to a square like the frames.

    Args:
        masks: (T, H, W) labels.
        window: see :class:`discovr_monai.types.Cine`.
        frames: T of the cine.
        name: of the mask's file.

    Returns:
        (T, S, S), S the larger side of the window.

    Raises:
        CineError: if the masks are not of the cine's frames.
    """
    height, width, top, left, h, w = window
    if masks.shape != (frames, height, width):
        raise CineError(
            name,
            f"the mask is {_size(masks.shape)}, the cine {_size((frames, height, width))}",
            "Draw it on the frames as they are in the file",
        )
    side = max(h, w)
    above, before = (side - h) // 2, (side - w) // 2
    cut = masks[:, top : top + h, left : left + w]
    return np.pad(cut, ((0, 0), (above, side - h - above), (before, side - w - before)))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} frames of {shape[1]} x {shape[2]}"
