"""Small cines of our own making, and a home that is not the user's."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def private_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DISCOVR_MONAI_SALT", raising=False)


def moving_blob(frames=20, height=32, width=40, seed=0) -> np.ndarray:
    """(T, H, W) uint8, smooth so that video codecs keep it."""
    t, y, x = np.ogrid[:frames, :height, :width]
    phase = 2 * np.pi * t / frames + seed
    centre_y, centre_x = height / 2 + 5 * np.sin(phase), width / 2 + 5 * np.cos(phase)
    blob = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / 60)
    return (30 + 200 * blob).astype(np.uint8)


def write_video(path, frames, fps=30, codec="mjpeg", pixels="yuvj420p", options=None):
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        if codec == "mjpeg":
            stream.codec_context.qmin = stream.codec_context.qmax = 2
        kind = "gray" if frames.ndim == 3 else "rgb24"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=kind)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


def write_dicom(path, pixels, **tags):
    """Uncompressed multi-frame ultrasound; pixels (T, H, W) or (T, H, W, 3)."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        pydicom.uid.generate_uid(),
    )
    dataset.PatientID, dataset.PatientName = "MRN-777", "Smith^Mary"
    dataset.NumberOfFrames = len(pixels)
    dataset.Rows, dataset.Columns = pixels.shape[1:3]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 4 else 1
    if pixels.ndim == 4:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 4 else "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def said_by(tool, *files) -> list[str]:
    """The lines of one of the dicom3tools."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (Debian package dicom3tools) is not installed")
    done = subprocess.run([tool, *map(str, files)], capture_output=True, timeout=60)
    return (done.stdout + done.stderr).decode("latin-1").splitlines()
