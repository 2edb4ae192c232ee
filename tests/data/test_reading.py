"""read_cine: right pixels, right time, clear refusals."""

from __future__ import annotations

import os

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discovr_monai.base.types import CineError
from discovr_monai.data.read.cine import read_cine
from tests.data.conftest import moving_blob, write_dicom, write_video

REAL = pydicom.examples.get_path("ybr_color")


def test_the_real_cine_equals_pydicom_pixel_by_pixel():
    cine = read_cine(REAL, color="rgb")
    expected = pydicom.pixels.pixel_array(REAL)
    assert cine.frames.shape == expected.shape == (30, 240, 320, 3)
    assert np.array_equal(cine.frames, expected)
    assert cine.fps == pytest.approx(30.0003, abs=1e-3)
    assert cine.fps_source == "FrameTime"
    assert cine.spacing == pytest.approx((1.021, 1.021), abs=1e-3)  # "19" cm deep, says the screen


def test_monais_reader_would_scramble_the_axes():
    """Why there is a reader of our own; should this fail, MONAI has mended it."""
    from monai.transforms import LoadImage

    other = np.asarray(LoadImage(image_only=True)(REAL))
    assert other.shape != (30, 240, 320, 3)


def test_grey_is_luma():
    rgb = pydicom.pixels.pixel_array(REAL).astype(float)
    luma = rgb @ [0.299, 0.587, 0.114]
    grey = read_cine(REAL).frames
    assert grey.shape == (30, 240, 320)
    assert np.abs(grey - luma).max() <= 0.51


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.avi", "mjpeg", "yuvj420p"), ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "libx264", "yuv420p"), ("a.mkv", "libx264", "yuv420p"),
    ],
)  # fmt: skip
def test_videos(tmp_path, name, codec, pixels):
    frames = moving_blob()
    options = {"crf": "4"} if codec == "libx264" else {}
    cine = read_cine(write_video(tmp_path / name, frames, 25, codec, pixels, options))
    assert cine.frames.shape == frames.shape
    assert np.abs(cine.frames.astype(int) - frames).mean() < 2  # limited range is expanded
    assert cine.fps == pytest.approx(25)
    assert cine.fps_source == "container"


def test_colour_is_noticed(tmp_path):
    grey = moving_blob()
    rgb = np.stack([grey, grey // 3, 255 - grey], -1)
    path = write_video(tmp_path / "c.mp4", rgb, codec="libx264", pixels="yuv420p")
    assert read_cine(path).frames.shape == (20, 32, 40, 3)
    assert read_cine(path, color="grey").frames.shape == (20, 32, 40)
    assert np.abs(read_cine(path).frames.astype(int) - rgb).mean() < 6


sizes = st.tuples(st.integers(2, 6), st.integers(2, 19), st.integers(2, 23))


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=sizes, seed=st.integers(0, 999))
def test_lossless_formats_round_trip(tmp_path, shape, seed):
    import itk
    import nibabel

    frames = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(frames.T, np.eye(4)), tmp_path / "a.nii.gz")
    itk.imwrite(itk.image_from_array(frames), str(tmp_path / "a.mha"))
    write_dicom(tmp_path / "a.dcm", frames)
    for name in ("a.nii.gz", "a.mha", "a.dcm"):
        assert np.array_equal(read_cine(tmp_path / name).frames, frames), name


def test_nifti_and_mhd_time_and_spacing(tmp_path):
    import itk
    import nibabel

    image = nibabel.Nifti1Image(moving_blob().T, np.diag([0.3, 0.4, 1, 1]))
    image.header.set_zooms((0.3, 0.4, 20.0))
    image.header.set_xyzt_units("mm", "msec")
    nibabel.save(image, tmp_path / "a.nii.gz")
    cine = read_cine(tmp_path / "a.nii.gz")
    assert (cine.fps, cine.fps_source) == (pytest.approx(50), "header")
    assert cine.spacing == pytest.approx((0.4, 0.3))
    for unit, zooms, spacing in (
        ("unknown", (1, 1), None),  # the empty default
        ("unknown", (0.3, 0.4), (0.4, 0.3)),
        ("meter", (3e-4, 4e-4), (0.4, 0.3)),
        ("micron", (300, 400), (0.4, 0.3)),
    ):
        image.header.set_zooms((*zooms, 20.0))
        image.header.set_xyzt_units(unit, "msec")
        nibabel.save(image, tmp_path / "b.nii.gz")
        found = read_cine(tmp_path / "b.nii.gz").spacing
        assert found == (spacing and pytest.approx(spacing)), unit
    other = itk.image_from_array(moving_blob())
    other.SetSpacing([0.3, 0.4, 0.02])
    itk.imwrite(other, str(tmp_path / "a.mhd"))
    cine = read_cine(tmp_path / "a.mhd")
    assert cine.fps == pytest.approx(50)
    assert cine.spacing == pytest.approx((0.4, 0.3))


@pytest.mark.parametrize(
    ("tags", "fps", "source"),
    [
        ({"FrameTime": 20, "CineRate": 99}, 50, "FrameTime"),
        ({"FrameTimeVector": [0, 25, 25, 25], "CineRate": 99}, 40, "FrameTimeVector"),
        ({"FrameTime": 0, "CineRate": 33}, 33, "CineRate"),
        ({"RecommendedDisplayFrameRate": 30}, 30, "RecommendedDisplayFrameRate"),
        ({}, None, "unknown"),
    ],
)
def test_where_the_frame_rate_comes_from(tmp_path, tags, fps, source):
    cine = read_cine(write_dicom(tmp_path / "a.dcm", moving_blob(), **tags))
    assert (cine.fps, cine.fps_source) == (fps, source)


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEG2000Lossless", "JPEGLSLossless"])
def test_compressed_dicom(tmp_path, syntax):
    frames = moving_blob()
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", frames))
    dataset.compress(getattr(pydicom.uid, syntax))
    dataset.save_as(tmp_path / "b")  # no suffix: the content decides
    assert np.array_equal(read_cine(tmp_path / "b").frames, frames)


def test_dicom_photometrics(tmp_path):
    frames = moving_blob()
    dark = write_dicom(tmp_path / "m1.dcm", frames, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(read_cine(dark).frames, 255 - frames)
    wide = write_dicom(tmp_path / "m16.dcm", frames.astype(np.uint16) * 257)
    assert np.array_equal(read_cine(wide).frames, frames)
    rgb = np.stack([frames, frames, 255 - frames], -1)
    assert np.array_equal(read_cine(write_dicom(tmp_path / "rgb.dcm", rgb)).frames, rgb)
    ramp = np.arange(256, dtype=np.uint16) * 257
    tables = {}
    for colour, table in (("Red", ramp), ("Green", ramp), ("Blue", ramp[::-1])):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tables[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    palette = write_dicom(
        tmp_path / "p.dcm", frames, PhotometricInterpretation="PALETTE COLOR", **tables
    )
    assert np.array_equal(read_cine(palette).frames, rgb)


def broken(tmp_path, kind):
    video = write_video(tmp_path / "whole.avi", moving_blob(60))
    dicom = write_dicom(tmp_path / "whole.dcm", moving_blob())
    target = tmp_path / kind
    if kind == "cut.avi":
        target.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    elif kind == "cut.dcm":
        target.write_bytes(dicom.read_bytes()[:-5000])
    elif kind == "still.dcm":
        write_dicom(target, moving_blob(1))
    elif kind == "more.dcm":
        write_dicom(target, moving_blob(), NumberOfFrames=30)
    elif kind == "fewer.dcm":
        write_dicom(target, moving_blob(), NumberOfFrames=7)
    elif kind == "empty.avi":
        target.write_bytes(b"")
    elif kind.startswith("random"):
        target.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "notes.txt":
        target.write_text("Mrs Smith")
    elif kind == "one.avi":
        write_video(target, moving_blob(1))
    return target


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut.avi", r"cut.avi: (only \d+ of 60 frames could be decoded|it cannot be opened)"),
        ("cut.dcm", "cut.dcm: .*cut short or damaged"),
        ("still.dcm", "still.dcm: it is a still: one frame. Only cines"),
        ("more.dcm", "more.dcm: .*(30 frames|cut short)"),
        ("fewer.dcm", "fewer.dcm: .*(claims 7 frames|cut short or damaged: 7 frames)"),
        ("empty.avi", r"empty.avi: it is empty \(0 bytes\). Copy it again"),
        ("random.mp4", "random.mp4: it cannot be opened as a video"),
        ("random.dcm", "random.dcm: it is not valid DICOM"),
        ("random.nii.gz", "random.nii.gz: it cannot be read as NIfTI"),
        ("random.mha", "random.mha: its header says nothing"),
        ("random", "random: it is not a cine format that we know"),
        ("notes.txt", "notes.txt: it is text. Convert it to AVI"),
        ("one.avi", "one.avi: it is a still"),
        ("missing.avi", "missing.avi: it does not exist"),
    ],
)
def test_bad_files_are_named_with_a_remedy(tmp_path, kind, message):
    with pytest.raises(CineError, match=message) as caught:
        read_cine(broken(tmp_path, kind))
    assert str(tmp_path) not in str(caught.value)
    assert "Smith" not in str(caught.value)


SR = "1.2.840.10008.5.1.4.1.1.88.33"  # Comprehensive SR
VOLUME = "1.2.840.10008.5.1.4.1.1.6.2"  # Enhanced US Volume
CUT = "a.dcm: it describes an image but holds no pixels: it may be cut short. Export it again"


def without_pixels(tmp_path, leave_out=(), **tags):
    """A DICOM file that ends where the pixels would begin."""
    path = write_dicom(tmp_path / "a.dcm", moving_blob(), **tags)
    dataset = pydicom.dcmread(path)
    for keyword in ("PixelData", *leave_out):
        del dataset[keyword]
    dataset.file_meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", "1.2.3.4")
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    ("leave_out", "tags"),
    [
        ((), {}),  # Ultrasound Multi-frame
        (("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"), {}),  # cut still earlier
        (("Rows", "Columns"), {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4"}),
        (("Rows", "Columns"), {"SOPClassUID": VOLUME}),
        ((), {"SOPClassUID": "1.2.3.4"}),  # of nobody knows which class, but with a size
        (("SOPClassUID",), {}),
    ],
)
def test_an_image_without_pixels_may_be_cut_short(tmp_path, leave_out, tags):
    with pytest.raises(CineError, match=CUT) as caught:
        read_cine(without_pixels(tmp_path, leave_out, **tags))
    assert caught.value.kind == "unreadable"


@pytest.mark.parametrize("uid", [SR, "1.2.840.10008.5.1.4.1.1.104.1", "1.2.3.4"])
def test_what_is_no_image_is_no_cine(tmp_path, uid):
    size = ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames")
    message = r"a.dcm: it holds no pixels \(a report\?\). Leave it out"
    with pytest.raises(CineError, match=message) as caught:
        read_cine(without_pixels(tmp_path, size, SOPClassUID=uid))
    assert caught.value.kind == "not a cine"


def test_dicom_cut_anywhere_is_cut_short(tmp_path):
    whole = write_dicom(tmp_path / "whole.dcm", moving_blob(4, 16, 16)).read_bytes()
    for end in range(1, len(whole)):
        (tmp_path / "a.dcm").write_bytes(whole[:end])
        with pytest.raises(CineError, match="cut short") as caught:
            read_cine(tmp_path / "a.dcm")
        assert caught.value.kind == "unreadable"


def test_unreadable_permissions(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.avi", moving_blob())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CineError, match="a.avi: no permission to read it. Change its permissions"):
        read_cine(path)


def test_no_tag_of_the_patient_gets_out(tmp_path):
    cine = read_cine(write_dicom(tmp_path / "a.dcm", moving_blob()))
    assert "MRN" not in repr(cine)
    assert "Smith" not in repr(cine)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.binary(max_size=400),
    head=st.sampled_from([b"", b"RIFF\0\0\0\0AVI LIST", b"\0\0\0\x18ftypmp42", b"\0" * 128 + b"DICM", b"\x93NUMPY\x01\0", b"\x1f\x8b\x08\0", b"\x1aE\xdf\xa3"]),
    suffix=st.sampled_from([".avi", ".mp4", ".dcm", ".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".npy", "", ".txt"]),
)  # fmt: skip
def test_any_bytes_get_one_clear_error(tmp_path, content, head, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(head + content)
    with pytest.raises(CineError) as error:
        read_cine(path)
    assert str(error.value).startswith(f"x{suffix}: ") and str(tmp_path) not in str(error.value)
