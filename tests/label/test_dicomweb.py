"""Cines out of a real DICOMweb archive (Debian's Orthanc), labels back into it, and what may fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pydicom
import pytest

from discovr_monai.cli import main
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.write.capture import draw_outlines
from discovr_monai.data.write.dicom import write_dicom
from discovr_monai.data.write.labels import write_nifti_labels
from discovr_monai.data.write.segmentation import STILLS
from discovr_monai.label.archive import studies as studies_module
from discovr_monai.label.archive.studies import Studies, export_labels, structure_names
from tests.data.conftest import moving_blob
from tests.data.test_label_dicom import complaints, disagreements, segments
from tests.label.conftest import MODEL, NAME
from tests.label.test_studies import here

pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed (make label)")
from discovr_monai.label.archive import dicomweb
from discovr_monai.label.archive.dicomweb import ArchiveError, pull, push

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
REAL = Path(pydicom.examples.get_path("ybr_color"))  # JPEG, of another patient
ACCOUNT = ("sonographer", "secret")
SHAPE = (9, 96, 128)  # of a cine


@pytest.fixture(autouse=True)
def account(monkeypatch):
    """What the archive asks for."""
    monkeypatch.delenv(dicomweb.TOKEN, raising=False)
    monkeypatch.setenv(dicomweb.USER, ACCOUNT[0])
    monkeypatch.setenv(dicomweb.PASSWORD, ACCOUNT[1])


@dataclass
class Orthanc:
    """An Orthanc of our own, on loopback, in a folder."""

    folder: Path
    port: int
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/dicom-web"

    def start(self) -> None:
        """Returns when it answers."""
        config = {
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "MaximumStorageCacheSize": 0,  # what the disk loses is lost
            "HttpPort": self.port,
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True,
            "RegisteredUsers": {ACCOUNT[0]: ACCOUNT[1]},
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (self.folder / "storage").mkdir(exist_ok=True)
        (self.folder / "orthanc.json").write_text(json.dumps(config))
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                [str(orthanc_binary()), "orthanc.json"], cwd=self.folder, stdout=log, stderr=log
            )
        end = time.monotonic() + 60
        while True:
            with socket.socket() as ask:
                if not ask.connect_ex(("127.0.0.1", self.port)):
                    return
            assert self.process.poll() is None and time.monotonic() < end, (
                self.folder / "log.txt"
            ).read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """At once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def orthanc_binary() -> str | None:
    return shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    """One that is empty."""
    if orthanc_binary() is None or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed (apt-get install orthanc orthanc-dicomweb)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Orthanc(tmp_path_factory.mktemp("orthanc"), port)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def examined(orthanc, tmp_path_factory) -> dict[str, Path]:
    """What the archive holds: three cines and three things that are none.

    One study is filed under two patients, of whom one has no ID.
    """
    folder = tmp_path_factory.mktemp("examined")
    files = {"cine": folder / "cine.dcm", "still class": folder / "still_class.dcm"}
    write_dicom(
        files["cine"],
        moving_blob(*SHAPE),
        fps=30.0,
        spacing=(0.4, 0.3),
        region=(0, 0, SHAPE[2] - 1, SHAPE[1] - 1),
        tags={"PatientName": NAME, "PatientID": "MRN-777"},
    )
    cine = pydicom.dcmread(files["cine"])
    odd = pydicom.dcmread(files["cine"])  # frames under the class of stills, as some scanners write
    odd.SOPClassUID = odd.file_meta.MediaStorageSOPClassUID = STILLS[0]
    odd.SOPInstanceUID = odd.file_meta.MediaStorageSOPInstanceUID = f"{cine.SOPInstanceUID[:50]}.1"
    odd.save_as(files["still class"])
    files["jpeg"] = Path(shutil.copy(REAL, folder / "jpeg.dcm"))
    for name, frames, tags in (
        ("one frame", 1, {}),
        ("no ultrasound", 2, {"Modality": "XA"}),
        ("in no study of ultrasound", 2, {"Modality": "XA"}),
    ):
        files[name] = folder / f"{name}.dcm"
        uids = {} if name.startswith("in no") else {"study": cine.StudyInstanceUID}
        write_dicom(files[name], np.zeros((frames, 8, 8), np.uint8), uids=uids, tags=tags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dicomweb.USER, ACCOUNT[0])
        patch.setenv(dicomweb.PASSWORD, ACCOUNT[1])
        assert push(folder, orthanc.url) == {"stored": 6}
    return files


def place(file: Path) -> str:
    """Where a cine comes to lie."""
    found = pydicom.dcmread(file, stop_before_pixels=True)
    return f"{found.StudyInstanceUID}/{found.SOPInstanceUID}.dcm"


def within(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*.dcm")}


# ---- the way out ---------------------------------------------------------------------------


def test_cines_come_as_they_were_stored_and_once(
    orthanc, examined, tmp_path, monkeypatch, capsys, caplog
):
    caplog.set_level("DEBUG", "dicomweb_client")
    monkeypatch.setattr(dicomweb, "PAGE", 1)
    folder = tmp_path / "cines"
    assert main(["pull", orthanc.url, str(folder)]) == 0
    assert within(folder) == {place(examined[n]) for n in ("cine", "still class", "jpeg")}
    for name in ("cine", "still class", "jpeg"):
        assert (folder / place(examined[name])).read_bytes() == examined[name].read_bytes(), name
    assert folder.stat().st_mode & 0o77 == 0
    said = capsys.readouterr()
    assert "3 cines fetched, 0 were there, 0 set aside. They name their patients" in said.out
    assert "Next: discovr-monai label --studies DIR" in said.out
    spoken = said.out + said.err + caplog.text
    for name in ("cine", "jpeg"):
        assert not any(uid in spoken for uid in re.findall(r"[0-9.]{10,}", place(examined[name])))

    (folder / place(examined["jpeg"])).unlink()
    (folder / place(examined["cine"])).with_name(".half.dcm.1.tmp").write_text("half")
    kept = (folder / place(examined["cine"])).stat().st_mtime_ns
    assert pull(orthanc.url, folder) == {"there": 2, "fetched": 1}
    assert (folder / place(examined["cine"])).stat().st_mtime_ns == kept
    assert not list(folder.rglob("*.tmp"))


def test_one_study_or_one_patient(orthanc, examined, tmp_path):
    real = pydicom.dcmread(REAL, stop_before_pixels=True)
    pull(orthanc.url, tmp_path / "study", studies=[real.StudyInstanceUID])
    assert within(tmp_path / "study") == {place(REAL)}
    pull(orthanc.url, tmp_path / "patient", patients=["nobody", "MRN-777"])
    assert within(tmp_path / "patient") == {place(examined[n]) for n in ("cine", "still class")}
    with pytest.raises(ArchiveError, match="has no multi-frame ultrasound of what was asked for"):
        pull(orthanc.url, tmp_path / "both", [real.StudyInstanceUID], ["MRN-777"])
    with pytest.raises(ValueError, match="--study takes a Study Instance UID"):
        pull(orthanc.url, tmp_path / "none", studies=["../1"])
    assert not (tmp_path / "both").exists() and not (tmp_path / "none").exists()


# ---- the way back --------------------------------------------------------------------------


@pytest.fixture
def labelled(orthanc, examined, tmp_path, monkeypatch) -> tuple[Studies, dict[str, np.ndarray]]:
    """What a label server would leave: cines presented, and labels saved; labels by source."""
    monkeypatch.setattr(studies_module, "run_isolated", here)
    pull(orthanc.url, tmp_path / "cines", patients=["MRN-777"])
    write_dicom(tmp_path / "cines" / "empty.dcm", read_cine(examined["cine"]).frames)
    shutil.copy(examined["cine"].parent / "jpeg.dcm", tmp_path / "cines" / "unlabelled.dcm")
    studies = Studies(tmp_path / "cines", tmp_path / "work", b"salt")
    studies.prepare()
    list(studies.present())
    drawn, index = {}, {}
    for identity, record in studies.records().items():
        if record["name"] == "unlabelled.dcm":
            continue
        labels = np.zeros((record["frames"], *record["window"][:2]), np.uint8)
        if record["name"] != "empty.dcm":
            labels[2:8, 20:60, 30:90] = 2
            labels[3:7, 30:50, 40:70] = 1
            labels[5, 70:80, 40:50] = 3
            drawn[record["name"]] = labels
        like = studies.work / f"{identity}.nii.gz"
        write_nifti_labels(studies.work / "labels" / "final" / like.name, labels, None, None, like)
        names = ["left_ventricle", "wall", "left_atrium"]  # as 3D Slicer sends them
        info = {"label_info": [{"name": n, "color": []} for n in names]}
        if STILLS[0] != pydicom.dcmread(tmp_path / "cines" / record["name"]).SOPClassUID:
            index[identity] = {"labels": {"final": {"info": info}}}
            model = {
                "model": "0123abcd",
                "params": {"label_names": {n: i for i, n in enumerate(names, 1)}},
            }
            index[identity]["labels"]["original"] = {"info": model}
    (studies.work / "datastore_v2.json").write_text(json.dumps({"objects": index}))
    return studies, drawn


def client(orthanc):
    """Of the archive, none of ours."""
    from dicomweb_client import DICOMwebClient
    from dicomweb_client.session_utils import create_session_from_user_pass

    return DICOMwebClient(orthanc.url, create_session_from_user_pass(*ACCOUNT))


def held(orthanc, study: str, folder: Path) -> dict[str, Path]:
    """Labels that the archive holds of a study, by modality, fetched."""
    asked, found = client(orthanc), {}
    for modality in ("SEG", "OT"):
        for entry in asked.search_for_instances(study, search_filters={"Modality": modality}):
            series, one = entry["0020000E"]["Value"][0], entry["00080018"]["Value"][0]
            assert modality not in found
            found[modality] = folder / f"{modality}.dcm"
            asked.retrieve_instance(study, series, one).save_as(found[modality])
    return found


def test_labels_go_into_the_archive(orthanc, examined, labelled, tmp_path, capsys):
    studies, drawn = labelled
    assert len(drawn) == 2
    out = tmp_path / "out"
    command = ["labels", str(studies.work), str(out), "--studies", str(studies.source), "--dicom"]
    assert main([*command, "--model", str(MODEL)]) == 0
    said = capsys.readouterr().out
    assert "2 label maps written" in said
    assert "1 segmentation\n" in said
    assert "1 secondary capture: its SOPClassUID is that of stills, whose frames have" in said
    assert "1 nothing: no structure was found in any of its frames" in said
    assert within(out) == {f"{name}.dcm" for name in drawn}

    for _ in 1, 2:  # the second time, nothing changes
        assert main(["push", str(out), orthanc.url]) == 0
        assert "2 files stored, 0 refused: see pushed.csv" in capsys.readouterr().out
        rows = (out / "pushed.csv").read_text().splitlines()[1:]
        assert rows == sorted(f"{name}.dcm,stored" for name in drawn)
        study = pydicom.dcmread(examined["cine"]).StudyInstanceUID
        found = held(orthanc, study, tmp_path)
        assert set(found) == {"SEG", "OT"}

    labels = drawn[place(examined["cine"])]
    assert np.array_equal(segments(found["SEG"], labels.shape), labels)
    seg = pydicom.dcmread(found["SEG"])
    assert [s.SegmentLabel for s in seg.SegmentSequence] == [
        "left ventricle",
        "wall",
        "left atrium",
    ]
    assert {s.SegmentAlgorithmType for s in seg.SegmentSequence} == {"SEMIAUTOMATIC"}
    assert str(seg.PatientName) == NAME and seg.PatientID == "MRN-777"

    frames = read_cine(examined["still class"], color="rgb").frames
    outlined = pydicom.dcmread(found["OT"]).pixel_array[:, : frames.shape[1]]
    assert np.array_equal(outlined, draw_outlines(frames, drawn[place(examined["still class"])]))
    for kind, source in (("SEG", "cine"), ("OT", "still class")):
        assert complaints(found[kind]) == [], kind
        assert disagreements(examined[source], found[kind]) == [], kind


def test_what_a_model_drew_says_so(labelled, examined, tmp_path):
    studies, _ = labelled
    shutil.copytree(studies.work / "labels" / "final", studies.work / "labels" / "original")
    written = export_labels(studies.work, tmp_path, "original", studies.source, ["a", "b", "c"])
    assert sorted(how.split(":")[0] for how in written.values()) == [
        "nothing",
        "secondary capture",
        "segmentation",
    ]
    seg = pydicom.dcmread(tmp_path / f"{place(examined['cine'])}.dcm")
    assert {(s.SegmentAlgorithmType, s.SegmentAlgorithmName) for s in seg.SegmentSequence} == {
        ("AUTOMATIC", "discovr-monai 0123abcd")
    }


def test_dicom_needs_the_archive_and_says_what_it_cannot(labelled, tmp_path, capsys):
    studies, _ = labelled
    command = ["labels", str(studies.work), str(tmp_path / "out"), "--dicom", "--model", str(MODEL)]
    assert main(command) == 1
    assert "labels as DICOM refer to their source: name the archive" in capsys.readouterr().err
    for path in studies.source.rglob("*.dcm"):
        path.unlink()
    assert main([*command, "--studies", str(studies.source)]) == 0
    said = capsys.readouterr().out
    assert "0 label maps written" in said and "3 nothing: it does not exist" in said


def test_a_label_says_its_structures_itself_or_not():
    assert structure_names({"label_info": [{"name": "a"}, {"name": "b"}]}) == ["a", "b"]
    assert structure_names({"params": {"label_names": {"b": 2, "a": 1}}}) == ["a", "b"]
    for info in (
        {},
        {"label_info": [{"name": "a"}, {}]},
        {"params": {"label_names": {"a": 1, "c": 3}}},
    ):
        assert structure_names(info) == []


# ---- what may fail -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cine", "jpeg"])
def test_a_bad_instance_is_set_aside(orthanc, examined, tmp_path, name):
    """Here it was cut short on the archive's own disk, uncompressed and compressed."""
    whole = examined[name].read_bytes()
    stored = (p for p in (orthanc.folder / "storage").glob("*/*/*") if p.is_file())
    bad = next(p for p in stored if p.read_bytes() == whole)
    bad.write_bytes(whole[: len(whole) // 2])
    try:
        counts = pull(orthanc.url, tmp_path / "cines")
    finally:
        bad.write_bytes(whole)
    assert counts == {"there": 0, "fetched": 2, "set aside": 1}
    (row,) = (tmp_path / "cines" / "bad_files.csv").read_text().splitlines()[1:]
    assert row == f"{place(examined[name])},its pixels are missing or cut short"
    assert pull(orthanc.url, tmp_path / "cines") == {"there": 2, "fetched": 1}
    assert len((tmp_path / "cines" / "bad_files.csv").read_text().splitlines()) == 1


def test_an_archive_that_stops_half_way(orthanc, examined, tmp_path, monkeypatch, capsys):
    folder, fetch = tmp_path / "cines", dicomweb.Archive.fetch

    def fetch_and_stop(self, *wanted):
        fetch(self, *wanted)
        orthanc.stop()

    with monkeypatch.context() as patch:
        patch.setattr(dicomweb.Archive, "fetch", fetch_and_stop)
        assert main(["pull", orthanc.url, str(folder)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"Error: 127\.0\.0\.1:\d+ does not answer \(ConnectionError\): is it running, and the "
        r"address right\? 1 of 3 are done: the same command goes on from there",
        said,
    )
    assert len(within(folder)) == 1
    with pytest.raises(ArchiveError, match="does not answer"):
        pull(orthanc.url, folder)
    with pytest.raises(ArchiveError, match="does not answer .* 0 of 1 are done: the same"):
        push(folder, orthanc.url)
    orthanc.start()
    assert pull(orthanc.url, folder) == {"there": 1, "fetched": 2}


def test_wrong_account_and_wrong_root(orthanc, examined, tmp_path, monkeypatch):
    with pytest.raises(ArchiveError, match=r"to a DICOMweb search: check the address \(Orthanc's"):
        pull(orthanc.url.removesuffix("/dicom-web"), tmp_path / "cines")
    with pytest.raises(ArchiveError, match="answers 404 to a DICOMweb search: check the address"):
        pull(f"{orthanc.url}x", tmp_path / "cines")
    monkeypatch.setenv(dicomweb.PASSWORD, "wrong")
    for ask in (lambda: pull(orthanc.url, tmp_path), lambda: push(REAL.parent, orthanc.url)):
        with pytest.raises(
            ArchiveError, match=r"wants other credentials \(401\): set DISCOVR_MONAI"
        ):
            ask()


class Odd(BaseHTTPRequestHandler):
    """What some servers answer; the first part of the path says which."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012  paths and credentials

    def log_message(self, *_):
        """Nothing."""

    def _answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.path.split("/")[1]
        self.asked.append((self.path, self.headers.get("Authorization", "")))
        reason = {"duplicate": 0x0111, "refused": 0xA700}.get(kind, 0)
        failed = {
            "00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [reason]}}]}
        }
        values = {
            dicomweb.STUDY: "..",
            dicomweb.SERIES: "1.2.4",
            dicomweb.INSTANCE: "1.2.5",
            dicomweb.SOP_CLASS: dicomweb.CINES[0],
        }
        entry = {tag: {"vr": "UI", "Value": [value]} for tag, value in values.items()}
        other = {
            k: {"vr": "UI", "Value": [v]}
            for k, v in ((dicomweb.SERIES, "1.2.6"), (dicomweb.MODALITY, "XA"))
        }
        status, body = {
            "page": (200, b"<html>"),
            "numbers": (200, b"[1]"),
            "leads": (302, b""),
            "nothing": (204, b""),
            "busy": (503, b""),
            "duplicate": (409, json.dumps(failed).encode()),
            "refused": (409, json.dumps(failed).encode()),
            "traversal": (
                200,
                json.dumps([entry, entry | other]).encode(),
            ),  # whatever was asked, page after page
        }[kind]
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Type", "application/dicom+json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer  # noqa: N815


@pytest.fixture(scope="module")
def odd():
    """Address of such a server."""
    server = HTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("page", "answers no JSON to a DICOMweb search: check the address"),
        ("numbers", "sends what is no DICOM .* to a DICOMweb search: check the address"),
        ("leads", r"leads elsewhere \(redirect\): give the address where it ends$"),
        ("nothing", "has no multi-frame ultrasound of what was asked for"),
        ("busy", "answers 503$"),
    ],
)
def test_what_is_no_archive(odd, tmp_path, kind, sentence):
    with pytest.raises(ArchiveError, match=rf"^127\.0\.0\.1:\d+ {sentence}"):
        pull(f"{odd}/{kind}", tmp_path / "cines")
    assert not (tmp_path / "cines").exists()


def test_names_that_would_leave_the_folder_are_set_aside(odd, tmp_path):
    counts = pull(f"{odd}/traversal", tmp_path / "a" / "cines")
    assert counts == {"there": 0, "set aside": 1}
    row = (tmp_path / "a" / "cines" / "bad_files.csv").read_text().splitlines()[1]
    assert row == "../1.2.5.dcm,its UIDs are not valid"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["bad_files.csv"]


def test_what_is_there_already_is_stored_and_the_rest_refused(odd, tmp_path, capsys):
    write_dicom(tmp_path / "a.dcm", np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "b.dcm").write_text("no DICOM")
    (tmp_path / "c.csv").write_text("x")
    assert push(tmp_path, f"{odd}/duplicate") == {"stored": 1, "refused": 1}
    assert main(["push", str(tmp_path), f"{odd}/refused"]) == 1
    assert "0 files stored, 2 refused: see pushed.csv" in capsys.readouterr().out
    first, second = (tmp_path / "pushed.csv").read_text().splitlines()[1:]
    assert re.fullmatch(r"a\.dcm,127\.0\.0\.1:\d+ refuses it \(failure reason A700H\)", first)
    assert second == "b.dcm,it is not valid DICOM (damaged or cut short)"
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="'none' holds no DICOM: write it by labels --dicom"):
        push(tmp_path / "none", odd)
    with pytest.raises(NotADirectoryError, match="'a.dcm' is no folder"):
        push(tmp_path / "a.dcm", odd)


def test_a_token_goes_before_a_password(odd, tmp_path, monkeypatch):
    monkeypatch.setenv(dicomweb.TOKEN, "abc")
    with pytest.raises(ArchiveError):
        pull(f"{odd}/nothing/token", tmp_path)
    assert Odd.asked[-1][0].startswith("/nothing/token/studies?")
    assert Odd.asked[-1][1] == "Bearer abc"
    for name in (dicomweb.TOKEN, dicomweb.USER):
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="set both DISCOVR_MONAI_DICOMWEB_USER and"):
        pull(odd, tmp_path)
    monkeypatch.delenv(dicomweb.PASSWORD)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setattr(dicomweb, "is_loopback", lambda _: False)  # as for any other machine
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ArchiveError):
        pull(f"{odd}/nothing/none", tmp_path, plain_http=True)
    assert Odd.asked[-1] == ("/nothing/none/studies?limit=1000&offset=0", "")


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://hospital.example/dicom-web", "http to hospital.example can be read on the way"),
        (
            "http://127.0.0.1.example/dicom-web",
            "can be read on the way: use https, or --plain-http",
        ),
        ("https://me:secret@hospital.example", "the address holds credentials: set DISCOVR_MONAI"),
        ("ftp://hospital.example", "must be like https://HOST/dicom-web"),
        ("hospital.example:8042", "must be like https://HOST/dicom-web"),
    ],
)
def test_addresses_that_are_refused(tmp_path, url, sentence):
    with pytest.raises(ValueError, match=sentence):
        dicomweb.Archive(url)
    if "hospital.example can" in sentence:
        assert dicomweb.Archive(url, plain_http=True).host == "hospital.example"
