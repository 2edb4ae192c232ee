"""Label maps as DICOM: valid by dciodvfy, filed with their source, read back to the pixel."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import CineError
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.write.capture import draw_outlines, write_secondary_capture
from discovr_monai.data.write.dicom import deidentified_tags, write_dicom
from discovr_monai.data.write.labels import write_dicom_labels
from discovr_monai.data.write.segmentation import CODES, write_dicom_segmentation
from tests.data.conftest import moving_blob, said_by

REAL = Path(pydicom.examples.get_path("ybr_color"))
STRUCTURES = ("lv_cavity", "myocardium", "left_atrium")
MODEL = "0123abcd"
SHAPE = (6, 33, 45)  # of odd size: no frame fills whole bytes
EXAMINED = {
    "PatientName": "Smith^Mary",
    "PatientID": "MRN-777",
    "PatientBirthDate": "19500102",
    "PatientSex": "F",
    "StudyDate": "20240506",
    "StudyTime": "070809.5",
    "StudyID": "S1",
    "AccessionNumber": "A2",
    "ReferringPhysicianName": "Jones^A",
}
# what dciodvfy may remark upon, all of it taken over from the source
REMARKS = (
    "needed to build DICOMDIR - (Patient ID|Study (Date|Time|ID))",  # the source has none
    "Patient's Name .* Retired Person Name form",  # pydicom's cine: PLA, without a family name
)


def complaints(path) -> list[str]:
    """What dciodvfy has against a file, but for the remarks above."""
    lines = said_by("dciodvfy", path)
    assert lines, "dciodvfy said nothing, not even what it read"
    found = [line for line in lines if re.search("Error|Warning", line)]
    return [line for line in found if not any(re.search(r, line) for r in REMARKS)]


def disagreements(source, path) -> list[str]:
    """What dcentvfy finds to differ between two files of one patient and study."""
    return [line for line in said_by("dcentvfy", source, path) if "Error" in line]


def ultrasound(path, shape=SHAPE, fps=40.0, **tags) -> Path:
    """A plain Ultrasound Multi-frame; a tag of None is left out."""
    write_dicom(path, moving_blob(*shape), fps=fps, spacing=(0.4, 0.3), tags=EXAMINED)
    dataset = pydicom.dcmread(path)
    with pydicom.config.disable_value_validation():
        for keyword, value in tags.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)
        dataset.save_as(path)
    return path


def heart(shape=SHAPE) -> np.ndarray:
    """Three structures, each in other frames, none in the last."""
    labels = np.zeros(shape, np.uint8)
    labels[:4, 5:20, 8:20] = 2
    labels[1:4, 8:17, 10:18] = 1
    labels[4:5, 22:30, 3:9] = 3
    return labels


def segments(path, shape) -> np.ndarray:
    """(T, H, W) labels of a Segmentation, by nothing but what its frames say."""
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array.reshape(-1, *shape[1:])
    out = np.zeros(shape, np.uint8)
    for frame, item in zip(pixels, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        origin = item.DerivationImageSequence[0].SourceImageSequence[0]
        number = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert ("ReferencedFrameNumber" in origin) == (len(out) > 1)  # a still as a whole
        place = out[int(origin.get("ReferencedFrameNumber", 1)) - 1]
        assert frame.any()
        assert not place[frame == 1].any()
        place[frame == 1] = number
    return out


def source_of(kind, folder) -> Path:
    """The kinds of cine that labels are written of."""
    path = folder / "cine.dcm"
    if kind == "plain":
        return ultrasound(path)
    if kind == "with a frame of reference":
        return ultrasound(path, FrameOfReferenceUID="1.2.3.4", PositionReferenceIndicator="")
    if kind == "bare":
        write_dicom(path, moving_blob(*SHAPE))
        return path
    if kind == "de-identified":
        write_dicom(path, moving_blob(*SHAPE), tags=deidentified_tags("p123"))
        return path
    if kind == "lossy":
        return ultrasound(path, LossyImageCompression="01", LossyImageCompressionRatio="12",
                          LossyImageCompressionMethod="ISO_10918_1")  # fmt: skip
    if kind == "lossy, nobody knows how":
        return ultrasound(path, LossyImageCompression="01")
    if kind == "of one frame":
        return ultrasound(path, (1, *SHAPE[1:]))
    assert kind == "real"
    return Path(shutil.copy(REAL, path))


SHAPES = {"real": (30, 240, 320), "of one frame": (1, *SHAPE[1:])}  # (T, H, W), else SHAPE
KINDS = (
    "plain",
    "with a frame of reference",
    "bare",
    "de-identified",
    "lossy",
    "lossy, nobody knows how",
    "real",
)


# ---- Segmentation --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "of one frame"])
def test_a_segmentation_is_valid_and_equals_the_labels(tmp_path, kind):
    source, out = source_of(kind, tmp_path), tmp_path / "out" / "labels.dcm"
    shape = SHAPES.get(kind, SHAPE)
    labels = heart(shape)
    assert write_dicom_labels(out, labels, STRUCTURES, source, MODEL) == "segmentation"
    assert np.array_equal(segments(out, shape), labels)
    assert complaints(out) == []
    assert disagreements(source, out) == []
    assert [f.name for f in out.parent.iterdir()] == ["labels.dcm"]  # nothing temporary


@pytest.mark.parametrize("kind", ["plain", "with a frame of reference", "real", "of one frame"])
def test_highdicom_reads_the_same_labels(tmp_path, kind):
    hd = pytest.importorskip("highdicom", reason="highdicom is not installed")
    source, out = source_of(kind, tmp_path), tmp_path / "labels.dcm"
    labels = heart(SHAPES.get(kind, SHAPE))
    write_dicom_segmentation(out, labels, STRUCTURES, source, MODEL)
    seg, instance = hd.seg.segread(out), pydicom.dcmread(source).SOPInstanceUID
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True}
    if len(labels) == 1:
        found = seg.get_pixels_by_source_instance([instance], **options)
    else:
        frames = range(1, len(labels) + 1)
        found = seg.get_pixels_by_source_frame(instance, frames, **options)
    assert np.array_equal(found, labels)


def test_dciodvfy_would_notice(tmp_path):
    """That what the test above relies on is checked at all."""
    out = tmp_path / "labels.dcm"
    write_dicom_labels(out, heart(), STRUCTURES, source_of("plain", tmp_path), MODEL)
    dataset = pydicom.dcmread(out)
    for item in dataset.PerFrameFunctionalGroupsSequence:
        del item.DerivationImageSequence
    dataset.save_as(out)
    assert any("FrameOfReferenceUID" in line for line in complaints(out))


@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.tuples(st.integers(2, 5), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 999),
    share=st.sampled_from([0.02, 0.3, 1.0]),
)
def test_any_labels_come_back_to_the_pixel(tmp_path, shape, seed, share):
    rng = np.random.default_rng(seed)
    labels = (rng.integers(0, 4, shape) * (rng.random(shape) < share)).astype(np.uint8)
    labels[0, 0, 0] = 2
    write_dicom(tmp_path / "a.dcm", moving_blob(*shape))
    write_dicom_segmentation(tmp_path / "b.dcm", labels, STRUCTURES, tmp_path / "a.dcm", MODEL)
    assert np.array_equal(segments(tmp_path / "b.dcm", shape), labels)
    stored = sum(bool((frame == n).any()) for frame in labels for n in (1, 2, 3))
    assert pydicom.dcmread(tmp_path / "b.dcm").NumberOfFrames == stored


def test_what_a_segmentation_says(tmp_path):
    source, out = ultrasound(tmp_path / "a.dcm"), tmp_path / "b.dcm"
    write_dicom_segmentation(out, heart(), (*STRUCTURES, "valve plane"), source, MODEL)
    image, seg = pydicom.dcmread(source), pydicom.dcmread(out)
    for keyword in (*EXAMINED, "StudyInstanceUID"):
        assert seg[keyword].value == image[keyword].value, keyword
    assert seg.Modality == "SEG"
    assert seg.SegmentationType == "BINARY"
    assert "FrameOfReferenceUID" not in seg
    assert seg.SeriesInstanceUID != image.SeriesInstanceUID
    for keyword in ("SeriesDescription", "ContentDescription"):
        assert seg[keyword].value == NOTICE, keyword
    series = seg.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == image.SeriesInstanceUID
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    assert [s.SegmentNumber for s in seg.SegmentSequence] == [1, 2, 3, 4]  # the last never seen
    assert [s.SegmentLabel for s in seg.SegmentSequence] == [
        "lv cavity", "myocardium", "left atrium", "valve plane",
    ]  # fmt: skip
    kinds = [s.SegmentedPropertyTypeCodeSequence[0] for s in seg.SegmentSequence]
    assert [k.CodeValue for k in kinds] == ["87878005", "49848007", "82471001", "91723000"]
    assert {k.CodingSchemeDesignator for k in kinds} == {"SCT"}
    for item in seg.SegmentSequence:
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        assert item.SegmentAlgorithmName == f"discovr-monai {MODEL}"
    frames = seg.PerFrameFunctionalGroupsSequence
    index = [list(f.FrameContentSequence[0].DimensionIndexValues) for f in frames]
    assert index == [[1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [2, 3], [2, 4], [3, 5]]
    for f in frames:
        origin = f.DerivationImageSequence[0].SourceImageSequence[0]
        assert origin.ReferencedSOPClassUID == image.SOPClassUID
        assert origin.ReferencedSOPInstanceUID == image.SOPInstanceUID


def test_the_codes_are_those_of_dicom():
    """Value and meaning, by pydicom's copy of PS3.16."""
    official = {
        "lv_cavity": codes.SCT.LeftVentricle,
        "left_ventricle": codes.SCT.LeftVentricle,
        "myocardium": codes.SCT.LeftVentricleMyocardium,
        "lv_myocardium": codes.SCT.LeftVentricleMyocardium,
        "left_atrium": codes.SCT.LeftAtrium,
        "right_ventricle": codes.SCT.RightVentricle,
        "right_atrium": codes.SCT.RightAtrium,
    }
    assert {k: (c.value, c.meaning) for k, c in official.items()} == CODES


def identifiers(path) -> tuple[str, str]:
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    assert pydicom.uid.UID(dataset.SOPInstanceUID).is_valid
    return dataset.SOPInstanceUID, dataset.SeriesInstanceUID


def test_identifiers_follow_from_what_was_written(tmp_path):
    source, other = ultrasound(tmp_path / "a.dcm"), ultrasound(tmp_path / "other.dcm")
    labels = heart()
    moved = np.roll(labels, 1, 2)

    def write(labels=labels, structures=STRUCTURES, source=source, model=MODEL):
        write_dicom_segmentation(tmp_path / "b.dcm", labels, structures, source, model)
        return identifiers(tmp_path / "b.dcm")

    first = write()
    assert write(labels.astype(np.int64)) == first
    assert len({*first, *write(moved), *write(model="other"), *write(source=other),
                *write(structures=("lv_cavity", "myocardium", "la"))}) == 10  # fmt: skip


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 144", "Люкceмбypг"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        ("ISO_IR 192", "Ώ^ß"),
    ],
)
def test_names_of_any_script_come_over(tmp_path, charset, name):
    source = ultrasound(tmp_path / "a.dcm", SpecificCharacterSet=charset, PatientName=name)
    write_dicom_segmentation(tmp_path / "b.dcm", heart(), ("höhle", "b", "c"), source, MODEL)
    found = pydicom.dcmread(tmp_path / "b.dcm")
    assert str(found.PatientName) == name
    assert found.SegmentSequence[0].SegmentLabel == "h_hle"  # of what every set has
    assert disagreements(source, tmp_path / "b.dcm") == []  # byte by byte
    assert [c for c in complaints(tmp_path / "b.dcm") if "Error" in c] == []


def test_what_the_source_breaks_is_left_out(tmp_path):
    source = ultrasound(
        tmp_path / "a.dcm", PatientBirthDate="2.1.1950", PatientSex="female?", StudyTime="noon",
        StudyDescription=["a", "b"], ReferringPhysicianName="Jones\x07", StudyID=["1", "2"],
        StudyDate=None, AccessionNumber=None, LossyImageCompression="maybe",
        LossyImageCompressionRatio="12",
    )  # fmt: skip
    write_dicom_labels(tmp_path / "b.dcm", heart(), STRUCTURES, source, MODEL)
    assert complaints(tmp_path / "b.dcm") == []
    found = pydicom.dcmread(tmp_path / "b.dcm")
    for keyword in ("PatientBirthDate", "PatientSex", "StudyTime", "StudyID", "StudyDate"):
        assert found[keyword].value in ("", None), keyword
    assert found.PatientID == "MRN-777"
    assert "StudyDescription" not in found
    assert found.LossyImageCompression == "00"
    assert "LossyImageCompressionRatio" not in found


def test_identity_comes_over_even_if_it_is_invalid(tmp_path, caplog):
    """Else an archive would file it elsewhere than its source."""
    source = ultrasound(tmp_path / "a.dcm", PatientID="x" * 70, StudyInstanceUID="1.2.003.4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom's quote what they find wrong
        write_dicom_segmentation(tmp_path / "b.dcm", heart(), STRUCTURES, source, MODEL)
    assert not caplog.records
    with pydicom.config.disable_value_validation():
        found = pydicom.dcmread(tmp_path / "b.dcm")
        assert found.PatientID == "x" * 70
        assert found.StudyInstanceUID == "1.2.003.4"


def test_odd_names_of_models_and_structures(tmp_path):
    source = ultrasound(tmp_path / "a.dcm")
    names = ("a\\b\n", "y" * 99, "c")
    write_dicom_segmentation(tmp_path / "b.dcm", heart(), names, source, "best\\model " * 20)
    assert complaints(tmp_path / "b.dcm") == []
    labels = [s.SegmentLabel for s in pydicom.dcmread(tmp_path / "b.dcm").SegmentSequence]
    assert labels == ["a_b_", "y" * 64, "c"]
    with pytest.raises(ValueError, match="names no model or structure: give it a name"):
        write_dicom_segmentation(tmp_path / "b.dcm", heart(), STRUCTURES, source, " ")


def test_segmentation_errors(tmp_path):
    source, out, labels = ultrasound(tmp_path / "a.dcm"), tmp_path / "b.dcm", heart()
    for write in (write_dicom_segmentation, write_dicom_labels):
        with pytest.raises(CineError, match=r"^x/a: it has 6 frames of 33 x 45, the labels 5 of"):
            write(out, labels[:5], STRUCTURES, source, MODEL, name="x/a")
        with pytest.raises(CineError, match=r"^a.dcm: no structure was found in any of its frames"):
            write(out, labels * 0, STRUCTURES, source, MODEL)
        with pytest.raises(ValueError, match="labels run from 0 to 3, but must be 0 to 2"):
            write(out, labels, STRUCTURES[:2], source, MODEL)
        with pytest.raises(CineError, match="^none.dcm: it does not exist"):
            write(out, labels, STRUCTURES, tmp_path / "none.dcm", MODEL)
        with pytest.raises(CineError, match="^a.dcm: its labels would overwrite it"):
            write(source, labels, STRUCTURES, source, MODEL)
        (tmp_path / "a.avi").write_bytes(b"RIFF" + bytes(200))
        with pytest.raises(CineError, match="^a.avi: it is not DICOM. Write its labels as NIfTI"):
            write(out, labels, STRUCTURES, tmp_path / "a.avi", MODEL)
        (tmp_path / "cut.dcm").write_bytes(source.read_bytes()[:140])
        with pytest.raises(CineError, match="^cut.dcm: it "):
            write(out, labels, STRUCTURES, tmp_path / "cut.dcm", MODEL)
    assert not out.exists()
    assert len(read_cine(source).frames) == 6
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_dicom_segmentation(tmp_path / "folder", labels, STRUCTURES, source, MODEL)
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left
    hostile = ultrasound(tmp_path / "c.dcm")
    dataset = pydicom.dcmread(hostile)
    dataset.NumberOfFrames = None
    dataset.save_as(hostile)
    with pytest.raises(CineError, match="c.dcm: it has 0 frames"):
        write_dicom_segmentation(out, labels, STRUCTURES, hostile, MODEL)


@pytest.mark.filterwarnings("ignore:The value length", "ignore:Invalid value")
def test_damaged_headers_give_a_file_or_one_sentence(tmp_path):
    source, out = ultrasound(tmp_path / "a.dcm"), tmp_path / "b.dcm"
    whole = source.read_bytes()
    header = len(whole) - np.prod(SHAPE) - 12
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(132, header, 3):
            content[place] = rng.integers(0, 256)
        source.write_bytes(content)
        out.unlink(missing_ok=True)
        try:
            write_dicom_labels(out, heart(), STRUCTURES, source, MODEL)
        except CineError as error:
            refused += 1
            assert str(error).startswith("a.dcm: ")
            assert not out.exists()
        else:
            assert pydicom.dcmread(out).NumberOfFrames
    assert 10 < refused < 140  # both happen
    source.write_bytes(whole.replace(b"\x20\x00\x10\x00SH", b"\x20\x00\x10\x00S\x9d"))
    with pytest.raises(CineError, match=r"^a.dcm: its header cannot be read \(NotImpl"):
        write_dicom_labels(out, heart(), STRUCTURES, source, MODEL)


# ---- Secondary Capture ---------------------------------------------------------------------

OBSTACLES = [
    ("SOPInstanceUID", None, "it has no SOPInstanceUID"),
    ("SOPClassUID", None, "it has no SOPClassUID"),
    ("SeriesInstanceUID", None, "it has no SeriesInstanceUID"),
    ("StudyInstanceUID", None, "it has no StudyInstanceUID"),
    ("StudyInstanceUID", "", "it has no StudyInstanceUID"),
    ("SeriesInstanceUID", "series-7", "its SeriesInstanceUID is not a UID"),
    ("StudyInstanceUID", "1." + "2" * 63, "its StudyInstanceUID is not a UID"),
    ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.6.1", "its SOPClassUID is that of stills"),
    ("SOPInstanceUID", ["1.2", "1.3"], "its SOPInstanceUID is not a UID"),
]


@pytest.mark.filterwarnings("ignore:The value length")
@pytest.mark.parametrize(("keyword", "value", "why"), OBSTACLES)
def test_outlines_are_drawn_where_nothing_can_be_referred_to(tmp_path, keyword, value, why):
    source, out = ultrasound(tmp_path / "a.dcm", **{keyword: value}), tmp_path / "b.dcm"
    with pytest.raises(CineError, match=f"^a.dcm: {why}.*, so no segmentation can refer"):
        write_dicom_segmentation(out, heart(), STRUCTURES, source, MODEL)
    written = write_dicom_labels(out, heart(), STRUCTURES, source, MODEL)
    assert written.startswith(f"secondary capture: {why}")
    assert complaints(out) == []
    image, found = pydicom.dcmread(source), pydicom.dcmread(out)
    assert found.PatientID == "MRN-777"
    same = found.StudyInstanceUID == image.get("StudyInstanceUID")
    assert same == (keyword != "StudyInstanceUID")
    expected = draw_outlines(moving_blob(*SHAPE), heart())
    assert np.array_equal(found.pixel_array[:, :33], expected)
    before = identifiers(out)
    write_dicom_labels(out, heart(), STRUCTURES, source, MODEL)
    assert identifiers(out) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_secondary_capture_is_valid(tmp_path, kind):
    source, out = source_of(kind, tmp_path), tmp_path / "out" / "b.dcm"
    frames = read_cine(source, color="rgb").frames
    write_secondary_capture(out, draw_outlines(frames, heart(frames.shape[:3])), source, MODEL)
    assert complaints(out) == []
    found, image = pydicom.dcmread(out), pydicom.dcmread(source)
    assert found.StudyInstanceUID == image.StudyInstanceUID
    assert found.SeriesDescription == NOTICE
    assert ("FrameTime" in found) == bool(image.FrameTime)  # no pace is made up
    assert found.BurnedInAnnotation == ("NO" if kind == "de-identified" else "YES")
    band = found.pixel_array[:, frames.shape[1] :]
    assert band.shape[1] >= 12
    assert (band == 255).any()  # letters
    assert (band == band[:1]).all()
    assert [f.name for f in out.parent.iterdir()] == ["b.dcm"]


def test_outlines():
    frames = np.full((2, 12, 12), 7, np.uint8)
    labels = np.zeros((2, 12, 12), np.uint8)
    labels[0, 2:7, 2:7] = 1
    labels[0, 8:11, 8:11] = 3
    out = draw_outlines(frames, labels)
    assert out.shape == (2, 12, 12, 3)
    assert (out[1] == 7).all()  # of its own frame only
    assert (out[0, 3:6, 3:6] == 7).all()  # a line, not a filled patch
    changed = (out[0] != 7).any(-1)
    assert changed.sum() == 16 + 8
    assert len(np.unique(out[0][changed], axis=0)) == 2  # a colour each
    assert np.array_equal(draw_outlines(frames[..., None].repeat(3, -1), labels), out)
    assert (frames == 7).all()


def test_capture_errors(tmp_path):
    source = ultrasound(tmp_path / "a.dcm")
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"frames are uint8 of shape \(2, 8, 8\), not \(T, H, W"):
        write_secondary_capture(tmp_path / "b.dcm", frames[..., 0], source, MODEL)
    with pytest.raises(CineError, match="^a.dcm: its labels would overwrite it"):
        write_secondary_capture(source, frames, source, MODEL)
    broken = ultrasound(tmp_path / "c.dcm", SeriesInstanceUID=None)
    with pytest.raises(CineError, match="^c.dcm: it has 6 frames of 33 x 45, the labels 5 of"):
        write_dicom_labels(tmp_path / "b.dcm", heart()[:5], STRUCTURES, broken, MODEL)
    assert not (tmp_path / "b.dcm").exists()
