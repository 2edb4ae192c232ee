"""One running server: what annotators get from it, and what nobody does."""

from __future__ import annotations

import gzip
import io
import json
import socket
import threading
import zipfile
from pathlib import Path
from urllib.parse import quote, urlsplit

import nibabel
import numpy as np
import pytest
import torch

from discovr_monai.base.notice import NOTICE
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.inference.findings import Analyst
from discovr_monai.inference.model import load_model
from discovr_monai.inference.reading import CineReader
from discovr_monai.label.archive.studies import export_labels
from discovr_monai.label.server import start as module
from discovr_monai.label.server.guard import Guard
from tests.label.conftest import MODEL

SEGMENT = "/infer/discovr_segmentation"


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    """What 3D Slicer talks to the server with."""
    found = pytest.importorskip("monailabel.client.client")
    return found.MONAILabelClient(server.url, str(tmp_path_factory.mktemp("slicer")), "annotator")


@pytest.fixture(scope="module")
def results(client, ids):
    """Name -> (file, params) of one inference each."""
    return {
        n: client.infer(
            "discovr_segmentation", i, {"result_extension": ".nrrd", "view": "as known"}
        )
        for n, i in ids.items()
    }


def test_it_says_what_it_has(client):
    assert not client.auth_enabled()
    info = client.info()
    assert info["labels"] == ["lv_cavity", "myocardium", "left_atrium"]
    assert {"discovr_segmentation", "discovr_confidence"} <= set(info["models"])
    assert NOTICE in info["description"]
    assert info["datastore"]["total"] >= 3


def test_contours_lie_on_their_cine(server, ids, results):
    for name, (file, params) in results.items():
        labels, cine = nibabel.load(file), nibabel.load(server.work / f"{ids[name]}.nii.gz")
        assert labels.shape == cine.shape and np.array_equal(labels.affine, cine.affine), name
        values = np.asarray(labels.dataobj)
        assert set(np.unique(values)) <= {0, 1, 2, 3}
        area = params["area_over_time"]
        assert len(area["lv_cavity"]) == cine.shape[2] == params["frames"]
        row, column = (
            params["area_over_time"]["unit"] == "cm2" and cine.header.get_zooms()[:2]
        ) or (10, 10)
        pixels = (values == 1).sum((0, 1)) * row * column / 100
        assert area["lv_cavity"] == pytest.approx(pixels, rel=1e-3)
        assert params["notice"] == NOTICE and params["label_names"]["left_atrium"] == 3


def test_the_numbers_are_those_of_an_archives_inference(archive, results):
    model = load_model(MODEL)
    loader = LoadCined(root=archive.root, size=model.clip_shape[2])
    reader = CineReader(loader, model.clip_shape[1], model.about["clip"], 3, 0.5)
    rows = [{"image": name, "id": name, "view": "A4C"} for name in results]
    findings = Analyst(model, torch.device("cpu"))([reader(r)["seen"] for r in rows])
    for row, finding in zip(rows, findings, strict=True):
        params = results[row["image"]][1]
        for key in (
            "ef_withheld",
            "contours_withheld",
            "view",
            "frames",
            "fps",
            "ed_frame",
            "es_frame",
        ):
            assert params[key] == finding.values[key], key
        for key in ("ef", "ef_low", "ef_high", "edv_ml", "esv_ml", "contour_ef"):
            assert params[key] == pytest.approx(finding.values[key], abs=0.05), key
    assert results[archive.avi][1]["edv_ml"] is None and results[archive.dicom][1]["edv_ml"] > 0


def test_confidence_is_a_volume_of_percent(client, server, archive, ids, results):
    file, params = client.infer("discovr_confidence", ids[archive.avi], {})
    labels = np.asarray(nibabel.load(results[archive.avi][0]).dataobj)
    found = nibabel.load(file)
    percent = np.asarray(found.dataobj)
    assert percent.shape == labels.shape and percent.max() <= 100 and percent.min() >= 25
    edge = labels != np.roll(labels, 1, 0)
    assert percent[edge].mean() < percent[~edge].mean() - 5  # outlines are where it doubts
    assert params["ef"] == results[archive.avi][1]["ef"]


def test_heads_are_silent_where_they_must_be(client, server, ids, archive):
    answer = server.form(
        "POST", f"{SEGMENT}?image={ids[archive.avi]}", {"params": '{"view": "PLAX"}'}
    )
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["contours_withheld"] == "the view is PLAX, the head is for A4C"
    assert answer.json["ef"] is None and "area_over_time" not in answer.json


def test_a_slicer_session(client, server, ids, archive, results, tmp_path):
    sample = client.next_sample("first", {})
    assert sample["id"] in ids.values() and "path" not in sample
    image = server.ask("GET", f"/datastore/image?image={sample['id']}")
    assert image.body == (server.work / f"{sample['id']}.nii.gz").read_bytes()
    label = Path(results[archive.avi][0])
    identity = ids[archive.avi]
    info = {"label_info": [{"name": "lv_cavity", "idx": 1}]}
    assert client.save_label(identity, str(label), params=info)["label"] == identity
    kept = client.datastore()["objects"][identity]["labels"]["final"]["info"]
    assert kept["label_info"] == info["label_info"]
    again = client.download_label(identity, "final")
    assert Path(again).read_bytes() == label.read_bytes()
    assert client.info()["datastore"]["completed"] == 1
    written = export_labels(server.work, tmp_path / "out", source=archive.root)
    assert written == {archive.avi: "NIfTI"}
    archived = server.ask("GET", "/datastore/dataset")
    names = zipfile.ZipFile(io.BytesIO(archived.body)).namelist()
    assert sorted(names) == [
        f"image/{identity}.nii.gz",
        f"label/{identity}.nii.gz",
        "metadata.json",
    ]


def test_a_cine_that_was_sent_can_be_inferred(client, server, archive, tmp_path):
    source = archive.root / archive.nifti
    assert client.upload_image(str(source), "sent-1")["image"] == "sent-1"
    stored = nibabel.load(server.work / "sent-1.nii.gz")
    assert np.array_equal(stored.affine, nibabel.load(source).affine)
    assert b"Smith" not in gzip.decompress((server.work / "sent-1.nii.gz").read_bytes())
    file, _ = client.infer("discovr_segmentation", "sent-1", {})
    assert nibabel.load(file).shape == stored.shape
    body = {"file": ("x.nii.gz", source.read_bytes())}
    twice = server.form("PUT", "/datastore/image?image=sent-1", {"params": "{}"}, body)
    assert (twice.status, "choose another id" in twice.json["detail"]) == (400, True)


@pytest.mark.parametrize("content, said", [
    (b"no NIfTI", "cannot be read"),
    (nibabel.Nifti1Image(np.zeros((5, 5, 5), np.uint8), np.eye(4)).to_bytes(), "the mask is"),
    (nibabel.Nifti1Image(np.full((112, 112, 24), 0.5, np.float32), np.eye(4)).to_bytes(), "Labels are whole"),
])  # fmt: skip
def test_labels_that_do_not_lie_on_their_cine_are_refused(server, ids, archive, content, said):
    path = f"/datastore/label?image={ids[archive.avi]}&tag=wrong"
    answer = server.form("PUT", path, {"params": "{}"}, {"label": ("x.nii", content)})
    assert answer.status == 400 and said in answer.json["detail"]
    assert not (server.work / "labels" / "wrong").exists()


def test_listing_does_not_wait_for_an_inference(server, ids, archive):
    done = threading.Event()

    def infer() -> None:
        server.form("POST", f"{SEGMENT}?image={ids[archive.dicom]}&output=json", {"params": "{}"})
        done.set()

    thread = threading.Thread(target=infer)
    thread.start()
    answered = 0
    while not done.wait(0.02) and answered < 5:
        assert server.ask("GET", "/datastore/").status == 200
        answered += not done.is_set()
    thread.join()
    assert answered >= 1


# ---- what nobody gets ----------------------------------------------------------------------


def tree(folder: Path) -> dict[str, int]:
    """Every file and when it was changed; locks are always touched."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in files}


@pytest.fixture
def untouched(server):
    """Fails a test in which a file anywhere around the studies was made, changed or removed."""
    root = server.work.parent
    before = tree(root)
    yield root
    after = tree(root)
    changed = {k for k in before | after if before.get(k) != after.get(k)}
    assert {c for c in changed if not c.startswith("work-private/tmp/")} == set()


CINE = nibabel.Nifti1Image(np.zeros((8, 8, 4), np.uint8), np.eye(4)).to_bytes()
PLACES = [
    "../x",
    "..%2Fx",
    "%2Ftmp%2Fx",
    "a%2F..%2F..%2Fx",
    "..\\x",
    "x%00y",
    ".lock",
    "..",
    quote("$x"),
]


@pytest.mark.parametrize("place", PLACES)
def test_ids_stay_in_the_studies_folder(server, untouched, place):
    files = {"file": ("x.nii.gz", CINE)}
    for method, path in (
        ("PUT", f"/datastore/?image={place}"),
        ("PUT", f"/datastore/image?image={place}"),
        ("PUT", f"/datastore/label?image={place}"),
        ("POST", f"{SEGMENT}?image={place}"),
    ):
        sent = {"label": files["file"]} if "label" in path else files if method == "PUT" else {}
        answer = server.form(method, path, {"params": "{}"}, sent)
        assert answer.status == 400, (path, answer.body)
    for path in ("image", "image/info", "label"):
        name = "label" if path == "label" else "image"
        assert server.ask("GET", f"/datastore/{path}?{name}={place}&tag=final").status in (400, 404)


@pytest.mark.parametrize("place", PLACES)
def test_tags_stay_in_the_studies_folder(server, ids, archive, untouched, place):
    image = ids[archive.avi]
    label = {"label": ("x.nii.gz", CINE)}
    answer = server.form(
        "PUT", f"/datastore/label?image={image}&tag={place}", {"params": "{}"}, label
    )
    assert answer.status == 400 and "is no tag" in answer.json["detail"]
    for params in ({"label_tag": "../../x", "save_label": True}, {"save_label": True}):
        answer = server.form("POST", f"{SEGMENT}?image={image}", {"params": json.dumps(params)})
        assert answer.status == 400


def test_names_of_files_that_are_sent_are_not_trusted(server, ids, archive, untouched):
    for name in ("../../x.nii.gz/../y", "x.sh", "/etc/cron.d/x", "model.pt", "x.zip"):
        form = {"params": "{}"}
        image = server.form("PUT", "/datastore/image?image=evil", form, {"file": (name, CINE)})
        label = server.form(
            "PUT", f"/datastore/label?image={ids[archive.avi]}", form, {"label": (name, CINE)}
        )
        assert (image.status, label.status) == (400, 400), name


def test_archives_are_not_unpacked(server, untouched):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("../../escaped.txt", "x")
    body = {"files": ("x.zip", packed.getvalue())}
    assert server.form("PUT", "/session/?uncompress=true", {}, body).status == 404
    for path in ("/session/x", "/session/..%2F..%2Fx?image=true"):
        assert server.ask("GET", path).status == 404


@pytest.mark.parametrize(
    "expression", ["$__import__('os').system('touch PLACE')", "@x", "%/etc/passwd"]
)
def test_expressions_of_a_config_are_not_run(server, ids, archive, untouched, expression):
    value = expression.replace("PLACE", str(untouched / "executed"))
    for name in ("discovr_segmentation", "x", quote(value, safe="")):
        for params in ({"max_epochs": value}, {"view": value}, {value: 1}, {"train#x": value}):
            assert server.post(f"/train/{name}", params).status in (400, 404)
            assert server.post(f"/train/{name}?run_sync=true", params).status in (400, 404)
            assert server.post("/batch/infer/discovr_segmentation", params).status == 400
            assert server.post("/scoring/dice", params).status == 400
            assert server.post("/activelearning/random", params).status == 400
            form = {"params": json.dumps(params)}
            assert server.form("POST", f"{SEGMENT}?image={ids[archive.avi]}", form).status == 400
    assert not (untouched / "executed").exists()


def test_no_file_of_the_machine_is_read(server, ids, archive, untouched):
    source = archive.root / archive.nifti
    image = ids[archive.avi]
    for path in (f"?image={quote(str(source), safe='')}", "?image=errors.txt", "?image=work",
                 f"?image={image}&session_id=x", f"?image={image}&output=dicom_seg"):  # fmt: skip
        assert server.form("POST", SEGMENT + path, {"params": "{}"}).status == 400, path
    for params in (
        {"image": str(source)},
        {"label": str(source)},
        {"session": "x"},
        {"model": "x"},
        {"view": str(source)},
    ):
        answer = server.form("POST", f"{SEGMENT}?image={image}", {"params": json.dumps(params)})
        assert answer.status == 400, params
    sent = {"file": ("x.nii.gz", CINE)}
    assert server.form("POST", f"{SEGMENT}?image={image}", {"params": "{}"}, sent).status == 400
    assert server.form("POST", f"{SEGMENT}?image=", {"params": "{}"}, sent).status == 400


def test_models_are_neither_replaced_nor_handed_out(server, untouched):
    before = MODEL.read_bytes()
    for method in ("GET", "PUT", "DELETE", "HEAD"):
        files = {"file": ("model.pt", b"x")}
        assert server.form(method, "/model/discovr_segmentation", {}, files).status == 404
    assert server.ask("GET", "/model/info/discovr_segmentation").status == 404
    assert MODEL.read_bytes() == before


def test_nothing_is_removed_by_a_request(server, ids, archive, untouched):
    for path in (f"/datastore/image?id={ids[archive.avi]}", f"/datastore/?id={ids[archive.avi]}",
                 f"/datastore/label?id={ids[archive.avi]}&tag=final"):  # fmt: skip
        assert server.ask("DELETE", path).status == 405


@pytest.mark.parametrize("path", ["/logs/", "/logs/gpu", "/proxy/dicom/wado/x", "/ohif/", "/docs", "/openapi.json",
                                  "/", "/static/favicon.ico", "/infer/wsi_v2/x", "/infer//etc/passwd", "/websocket"])  # fmt: skip
def test_closed_routes(server, path):
    assert server.ask("GET", path).status in (404, 405)
    assert server.post(path, {}).status in (404, 405)
    assert server.ask("POST", "/reload").status == 404


def test_other_sites_and_other_names_are_refused(server, untouched):
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
    ):
        for method, path in (
            ("GET", "/info/"),
            ("PUT", "/datastore/?image=x"),
            ("OPTIONS", "/info/"),
        ):
            answer = server.ask(method, path, **headers)
            assert answer.status == 403
            assert "access-control-allow-origin" not in {k.lower() for k in answer.headers}


def test_only_this_machine_reaches_it(server):
    address = urlsplit(server.url)
    assert address.hostname == "127.0.0.1"
    with pytest.raises(OSError):  # bound to every address, it would answer here too
        socket.create_connection(("127.0.0.2", address.port), 2)


def test_sizes_are_limited(server, untouched):
    large = server.ask(
        "PUT",
        "/datastore/?image=x",
        b"x",
        Content_Length=str(10 << 30),
        Content_Type="multipart/form-data; boundary=x",
    )
    assert large.status == 413
    headers = {"Content_Length": str(2 << 20), "Content_Type": "application/json"}
    assert server.ask("POST", "/activelearning/random", b"{}", **headers).status == 413


def test_no_answer_and_no_log_names_a_place_or_a_patient(server, archive, ids):
    for path in ("/info/", "/datastore/?output=all", "/datastore/?output=train", "/datastore/?output=stats",
                 f"/datastore/image/info?image={ids[archive.dicom]}", "/train/", "/scoring/", "/batch/infer"):  # fmt: skip
        said = server.ask("GET", path).body.decode()
        assert str(server.work.parent) not in said and "Smith" not in said and "MRN" not in said
        assert archive.avi not in said, path
    errors = (server.work.parent / "errors.txt").read_text()
    assert str(server.work.parent) not in errors and "Smith" not in errors


# ---- how it starts -------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """What :func:`serve` would run."""
    found = {}
    monkeypatch.setattr(
        module, "start_app", lambda *_: type("App", (), {"datastore": lambda self: None})()
    )
    monkeypatch.setattr(module, "_application", lambda app: app)
    monkeypatch.setattr(module, "find_spec", lambda name: name == "monailabel")
    monkeypatch.setattr(
        module, "run", lambda guard, app, host, *_: found.update(guard=guard, host=host)
    )
    monkeypatch.delenv(module.TOKEN_VARIABLE, raising=False)
    return found


def test_bound_elsewhere_it_asks_for_a_token(started, archive, tmp_path, capsys, monkeypatch):
    module.serve(archive.root, MODEL, work=tmp_path / "a")
    assert started["host"] == "127.0.0.1" and started["guard"].token == ""
    module.serve(archive.root, MODEL, work=tmp_path / "b", host="0.0.0.0")
    guard: Guard = started["guard"]
    assert len(guard.token) >= 32 and f"Token: {guard.token}" in capsys.readouterr().out
    monkeypatch.setenv(module.TOKEN_VARIABLE, "my own token, which is long")
    module.serve(archive.root, MODEL, work=tmp_path / "c")
    assert started["guard"].token == "my own token, which is long"
    assert "my own" not in capsys.readouterr().out


def test_a_second_server_on_the_same_folder_is_refused(server, archive, started):
    with pytest.raises(ValueError, match="another server is at work on 'work'"):
        module.serve(archive.root, MODEL, work=server.work)


def test_without_monai_label_it_says_what_to_type(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="MONAI Label is not installed: make label"):
        module.serve(archive.root, MODEL, work=tmp_path / "work")


def test_a_missing_model_is_named(archive, tmp_path):
    with pytest.raises(FileNotFoundError, match="model 'none.pt' does not exist"):
        module.serve(archive.root, tmp_path / "none.pt", work=tmp_path / "work")
