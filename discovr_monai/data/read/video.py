"""AVI, MP4, MOV and MKV to frames, by FFmpeg's libraries (PyAV)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.types import Cine, CineError
from discovr_monai.data.read.pixels import (
    COLOUR_LEVELS,
    COLOUR_SHARE,
    check_size,
    choose_colour,
    plausible_fps,
)


def read_video(path: Path, name: str, color: str) -> Cine:
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
