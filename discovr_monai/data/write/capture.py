"""Label maps of a DICOM cine as a cine with outlines, for what a Segmentation cannot serve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from discovr_monai.base.notice import NOTICE
from discovr_monai.data.read.dicom import frame_rate
from discovr_monai.data.write.derived import (
    MAKER,
    clean_text,
    new_dataset,
    open_source,
    quiet,
    save_dataset,
)

OUTLINES = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167),
            (213, 94, 0))  # RGB by label, apart for colour-blind eyes  # fmt: skip


def write_secondary_capture(
    path: Path, frames: np.ndarray, source: Path, model: str, *, name: str | None = None
) -> None:
    """Writes a Multi-frame True Color Secondary Capture with a notice burned in below.

    For what a Segmentation cannot refer to, and for viewers that show no Segmentation without a
    Frame of Reference. Where the source has no Study Instance UID, a new study is made.

    The file is as identifying as its source, its pixels included: keep it beside it.

    Args:
        path: written under a temporary name and renamed.
        frames: (T, H, W, 3) RGB uint8, such as :func:`draw_outlines` makes.
        source: the cine's DICOM file, for the patient, the study and the pace.
        model: a hash or name of what made the labels.
        name: what errors call the source; its file name if None.

    Raises:
        CineError: the source is no DICOM.
        ValueError: for other frames.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} of shape {frames.shape}, not (T, H, W, 3)")
    with quiet():
        cine = open_source(source, name or source.name, path)
        marked = np.concatenate((frames, _notice(len(frames), frames.shape[2])), 1)
        seed = (str(cine.get("SOPInstanceUID")), model, str(frames.shape), frames.tobytes())
        dataset = new_dataset(cine, "OT", "1.2.840.10008.5.1.4.1.1.7.4", seed)
        dataset.ImageType = ["DERIVED", "SECONDARY"]
        dataset.ConversionType = "WSD"
        dataset.SeriesDescription = NOTICE
        dataset.DerivationDescription = f"Outlines drawn by {MAKER} {clean_text(model)}"
        # the source's screen may show whose it is
        clean = cine.get("BurnedInAnnotation") == "NO"
        dataset.BurnedInAnnotation = "NO" if clean else "YES"
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = marked.shape[:3]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
        dataset.PlanarConfiguration = 0
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        fps, _ = frame_rate(cine)
        if fps:
            dataset.FrameTime = f"{1000 / fps:.6f}"[:16]
            dataset.FrameIncrementPointer = 0x00181063
        else:  # no made-up pace: its frames are pages
            dataset.PageNumberVector = list(range(1, len(marked) + 1))
            dataset.FrameIncrementPointer = 0x00182001
        save_dataset(dataset, marked.tobytes(), path)


def draw_outlines(frames: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Outlines of labels on frames.

    Args:
        frames: (T, H, W) or (T, H, W, 3) uint8.
        labels: (T, H, W), 0 background.

    Returns:
        (T, H, W, 3) uint8; each label's border pixels in its colour.
    """
    out = frames.copy() if frames.ndim == 4 else frames[..., None].repeat(3, -1)
    plane = np.ones((1, 3, 3), bool)
    for label in np.unique(labels[labels > 0]):
        filled = labels == label
        border = filled & ~ndimage.binary_erosion(filled, plane)
        out[border] = OUTLINES[(int(label) - 1) % len(OUTLINES)]
    return out


def _notice(count: int, width: int) -> np.ndarray:
    """(count, h, width, 3) uint8: a black band with the notice in as many lines as it takes."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    lines: list[str] = []
    for word in NOTICE.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width - 4:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    band = Image.new("RGB", (width, 15 * len(lines) + 4))
    ImageDraw.Draw(band).text((2, 1), "\n".join(lines), (255, 255, 255), font)
    return np.asarray(band)[None].repeat(count, 0)
