"""Cines as ultrasound DICOM: valid by dciodvfy, and read back as they were."""

from __future__ import annotations

import itertools

import numpy as np
import pydicom
import pytest

from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.write.dicom import deidentified_tags, write_dicom
from tests.data.conftest import moving_blob, said_by

GREY = moving_blob(6, 32, 40)
FRAMES = {
    "grey": GREY,
    "colour": np.stack([GREY, GREY // 2, 255 - GREY], -1),
    "odd": GREY[:3, :31, :39],  # an odd number of bytes
    "still": GREY[:1],
}
GEOMETRY = {
    "nothing": {},
    "spacing": {"spacing": (0.4, 0.25)},
    "region": {"region": (2, 3, 37, 29)},
    "both": {"spacing": (0.4, 0.25), "region": (2, 3, 37, 29)},
}
TAGS = {
    "none": {},
    "a patient": {"PatientID": "MRN1", "PatientName": "Smith^Anna"},
    "cleaned": deidentified_tags("p123"),
}
VARIANTS = list(itertools.product(FRAMES, (None, 33.3), GEOMETRY, TAGS))


@pytest.mark.parametrize("kind", FRAMES)
def test_every_variant_is_valid(tmp_path, kind):
    for frames, fps, geometry, tags in VARIANTS:
        if frames == kind:
            path = tmp_path / f"{fps} {geometry} {tags}.dcm"
            write_dicom(path, FRAMES[kind], fps=fps, **GEOMETRY[geometry], tags=TAGS[tags])
            lines = said_by("dciodvfy", path)
            assert "USMultiFrameImage" in lines, path.name
            assert [line for line in lines if "Error" in line] == [], path.name


@pytest.mark.parametrize("keyword", ["PatientOrientation", "FrameTime", "BodyPartExamined"])
def test_dciodvfy_would_notice(tmp_path, keyword):
    path = tmp_path / "a.dcm"
    write_dicom(path, GREY)
    dataset = pydicom.dcmread(path)
    del dataset[keyword]
    dataset.save_as(path)
    assert any("Error" in line for line in said_by("dciodvfy", path))


@pytest.mark.parametrize("kind", ["grey", "colour", "odd"])
@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("fps", [None, 33.3])
def test_cines_come_back(tmp_path, kind, geometry, fps):
    """What is unknown stays unknown: no pace, no millimetres are made up."""
    write_dicom(tmp_path / "a.dcm", FRAMES[kind], fps=fps, **GEOMETRY[geometry])
    cine = read_cine(tmp_path / "a.dcm")
    assert np.array_equal(cine.frames, FRAMES[kind])
    assert cine.fps == (None if fps is None else pytest.approx(fps, abs=1e-4))
    assert cine.fps_source == ("unknown" if fps is None else "FrameTime")
    known = "spacing" in GEOMETRY[geometry]
    assert cine.spacing == (pytest.approx((0.4, 0.25)) if known else None)
    inside = (slice(3, 30), slice(2, 38))
    whole = (slice(0, cine.frames.shape[1]), slice(0, cine.frames.shape[2]))
    described = {"nothing": None, "spacing": whole, "region": inside, "both": inside}
    assert cine.region == described[geometry]
