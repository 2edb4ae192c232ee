"""What is presented of an archive, and the way back."""

from __future__ import annotations

import gzip
import json
import os
import shutil

import nibabel
import numpy as np
import pytest

from discovr_monai.base.notice import NOTICE
from discovr_monai.base.privacy import salted_id
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.loader import CineLoader
from discovr_monai.data.write.labels import GEOMETRY, write_nifti_labels
from discovr_monai.label.archive import studies as module
from discovr_monai.label.archive.studies import Studies, export_labels, present_file
from tests.label.conftest import NAME


def here(work, jobs, *, workers, timeout):
    """As :func:`run_isolated`, in this process."""
    return [(job, work(job), None) for job in jobs]


@pytest.fixture(scope="module")
def presented(archive, tmp_path_factory) -> Studies:
    """All of the archive; not to be changed."""
    studies = Studies(archive.root, tmp_path_factory.mktemp("presented") / "work", b"salt")
    studies.prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_isolated", here)
        assert len(list(studies.present())) == 4
    return studies


@pytest.fixture
def copied(presented, tmp_path, monkeypatch) -> Studies:
    """The same to be changed."""
    monkeypatch.setattr(module, "run_isolated", here)
    studies = Studies(presented.source, tmp_path / "work", b"salt")
    shutil.copytree(presented.work, studies.work)
    shutil.copytree(presented.private, studies.private)
    return studies


def one(studies: Studies, name: str) -> tuple[dict, nibabel.Nifti1Image]:
    """Record and image of a source."""
    record = next(r for r in studies.records().values() if r["name"] == name)
    return record, nibabel.load(studies.work / f"{record['id']}.nii.gz")


def frames_of(image) -> np.ndarray:
    return np.asarray(image.dataobj).transpose(2, 1, 0)


def test_a_video_is_whole_and_knows_its_time_but_no_millimetres(archive, presented):
    record, image = one(presented, archive.avi)
    cine = read_cine(archive.root / archive.avi)
    assert np.array_equal(frames_of(image), cine.frames)
    assert image.get_data_dtype() == np.uint8
    assert image.header.get_xyzt_units() == ("unknown", "sec")
    assert image.header.get_zooms() == pytest.approx((1, 1, 1 / cine.fps))
    assert (record["fps"], record["spacing"]) == (cine.fps, None)


def test_a_screen_keeps_its_sector_and_loses_its_text(archive, presented):
    _, image = one(presented, archive.dicom)
    screen = archive.screen
    frames = frames_of(image)
    assert frames.shape == screen.frames.shape[:3]
    assert not frames[:, screen.overlay & ~screen.sector].any()
    kept = (frames == screen.frames[..., 0])[:, screen.sector]
    assert kept.mean() > 0.97
    zooms = (screen.spacing, screen.spacing, 1 / screen.fps)
    assert image.header.get_zooms() == pytest.approx(zooms, rel=1e-4)
    assert image.header.get_xyzt_units() == ("mm", "sec")


def test_a_nifti_keeps_its_geometry_and_nothing_else_of_its_header(archive, presented):
    record, image = one(presented, archive.nifti)
    source = nibabel.load(archive.root / archive.nifti)
    for name in GEOMETRY:
        assert np.array_equal(image.header[name], source.header[name]), name
    assert bytes(image.header["descrip"]).startswith(NOTICE.encode())
    assert (record["fps"], record["spacing"]) == (50.0, [0.25, 0.5])


def test_nothing_presented_names_anybody(presented):
    for file in presented.work.rglob("*.nii.gz"):
        content = gzip.decompress(file.read_bytes())
        assert NAME.encode() not in content and b"MRN-777" not in content
        assert file.name.removesuffix(".nii.gz").isalnum()
    journal = (presented.private / "cines.jsonl").read_text()
    assert "MRN-777" not in journal and NAME not in journal and "20200102" not in journal
    assert {p.stat().st_mode & 0o77 for p in presented.private.iterdir() if p.is_file()} == {0}
    assert presented.private.stat().st_mode & 0o77 == 0


def test_bad_files_are_set_aside_with_a_reason(presented):
    report = (presented.private / "bad_files.csv").read_text()
    assert "b/broken.avi" in report and len(report.splitlines()) == 2
    assert len((presented.private / "files.csv").read_text().splitlines()) == 1 + 3


def test_only_what_is_new_or_changed_is_read_again(archive, copied):
    assert list(copied.present()) == []
    record, _ = one(copied, archive.avi)
    (copied.work / f"{record['id']}.nii.gz").unlink()
    assert [r["name"] for r in copied.present()] == [archive.avi]
    with (copied.private / "cines.jsonl").open("a") as file:
        file.write('{"id": "cut by a ki')
    assert len(copied.records()) == 4


def test_a_file_that_breaks_later_keeps_what_was_presented(archive, copied):
    record, _ = one(copied, archive.avi)
    source = copied.source / archive.avi
    content, stat = source.read_bytes(), source.stat()
    try:
        source.write_bytes(content[:300])
        (found,) = copied.present()
        assert found["bad"][0] == "unreadable" and found["window"] == record["window"]
        assert list(copied.present()) == []  # not again before it changes
        assert record["id"] in (copied.private / "files.csv").read_text()
        assert archive.avi in (copied.private / "bad_files.csv").read_text()
    finally:
        source.write_bytes(content)
        os.utime(source, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    (found,) = copied.present()
    assert "bad" not in found


def test_links_that_lead_outside_are_refused(tmp_path, archive):
    root = tmp_path / "studies"
    root.mkdir()
    (root / "link.avi").symlink_to(archive.root / archive.avi)
    found = present_file(("x", {"image": "link.avi"}), Studies(root, tmp_path / "work", b"salt"))
    assert found["bad"][1] == "it is a link that leads outside the folder"


def test_patients_and_studies_are_grouped_under_salted_ids(archive, presented):
    record, _ = one(presented, archive.dicom)
    assert record["patient"] == salted_id("patient MRN-777", b"salt")
    row = {
        "image": archive.avi,
        "view": "A4C",
        "fps": 30.0,
        "spacing": [0.3, 0.4],
        "patient": "patient MRN-777",
    }
    named = present_file(("z", row), presented)
    assert (named["view"], named["fps"], named["spacing"]) == ("A4C", 30.0, [0.3, 0.4])
    assert named["patient"] == record["patient"] and named["study"] != record["study"]
    (presented.work / "z.nii.gz").unlink()


@pytest.mark.parametrize("work", ["studies/work", "."])
def test_places_inside_each_other_are_refused(tmp_path, work):
    (tmp_path / "studies").mkdir()
    with pytest.raises(ValueError, match="lie in each other"):
        Studies(tmp_path / "studies", tmp_path / work, b"salt").prepare()


def test_folders_of_others_are_refused(tmp_path, archive):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.doc").write_text("x")
    with pytest.raises(ValueError, match="'work' holds other files"):
        Studies(archive.root, work, b"salt").prepare()
    Studies(archive.root, tmp_path / "mine", b"salt").prepare()
    with pytest.raises(ValueError, match="another salt"):
        Studies(archive.root, tmp_path / "mine", b"other").prepare()
    with pytest.raises(NotADirectoryError, match="'nowhere' does not exist"):
        Studies(tmp_path / "nowhere", work, b"salt").prepare()


def test_a_folder_of_shorter_ids_goes_on_with_them(tmp_path, archive, monkeypatch):
    monkeypatch.setattr(module, "run_isolated", here)
    studies = Studies(archive.root, tmp_path / "work", b"salt")
    studies.prepare()
    owner = studies.private / "studies.json"
    owner.write_text(json.dumps({k: v[:12] for k, v in json.loads(owner.read_text()).items()}))
    studies.prepare()
    for record in studies.present():
        long = salted_id(record["name"], b"salt")
        assert record["id"] == long[:12] != long
        assert "bad" in record or len(record["patient"]) == len(record["study"]) == 12


def test_what_a_kill_left_is_cleared(tmp_path, archive):
    studies = Studies(archive.root, tmp_path / "work", b"salt")
    studies.prepare()
    (studies.work / "labels" / "final").mkdir(parents=True)
    left = [studies.work / ".a.nii.gz.0.tmp", studies.work / "labels" / "final" / ".b.1.tmp"]
    for file in left:
        file.write_text("half")
    studies.prepare()
    assert not any(f.exists() for f in left)


def test_the_network_sees_what_it_sees_of_the_source(archive, presented):
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")
    from discovr_monai.label.server.analyst import PresentedCines

    cines = PresentedCines(presented, 64)
    for name in (archive.avi, archive.dicom, archive.nifti):
        record, _ = one(presented, name)
        seen, source = (
            cines.load(f"{record['id']}.nii.gz"),
            CineLoader(archive.root, size=64).load(name),
        )
        assert np.array_equal(seen.frames, source.frames), name
        assert (seen.fps, seen.spacing, seen.window) == (source.fps, source.spacing, source.window)


def test_a_cine_that_was_sent_knows_millimetres_only_if_its_header_does(archive, copied):
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")
    from discovr_monai.label.server.analyst import PresentedCines

    cines = PresentedCines(copied, 64)
    for name, spacing in ((archive.avi, None), (archive.nifti, (0.25, 0.5))):
        record, _ = one(copied, name)
        (copied.work / f"{record['id']}.nii.gz").rename(copied.work / "sent.nii.gz")
        assert cines.load("sent.nii.gz").spacing == spacing


def test_labels_go_back_to_the_frames_of_their_source(archive, copied, tmp_path):
    truth = {}
    for name in (archive.avi, archive.dicom, archive.nifti):
        record, image = one(copied, name)
        labels = frames_of(image) // 64  # every cine its own
        like = copied.work / f"{record['id']}.nii.gz"
        target = copied.work / "labels" / "final" / like.name
        write_nifti_labels(target, labels, None, None, like)
        truth[name] = labels
    written = export_labels(copied.work, tmp_path / "out", source=archive.root)
    assert written == dict.fromkeys(truth, "NIfTI")
    for name, labels in truth.items():
        back = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        assert np.array_equal(frames_of(back), labels)
    source = nibabel.load(archive.root / archive.nifti)
    back = nibabel.load(tmp_path / "out" / f"{archive.nifti}.nii.gz")
    assert np.array_equal(back.affine, source.affine)
    assert export_labels(copied.work, tmp_path / "none", tag="original") == {}
    record, _ = one(copied, archive.avi)
    (copied.work / "labels" / "final" / f"{record['id']}.nii.gz").write_bytes(b"half")
    written = export_labels(copied.work, tmp_path / "rest", source=archive.root)
    assert written.pop(archive.avi).startswith("nothing: ")
    assert set(written.values()) == {"NIfTI"} and len(written) == 2
    with pytest.raises(ValueError, match="nothing presented"):
        export_labels(tmp_path / "empty", tmp_path / "out")
