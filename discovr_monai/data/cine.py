"""One reader for every kind of cine: AVI, MP4, MOV, MKV, DICOM, NIfTI, MHD, prepared NPY.

Codec libraries are imported when a file needs them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.types import Cine, CineError

VIDEO = {".avi", ".mp4", ".mov", ".mkv", ".m4v", ".webm", ".mpg", ".mpeg", ".wmv"}
NIFTI = (".nii", ".nii.gz")
ITK = {".mhd", ".mha", ".nrrd"}
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Grey cines stored in colour differ between channels by JPEG's rounding; markers and menus are
# small. Colour is what more than 1 % of the pixels show by more than 24 grey levels.
COLOUR_LEVELS, COLOUR_SHARE = 24, 0.01
# What a file may grow to when decoded: far more than any codec makes of a cine, far less than a
# decompression bomb.
LARGEST, SMALLEST, GROWTH = 2 << 30, 256 << 20, 300
SIDE = 8192  # pixels


def file_below(root: Path, name: str) -> Path:
    """A name's file below a folder.

    Raises:
        CineError: if a link leads outside.
    """
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise CineError(
            name, "it is a link that leads outside the folder", "Copy the file", "refused"
        )
    return path


def failure_of(error: Exception) -> tuple[str, str, str]:
    """(kind, problem, remedy) of a file, whatever reading it raised.

    A reader's own bug must not end a job of thousands: it sets one file aside.
    """
    if isinstance(error, CineError):
        return error.kind, error.problem, error.remedy
    if isinstance(error, MemoryError):
        return "unreadable", "it does not fit into memory", "Shorten or shrink it"
    kind = type(error).__name__
    return "unreadable", f"reading it failed ({kind})", "Report it, leave it out"


def read_cine(path: str | Path, *, name: str | None = None, color: str = "auto") -> Cine:
    """Reads a 2-D cine.

    Args:
        path: AVI (MJPEG), MP4/MOV/MKV (H.264), multi-frame ultrasound DICOM, NIfTI (X, Y, T) or
            MHD/MHA 2-D + t. The content decides, then the suffix.
        name: what errors call the file, best relative to the data root; the file's name if None.
        color: "auto" gives (T, H, W) for grey cines and (T, H, W, 3) RGB for coloured ones (more
            than 1 % of the pixels differ by over 24 levels between channels); "grey" and "rgb"
            force one.

    Returns:
        Frames uint8 0..255, fps and where it came from, pixel spacing in mm. Never a tag of
        the patient.

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


def known_name(name: str) -> bool:
    """Whether a file's name is one that a cine may have; DICOM often has no suffix."""
    suffix = Path(name).suffix.lower()
    known = VIDEO | ITK | {".dcm", ".dicom", ".npy", ""}
    return suffix in known or name.lower().endswith(NIFTI) or suffix[1:].isdigit()


def check_size(path: Path, name: str, shape: Sequence[int]) -> None:
    """Refuses what would fill the memory, before it is decoded.

    Args:
        path: the file; a small file may not grow as large as a large one.
        name: for the error.
        shape: of the decoded frames in bytes, as far as it is known.

    Raises:
        CineError: over the limit.
    """
    limit = min(LARGEST, max(SMALLEST, GROWTH * path.stat().st_size))
    size = 1
    for n in shape:
        size *= max(int(n), 1)
    sides = [n for n in shape[1:3] if n > SIDE]
    if size > limit or sides:
        raise CineError(
            name,
            f"it would grow to {size / 1e9:.1f} GB of {' x '.join(str(n) for n in shape)}",
            "It is damaged, or too long: cut it into shorter cines",
        )


def is_dicom(path: Path, head: bytes | None = None) -> bool:
    """Whether a file is DICOM by its first bytes or its suffix."""
    if head is None:
        with path.open("rb") as file:
            head = file.read(132)
    return head[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def _reader(path: Path, head: bytes, name: str) -> Any:
    suffix = path.suffix.lower()
    if head[:6] == b"\x93NUMPY":
        return _read_npy
    if is_dicom(path, head):
        from discovr_monai.data.cine_dicom import read_dicom

        return read_dicom
    if path.name.lower().endswith(NIFTI):
        return _read_nifti
    if suffix in ITK:
        return _read_itk
    containers = (head[:4] == b"RIFF", head[4:8] == b"ftyp", head[:4] == b"\x1aE\xdf\xa3")
    if suffix in VIDEO or any(containers):
        return _read_video
    what = "text" if _is_text(head) else "not a cine format that we know"
    known = "AVI, MP4, MOV, MKV, DICOM, NIfTI, MHD or NPY"
    raise CineError(name, f"it is {what}", f"Convert it to {known}, or leave it out", "not a cine")


def _is_text(head: bytes) -> bool:
    return not set(head) & (set(range(9)) | set(range(14, 32)))


def to_grey(rgb: np.ndarray) -> np.ndarray:
    """Luma of RGB uint8: (..., 3) -> (...), ITU-R BT.601, rounded."""
    if (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all():
        return np.ascontiguousarray(rgb[..., 0])
    return np.stack([(frame @ LUMA + 0.5).astype(np.uint8) for frame in rgb])


def is_coloured(rgb: np.ndarray) -> bool:
    """Whether (T, H, W, 3) uint8 shows colour, judged on up to 8 evenly spaced frames."""
    sample = rgb[np.linspace(0, len(rgb) - 1, min(8, len(rgb))).astype(int)].astype(np.int16)
    chroma = sample.max(-1) - sample.min(-1)
    return bool((chroma > COLOUR_LEVELS).mean() > COLOUR_SHARE)


def choose_colour(rgb: np.ndarray, color: str) -> np.ndarray:
    """RGB or its luma, as ``color`` asks."""
    if color == "rgb" or (color == "auto" and is_coloured(rgb)):
        return rgb
    return to_grey(rgb)


def plausible_fps(value: Any) -> float | None:
    """A frame rate as a float, None for what cannot be one (0, 1000 fps and more, text)."""
    try:
        fps = float(value)
    except (TypeError, ValueError):
        return None
    return fps if 1 <= fps < 1000 else None


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
        frames = choose_colour(frames, color) if frames.ndim == 4 else _grey_or_rgb(frames, color)
    return Cine(frames, None, "unknown")


# ---- video files -------------------------------------------------------------------------


def _read_video(path: Path, name: str, color: str) -> Cine:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise CineError(name, "it holds no video", "Leave it out", "not a cine")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps, claimed = plausible_fps(stream.average_rate), stream.frames
            frames, broken = _decode(container, stream, color, path, name)
    except av.FFmpegError as error:
        raise CineError(
            name, "it cannot be opened as a video (cut short or damaged)", "Copy or export it again"
        ) from error
    if not len(frames):
        raise CineError(name, "no frame of it can be decoded", "Copy or export it again")
    if broken or len(frames) < claimed:
        total = f" of {claimed}" if claimed else ""
        raise CineError(
            name,
            f"only {len(frames)}{total} frames could be decoded: it is cut short or damaged",
            "Copy or export it again",
        )
    source = "container" if fps else "unknown"
    return Cine(frames, fps, source)


def _decode(
    container: Any, stream: Any, color: str, path: Path, name: str
) -> tuple[np.ndarray, bool]:
    """All frames, and whether decoding broke off.

    The luma plane is read as it is; RGB is made only for what shows colour.

    Raises:
        CineError: the frames change their size, or are too many.
    """
    import av

    luma: list[np.ndarray] = []
    rgb: list[np.ndarray] = []
    coloured: bool | None = {"grey": False, "rgb": True}.get(color)
    broken, size = False, (stream.codec_context.height, stream.codec_context.width)
    check_size(path, name, (2, *size, 3))
    try:
        for frame in container.decode(stream):
            if (frame.height, frame.width) != size:
                if luma or rgb:
                    raise CineError(
                        name,
                        f"its frames change from {size[0]} x {size[1]} to "
                        f"{frame.height} x {frame.width}",
                        "Copy or export it again",
                    )
                size = (frame.height, frame.width)
            check_size(path, name, (max(len(luma), len(rgb)) + 1, *size, 3 if rgb else 1))
            planar = frame.format.name.startswith(("yuv", "gray", "nv12"))
            planar = planar and frame.format.components[0].bits == 8
            if coloured is not True and planar:
                luma.append(_luma(frame))
                if coloured is None and len(luma) % 16 == 1 and _shows_colour(frame):
                    coloured = True
                    container.seek(0)  # rare: start over in RGB
                    return _decode(container, stream, "rgb", path, name)
            else:
                rgb.append(frame.to_ndarray(format="rgb24"))
    except av.FFmpegError:
        broken = True
    if rgb:
        return choose_colour(np.stack(rgb), color), broken
    return np.stack(luma) if luma else np.empty((0, 1, 1), np.uint8), broken


def _plane(plane: Any) -> np.ndarray:
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width]


def _luma(frame: Any) -> np.ndarray:
    y = _plane(frame.planes[0])
    full = frame.format.name.startswith(("yuvj", "gray")) or frame.color_range == 2
    if full:
        return y.copy()
    return _EXPAND[y]


# limited-range (16..235) luma to 0..255
_EXPAND = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)


def _shows_colour(frame: Any) -> bool:
    if len(frame.planes) < 3:
        return False
    u, v = (_plane(p).astype(np.int16) - 128 for p in frame.planes[1:3])
    chroma = np.maximum(np.abs(u), np.abs(v)) * 1.8  # levels between channels, about
    return bool((chroma > COLOUR_LEVELS).mean() > COLOUR_SHARE)


# ---- NIfTI and ITK -----------------------------------------------------------------------


def _read_nifti(path: Path, name: str, color: str) -> Cine:
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
    frames = _to_uint8(np.swapaxes(array, 0, 2), name)  # (T, Y, X[, 3])
    unit = header.get_xyzt_units()[1]  # type: ignore[attr-defined]
    seconds = (zooms[2] if len(zooms) > 2 else 0) * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1)
    known = seconds > 0 and (unit != "unknown" or seconds < 0.5)  # 1 is the empty default
    fps = plausible_fps(1 / seconds) if known else None
    if frames.ndim == 4:
        frames = choose_colour(frames, color)
    return Cine(_grey_or_rgb(frames, color), fps, "header" if fps else "unknown",
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
        for key, found, value in [line.partition("=" if path.suffix.lower() != ".nrrd" else ":")]
        if found
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


def _read_itk(path: Path, name: str, color: str) -> Cine:
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
    frames = _to_uint8(array, name)
    if frames.ndim == 4:
        frames = choose_colour(frames[..., :3], color)
    fps = plausible_fps(1 / spacing[2]) if 0 < spacing[2] < 0.5 else None
    return Cine(_grey_or_rgb(frames, color), fps, "header" if fps else "unknown",
                (spacing[1], spacing[0]))  # fmt: skip


def _grey_or_rgb(frames: np.ndarray, color: str) -> np.ndarray:
    if color == "rgb" and frames.ndim == 3:
        return frames[..., None].repeat(3, -1)
    return np.ascontiguousarray(frames)


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 as it is; 0..255 in other types is rounded; the rest is stretched to 0..255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iuf" or not array.size:
        raise CineError(name, f"its values are of type {array.dtype}", "Save it as numbers")
    values = np.nan_to_num(array.astype(np.float32))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255 or (array.dtype.kind == "f" and high <= 1):
        values = (values - low) * (255 / max(high - low, 1e-12))
    return np.rint(values).astype(np.uint8)
