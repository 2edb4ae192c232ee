"""Label maps of cines: from many kinds of files, on the frames of the cine's own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.tables import number, read_table
from discovr_monai.base.types import CineError
from discovr_monai.data.read.pixels import check_size
from discovr_monai.data.read.volumes import check_itk_header

LONG_AXIS = 0  # EchoNet's tracings begin with it


def mask_name(reference: str | Mapping[str, Any]) -> str:
    """The relative name of a reference's file, for errors."""
    return reference if isinstance(reference, str) else str(reference.get("file", "mask"))


def read_masks(
    root: Path, reference: str | Mapping[str, Any], shape: tuple[int, int, int]
) -> np.ndarray:
    """Label maps of a cine; frames that nobody labelled are 0 throughout.

    Args:
        root: the data root.
        reference: a relative path to .npz ("mask"), .npy, NIfTI (X, Y, T) or MHD; or a dict with
            "kind" and "file":

            * "map": the same, with "first" (the cine's frame that the file's first belongs to,
              0) and "label" (the number given to all that is labelled, else as in the file);
            * "frames": "files" maps frame numbers to files of one frame each;
            * "chords": EchoNet-Dynamic's table (FileName, X1, Y1, X2, Y2, Frame) with "key", the
              FileName; the outline that its chords make becomes label 1;
            * "polygon": EchoNet-Pediatric's table (FileName, X, Y, Frame) likewise;
            * "mat": MATLAB 5 with "key", the variable (F, H, W) or (H, W, F), "first", "label";
              a map of another size is resized to the frames (nearest).
        shape: (T, H, W) of the cine as it is in its file.

    Returns:
        (T, H, W) uint8 labels.

    Raises:
        CineError: missing, unreadable, or not of the cine's frames.
    """
    if isinstance(reference, str):
        reference = {"kind": "map", "file": reference}
    readers = {
        "map": _read_map,
        "frames": _read_frames,
        "chords": _read_outlines,
        "polygon": _read_outlines,
        "mat": _read_mat,
    }
    name = mask_name(reference)
    if reference.get("kind") not in readers:
        raise CineError(
            name, f"its mask is of kind {reference.get('kind')!r}", f"Use one of {list(readers)}"
        )
    labels = readers[str(reference["kind"])](root, reference, shape)
    if labels.shape != shape:
        raise CineError(
            name,
            f"the mask is {_size(labels.shape)}, the cine {_size(shape)}",
            "Draw it on the frames as they are in the file",
        )
    return labels


def window_masks(masks: np.ndarray, window: tuple[int, int, int, int, int, int]) -> np.ndarray:
    """Cuts masks to the window that was kept of the frames, and pads them to a square.

    Args:
        masks: (T, H, W) labels.
        window: see :class:`discovr_monai.base.types.Cine`.

    Returns:
        (T, S, S), S the larger side of the window.
    """
    _, _, top, left, h, w = window
    side = max(h, w)
    above, before = (side - h) // 2, (side - w) // 2
    cut = masks[:, top : top + h, left : left + w]
    return np.pad(cut, ((0, 0), (above, side - h - above), (before, side - w - before)))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} frames of {shape[1]} x {shape[2]}"


# ---- label maps in files -----------------------------------------------------------------


def _load(root: Path, name: str) -> np.ndarray:
    """(T, H, W) or (H, W) numbers of one file."""
    path = root / name
    try:
        if name.lower().endswith((".nii", ".nii.gz")):
            import nibabel

            image: Any = nibabel.load(path)
            check_size(path, name, (1, 1, 1, image.get_data_dtype().itemsize, *image.shape))
            maps = np.asarray(image.dataobj).T
        elif name.lower().endswith((".mhd", ".mha")):
            import itk

            if not path.exists():
                raise FileNotFoundError(name)
            check_itk_header(path, name)
            maps = itk.array_from_image(itk.imread(str(path)))
        else:
            loaded = np.load(path, allow_pickle=False)
            maps = loaded["mask"] if hasattr(loaded, "files") else loaded
    except FileNotFoundError as error:
        raise CineError(name, "the mask file does not exist", "Correct the datalist") from error
    except CineError:
        raise
    except Exception as error:  # each library has its own for a damaged file
        raise CineError(
            name,
            f"the mask cannot be read ({type(error).__name__})",
            "Make it again, as npz or NIfTI",
        ) from error
    maps = maps.reshape([n for i, n in enumerate(maps.shape) if n > 1 or i >= maps.ndim - 2])
    if maps.dtype.kind not in "iufb" or maps.ndim not in (2, 3):
        raise CineError(
            name, f"the mask has shape {maps.shape}", "Store it as (T, H, W), one map per frame"
        )
    return maps


def _as_labels(maps: np.ndarray, reference: Mapping[str, Any]) -> np.ndarray:
    """Whole numbers of 0 to 255 as uint8; a CineError for anything else, such as NaN."""
    name = mask_name(reference)
    if maps.dtype != np.uint8:
        low, high = (float(maps.min()), float(maps.max())) if maps.size else (0.0, 0.0)
        if not (low >= 0 and high <= 255) or (maps.dtype.kind == "f" and (maps % 1).any()):
            raise CineError(
                name, f"its values run from {low:g} to {high:g}", "Labels are whole, 0 to 255"
            )
        maps = maps.astype(np.uint8)
    label = reference.get("label")
    return maps if label is None else (maps > 0) * np.uint8(label)


def _place(maps: np.ndarray, first: int, shape: tuple[int, int, int], name: str) -> np.ndarray:
    """Sets (F, h, w) maps into the cine's frames from ``first`` on."""
    if first == 0 and len(maps) == shape[0]:
        return maps
    if first < 0 or first + len(maps) > shape[0]:
        raise CineError(
            name,
            f"the mask has frames {first} to {first + len(maps) - 1}, the cine {shape[0]} frames",
            "Correct the datalist",
        )
    out = np.zeros((shape[0], *maps.shape[1:]), np.uint8)
    out[first : first + len(maps)] = maps
    return out


def _read_map(root: Path, reference: Mapping[str, Any], shape: tuple[int, int, int]) -> np.ndarray:
    name = mask_name(reference)
    maps = _load(root, name)
    if maps.ndim != 3:
        raise CineError(
            name, f"the mask has shape {maps.shape}", "Store it as (T, H, W), one map per frame"
        )
    if "first" not in reference:
        return _as_labels(maps, reference)
    return _place(_as_labels(maps, reference), int(reference["first"]), shape, name)


def _read_frames(
    root: Path, reference: Mapping[str, Any], shape: tuple[int, int, int]
) -> np.ndarray:
    out = np.zeros(shape, np.uint8)
    for frame, name in reference["files"].items():
        maps = _as_labels(_load(root, name), {**reference, "file": name})
        maps = maps[0] if maps.ndim == 3 and len(maps) == 1 else maps
        if maps.shape != shape[1:] or not 0 <= int(frame) < shape[0]:
            raise CineError(
                name,
                f"the mask of frame {frame} has shape {maps.shape}, the cine is {_size(shape)}",
                "Draw it on the frames as they are in the file",
            )
        out[int(frame)] = maps
    return out


def _read_mat(root: Path, reference: Mapping[str, Any], shape: tuple[int, int, int]) -> np.ndarray:
    from scipy.io import loadmat

    name, key = mask_name(reference), str(reference.get("key", "predicted"))
    try:
        maps = np.asarray(loadmat(root / name, variable_names=[key])[key])
    except FileNotFoundError as error:
        raise CineError(name, "the mask file does not exist", "Correct the datalist") from error
    except Exception as error:  # scipy raises many kinds for damaged files
        raise CineError(
            name,
            f"the mask cannot be read as MATLAB 5 with the variable {key!r}",
            "Save it again with -v7, not -v7.3",
        ) from error
    frames = int(reference.get("frames") or maps.shape[0])
    if maps.ndim == 3 and maps.shape[0] != frames and maps.shape[2] == frames:
        maps = maps.transpose(2, 0, 1)  # (H, W, F)
    if maps.ndim != 3:
        raise CineError(name, f"the mask has shape {maps.shape}", "Store it as (F, H, W)")
    labels = _as_labels(maps, reference)
    if labels.shape[1:] != shape[1:]:
        rows = (np.arange(shape[1]) + 0.5) * labels.shape[1] / shape[1]
        columns = (np.arange(shape[2]) + 0.5) * labels.shape[2] / shape[2]
        labels = labels[:, rows.astype(int)][:, :, columns.astype(int)]
    return _place(labels, int(reference.get("first", 0)), shape, name)


# ---- tracings in tables ------------------------------------------------------------------


def outline_of_chords(chords: np.ndarray) -> np.ndarray:
    """(P, 2) x, y outline of EchoNet-Dynamic's (K, 4) rows of x1, y1, x2, y2.

    The first row is the long axis and is left out. The first ends of the chords lead down one
    wall, their second ends lead back up the other.
    """
    ends = chords[LONG_AXIS + 1 :]
    return np.concatenate([ends[:, :2], ends[::-1, 2:]])


def polygon_area(outline: np.ndarray) -> float:
    """Area in pixels of a (P, 2) x, y outline, by the shoelace formula.

    >>> polygon_area(np.array([[0, 0], [4, 0], [4, 3]]))
    6.0
    """
    x, y = outline.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def fill_polygon(outline: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8, 1 inside a (P, 2) x, y outline and on it.

    >>> fill_polygon(np.array([[1, 1], [3, 1], [3, 2], [1, 2]]), (3, 5)).tolist()
    [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0]]
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("L", size[::-1])
    points = [tuple(map(float, p)) for p in np.rint(outline)]
    ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
    return np.asarray(canvas)


@lru_cache(maxsize=4)
def _tracings(path: Path, stamp: tuple[int, int]) -> dict[str, dict[int, np.ndarray]]:
    """FileName (lower case, no suffix) -> frame -> (K, 4) chords or (K, 2) vertices.

    Rows whose frame or places are no numbers ("No Systolic", empty) are left out.
    """
    clips: dict[str, dict[int, list[list[float]]]] = {}
    for row in read_table(path, ("FileName", "Frame")):
        keys = ("X1", "Y1", "X2", "Y2") if "X1" in row else ("X", "Y")
        values = [number(row.get(k, "")) for k in (*keys, "Frame")]
        if any(v is None for v in values):
            continue
        *place, frame = (float(v) for v in values if v is not None)
        clip = clips.setdefault(clip_key(row["FileName"]), {})
        clip.setdefault(int(frame), []).append(place)
    return {
        clip: {frame: np.array(rows) for frame, rows in frames.items()}
        for clip, frames in clips.items()
    }


def clip_key(name: str) -> str:
    """A file name as tables spell it, whatever its case and suffix."""
    return name.strip().lower().removesuffix(".avi")


def read_tracings(path: Path) -> dict[str, dict[int, np.ndarray]]:
    """Outlines of a VolumeTracings.csv: clip -> frame -> (P, 2) x, y in pixels.

    Read once per process. Frames with fewer than three points are left out.
    """
    stat = path.stat()
    return {
        clip: dict(_outlines(frames))
        for clip, frames in _tracings(path, (stat.st_size, stat.st_mtime_ns)).items()
    }


def _outlines(frames: Mapping[int, np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    for frame, rows in frames.items():
        outline = outline_of_chords(rows) if rows.shape[1] == 4 else rows
        if len(outline) >= 3:
            yield frame, outline


def _read_outlines(
    root: Path, reference: Mapping[str, Any], shape: tuple[int, int, int]
) -> np.ndarray:
    name, key = mask_name(reference), str(reference.get("key", ""))
    path = root / name
    try:
        stat = path.stat()
        clips = _tracings(path, (stat.st_size, stat.st_mtime_ns))
    except FileNotFoundError as error:
        raise CineError(name, "the mask file does not exist", "Correct the datalist") from error
    frames = clips.get(clip_key(key))
    if not frames:
        raise CineError(name, f"it has no tracing of {key!r}", "Leave the mask out")
    out = np.zeros(shape, np.uint8)
    for frame, outline in _outlines(frames):
        if not 0 <= frame < shape[0]:
            raise CineError(
                name,
                f"{key!r} is traced in frame {frame}, but has {shape[0]} frames",
                "Leave the mask out",
            )
        out[frame] = fill_polygon(outline, shape[1:])
    return out
