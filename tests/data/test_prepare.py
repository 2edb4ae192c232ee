"""An archive to training cines: nothing leaks, nothing is lost, whatever happens."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from discovr_monai.base.privacy import salted_id
from discovr_monai.base.types import CineError
from discovr_monai.cli import main
from discovr_monai.data.archive.prepare import prepare, reidentify
from discovr_monai.data.archive.shards import pack
from discovr_monai.data.clips.transforms import LoadCined, SampleClipd
from discovr_monai.data.lists.datalist import load_rows
from discovr_monai.data.lists.scan import load_datalist
from discovr_monai.phantom.layouts import write_layout

SECRETS = ("DOE", "JANE", "MRN", "case 1", "IM0000", "HOSPITAL")


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """A folder per patient, DICOM and AVI, the pydicom cine, and what is no cine."""
    root = write_layout("folder", tmp_path_factory.mktemp("hospital") / "JANE DOE", patients=4)
    shutil.copy(pydicom.examples.get_path("ybr_color"), root / "case 1" / "real.dcm")
    (root / "case 2" / "report.dcm").write_bytes(b"not DICOM")
    broken = root / "case 0" / "broken.avi"
    broken.write_bytes((root / "case 0" / "cine.avi").read_bytes()[:3000])
    name = os.fsencode(root) + b"/case 3/\xff\xfe MRN.avi"  # no UTF-8
    shutil.copy(root / "case 3" / "cine.avi", os.fsdecode(name))
    return root


@pytest.fixture(scope="session")
def salt(tmp_path_factory):
    path = tmp_path_factory.mktemp("salt") / "salt"
    path.write_text("a salt of our own")
    return path


@pytest.fixture(scope="session")
def done(archive, salt, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    counts = prepare(archive, out, salt_file=salt, dicom=True, workers=2, progress=False)
    return out, out.with_name("out-private"), counts


def everything(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_every_file_gets_a_verdict(archive, done):
    out, private, counts = done
    files = [p for p in archive.rglob("*") if p.is_file()]
    verdicts = list(csv.DictReader((out / "verdicts.csv").open()))
    assert len(verdicts) == len(files) == counts.total()
    assert counts["kept"] == len(files) - 3 == len(list(out.glob("cines/*/*.npy")))
    bad = list(csv.DictReader((private / "bad_files.csv").open()))
    assert {row["file"] for row in bad} == {"notes.txt", "case 0/broken.avi", "case 2/report.dcm"}


def test_an_archive_of_an_earlier_version_goes_on(done, salt):
    """Its ids had 64 bits already; what tells one salt from another must stay as it was."""
    out, _, _ = done
    stamp = json.loads((out / "prepared.json").read_text())
    assert stamp["salt"] == salted_id("which salt", salt.read_bytes())[:12]
    rows = [r for s in load_rows(out / "datalist.json", out).values() for r in s]
    assert {len(Path(r["image"]).stem) for r in rows} == {16}
    assert {len(r[key]) for r in rows for key in ("patient", "study") if key in r} == {16}


def test_nothing_of_the_patient_crosses_over(done, archive):
    out, private, _ = done
    for name, content in everything(out).items():
        if name.endswith(".npy"):
            continue  # pixels
        if name.endswith(".dcm"):
            dataset = pydicom.dcmread(out / name, stop_before_pixels=True)
            content = str(dataset).encode() + str(dataset.file_meta).encode()
        for secret in (*SECRETS, str(archive.parent), "2026-03"):
            assert secret.encode() not in content and secret not in name, (name, secret)
    for name in ("manifest.encrypted", "journal.jsonl"):
        content = (private / name).read_bytes()
        # any three letters turn up in a long cipher text, sooner or later
        secrets = [s for s in SECRETS if len(s) > 3 or name != "manifest.encrypted"]
        assert not [s for s in secrets if s.encode() in content]
        assert (private / name).stat().st_mode & 0o077 == 0


def test_the_manifest_leads_back_for_the_holder_of_the_salt(done, salt, tmp_path, archive):
    _, private, counts = done
    entries = {e["id"]: e for e in reidentify(private, salt)}
    assert len(entries) == counts["kept"]
    for entry in entries.values():
        assert (archive / entry["source"]).is_file()
    one = next(e for e in entries.values() if e["source"] == "case 1/IM00001")
    assert one["patient_id"] == "MRN1"
    (tmp_path / "other").write_text("another salt")
    with pytest.raises(ValueError, match="made with another salt"):
        list(reidentify(private, tmp_path / "other"))


def test_cines_and_datalist(done):
    out, _, _ = done
    content = json.loads((out / "datalist.json").read_text())
    rows = content["training"] + content["validation"]
    for row in rows:
        frames = np.load(out / row["image"], allow_pickle=False)
        assert frames.shape == (row["num_frames"], 112, 112) and frames.dtype == np.uint8
    owners = [{r["patient"] for r in content[s]} for s in ("training", "validation")]
    assert not owners[0] & owners[1]
    studies = [r for r in rows if "study" in r]
    assert studies and all(len(r["patient"]) == 16 for r in rows)


def test_the_dicom_output_says_what_was_done(done):
    out, _, counts = done
    files = sorted(out.glob("dicom/*/*.dcm"))
    assert len(files) == counts["kept"]
    for path in files:
        dataset = pydicom.dcmread(path)
        assert dataset.PatientIdentityRemoved == "YES" and dataset.BurnedInAnnotation == "NO"
        assert "discovr-monai" in dataset.DeidentificationMethod
        assert dataset.PatientBirthDate == dataset.StudyDate == dataset.AccessionNumber == ""
        assert not any(e.tag.is_private for e in dataset)
        assert dataset.SOPInstanceUID.startswith("2.25.") and dataset.SOPInstanceUID.is_valid
        assert dataset.pixel_array.shape[0] == dataset.NumberOfFrames
        assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID
    again = LoadCined(root=out, size=112)({"image": files[0].relative_to(out).as_posix()})
    assert again["image"].shape[2:] == (112, 112)


def test_twice_is_once(archive, done, salt):
    out, _, counts = done
    before = {n: (out / n).stat().st_mtime_ns for n in everything(out) if n.endswith(".npy")}
    again = prepare(archive, out, salt_file=salt, dicom=True, workers=1, progress=False)
    assert again == counts
    assert before == {n: (out / n).stat().st_mtime_ns for n in before}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 64}, "prepared with another size"),
        ({"dicom": False}, "prepared with another dicom"),
        ({"size": 5}, "size 5 must lie in 16..1024"),
        ({"patient_from": "name"}, "patient_from 'name' must be"),
    ],
)
def test_senseless_calls(archive, done, salt, change, message):
    options = {"salt_file": salt, "dicom": True, "progress": False} | change
    with pytest.raises(ValueError, match=message):
        prepare(archive, done[0], **options)


def test_senseless_folders(archive, tmp_path):
    with pytest.raises(NotADirectoryError, match="does not exist"):
        prepare(tmp_path / "none", tmp_path / "o")
    with pytest.raises(ValueError, match="inside the source folder"):
        prepare(archive, archive / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="holds other files"):
        prepare(archive, tmp_path / "full")
    with pytest.raises(ValueError, match="private lies inside out"):
        prepare(archive, tmp_path / "o", private=tmp_path / "o" / "p")


KILLED = """
import sys
from discovr_monai.data.archive.prepare import prepare
if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], salt_file=sys.argv[3], dicom=True, workers=2, progress=False)
"""


def test_killed_at_any_moment_it_goes_on(archive, done, salt, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(KILLED)
    out, kept = tmp_path / "out", 0
    for delay in (3.0, 4.0, 5.0, 6.0):  # from while starting to nearly done
        process = subprocess.Popen(
            [sys.executable, str(script), str(archive), str(out), str(salt)], start_new_session=True
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path in out.glob("cines/*/*.npy"):
            assert len(np.load(path, allow_pickle=False)) > 1, "a half file"
        now = len(list(out.glob("cines/*/*.npy")))
        assert now >= kept, "work was lost"
        kept = now
    prepare(archive, out, salt_file=salt, dicom=True, workers=1, progress=False)
    finished = everything(out)
    assert finished == everything(done[0]), "another result than without the kills"


def test_a_changed_file_is_done_again(tmp_path, salt):
    source = write_layout("csv-list", tmp_path / "in", patients=4) / "clips"
    prepare(source, tmp_path / "out", salt_file=salt, workers=1, progress=False)
    before = everything(tmp_path / "out")
    shutil.copy(source / "c1.avi", source / "c0.avi")
    (source / "c2.avi").unlink()
    counts = prepare(source, tmp_path / "out", salt_file=salt, workers=1, progress=False)
    after = everything(tmp_path / "out")
    assert counts["kept"] == 4
    assert sum(before[n] != after[n] for n in before if n.endswith(".npy") and n in after) == 1


# ---- shards --------------------------------------------------------------------------------


def test_shards_hold_the_same_cines(done, tmp_path):
    out, _, _ = done
    count = pack(out, tmp_path / "shards", gb=2e-3, progress=False)
    assert count > 2
    content = json.loads((tmp_path / "shards" / "datalist.json").read_text())
    original = json.loads((out / "datalist.json").read_text())
    loader, packed = LoadCined(root=out, size=112), LoadCined(root=tmp_path / "shards", size=112)
    for section in ("training", "validation"):
        assert len(content[section]) == len(original[section])
        whole: dict[bytes, set] = {}  # two of the files hold the same cine
        for row in original[section]:
            whole.setdefault(loader(dict(row))["image"].tobytes(), set()).add(row["patient"])
        for row in content[section]:
            frames = packed(dict(row))["image"]
            assert row["patient"] in whole[frames.tobytes()]
    found = load_datalist(tmp_path / "shards", loader=packed, output_dir=tmp_path)
    ids = [r["id"] for rows in found.sections.values() for r in rows]
    assert len(ids) == len(set(ids)), "cines of one shard need ids of their own"
    clip = SampleClipd(num_frames=4, stride=1)(packed(dict(content["training"][0])))["image"]
    assert clip.shape == (1, 4, 112, 112)
    with pytest.raises(CineError, match="are not in this shard"):
        packed({**content["training"][0], "first": 10**6})


def test_packing_goes_on_after_a_kill(done, tmp_path):
    out, _, _ = done
    pack(out, tmp_path / "a", gb=2e-3, progress=False)
    whole = everything(tmp_path / "a")
    first = sorted((tmp_path / "a").glob("*.npy"))[0]
    first.unlink()
    (tmp_path / "a" / ".training-000000.npy.1.tmp").write_bytes(b"half")
    pack(out, tmp_path / "a", gb=2e-3, progress=False)
    assert everything(tmp_path / "a") == whole
    with pytest.raises(ValueError, match="shards of other settings"):
        pack(out, tmp_path / "a", gb=1, progress=False)
    with pytest.raises(ValueError, match="no datalist.json"):
        pack(tmp_path, tmp_path / "b")


def test_the_commands(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DISCOVR_MONAI_SALT", "s")
    assert main(["prepare", str(archive / "case 1"), str(tmp_path / "o"), "--workers", "1"]) == 0
    assert "3 cines kept, 0 files set aside" in capsys.readouterr().out
    assert main(["reidentify", str(tmp_path / "o-private")]) == 0
    assert "MRN1 IM00001" in capsys.readouterr().out
    assert main(["shards", str(tmp_path / "o"), str(tmp_path / "s")]) == 0
    assert main(["prepare", str(tmp_path / "none"), str(tmp_path / "o")]) == 1
    assert "Error: 'none' does not exist" in capsys.readouterr().err


# ---- links that lead outside ---------------------------------------------------------------


def test_links_out_of_the_folder_are_refused(tmp_path, salt):
    from discovr_monai.data.lists.catalogue import build_datalist
    from discovr_monai.data.lists.scan import scan_folder

    secret = write_layout("csv-list", tmp_path / "secret", patients=4) / "clips"
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(secret / "c1.avi", folder / "own.avi")
    (folder / "stolen.avi").symlink_to(secret / "c0.avi")
    (folder / "all").symlink_to(secret)
    loader = LoadCined(root=folder)
    found = scan_folder(folder, loader=loader, output_dir=tmp_path / "scan", quiet=True)
    assert [r["image"] for rows in found.sections.values() for r in rows] == ["own.avi"]
    counts = prepare(folder, tmp_path / "out", salt_file=salt, workers=1, progress=False)
    assert counts == {"kept": 1, "it is a link that leads outside the folder": 1}
    listed = build_datalist("folder", folder)
    assert [e.kind for e in listed.set_aside] == ["refused"]
