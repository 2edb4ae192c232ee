"""Which library decodes cines fastest? Alternated in one run; only the ratios count.

    pip install opencv-python-headless; pip install --no-deps decord   # for this comparison only
    python benchmarks/speed/video_backend.py

Compares on 112 x 112 MJPEG AVI and H.264 MP4: our reader (PyAV, luma plane as it is), PyAV
converted to grey, OpenCV (BGR, first channel taken as grey) and decord (RGB, likewise).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from discovr_monai.data.read.cine import read_cine
from discovr_monai.phantom.cine import simulate_cine

FRAMES, ROUNDS = 480, 15


def write(path: Path, frames: np.ndarray, codec: str, pixels: str) -> Path:
    """One file of each kind."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=50)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = pixels
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        out.mux(stream.encode())
    return path


def ours(path: Path) -> int:
    """read_cine, grey."""
    return len(read_cine(path, color="grey").frames)


def pyav_grey(path: Path) -> int:
    """PyAV with libswscale's conversion."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        return len(np.stack([f.to_ndarray(format="gray") for f in container.decode(video=0)]))


def opencv(path: Path) -> int:
    """OpenCV's VideoCapture."""
    import cv2

    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        good, frame = capture.read()
        if not good:
            return len(np.stack(frames))
        frames.append(frame[..., 0].copy())


def decord_rgb(path: Path) -> int:
    """decord's VideoReader, all frames in one batch."""
    import decord

    reader = decord.VideoReader(str(path))
    return len(reader.get_batch(range(len(reader))).asnumpy()[..., 0])


def main() -> None:
    """Prints frames a second (median, quartiles) and ratios to ours."""
    backends: dict[str, Callable[[Path], int]] = {"ours": ours, "PyAV to grey": pyav_grey}
    try:
        import cv2  # noqa: F401

        backends["OpenCV"] = opencv
    except ImportError:
        print("OpenCV is not installed: left out")
    try:
        import decord  # noqa: F401

        backends["decord"] = decord_rgb
    except ImportError:
        print("decord is not installed: left out")
    frames = np.concatenate([simulate_cine(s).frames for s in range(FRAMES // 96)])
    with tempfile.TemporaryDirectory() as folder:
        files = [
            write(Path(folder) / "a.avi", frames, "mjpeg", "yuvj420p"),
            write(Path(folder) / "a.mp4", frames, "libx264", "yuv420p"),
        ]
        for file in files:
            rates: dict[str, list[float]] = {name: [] for name in backends}
            for _ in range(ROUNDS):
                for name, backend in backends.items():
                    start = time.perf_counter()
                    count = backend(file)
                    rates[name].append(count / (time.perf_counter() - start))
                    assert count == FRAMES, (name, count)
            print(f"{file.suffix[1:]}, {FRAMES} frames of 112 x 112, {ROUNDS} rounds:")
            base = np.array(rates["ours"])
            for name, of_rounds in rates.items():
                low, middle, high = np.percentile(of_rounds, [25, 50, 75])
                ratio = float(np.median(base / np.array(of_rounds)))
                print(
                    f"  {name:14s} {middle:7.0f} frames/s [{low:.0f}, {high:.0f}]"
                    f"  ours is {ratio:.2f} x"
                )


if __name__ == "__main__":
    main()
