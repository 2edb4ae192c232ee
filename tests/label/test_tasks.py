"""The algorithms as MONAI Label's tasks, over a folder of presented cines."""

from __future__ import annotations

import csv
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")

from discovr_monai.base.types import CineError
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.inference.findings import Analyst
from discovr_monai.inference.model import load_model
from discovr_monai.inference.reading import CineReader
from discovr_monai.label.learn import propagation
from discovr_monai.label.learn.versions import Versions
from discovr_monai.label.server.infer import CinePropagation
from discovr_monai.label.server.routes import task_keys
from discovr_monai.label.server.scoring import scorings
from discovr_monai.label.server.strategies import EmbeddingCache, NextCine, strategies
from discovr_monai.label.server.training import Finetuning
from tests.label.models import write_cines, write_model


class Store:
    """The parts of a datastore that tasks use."""

    def __init__(self, root: Path) -> None:
        self.root, self.info = root, {}

    def list_images(self):
        return [p.name.removesuffix(".nii.gz") for p in self.root.glob("*.nii.gz")]

    def get_labeled_images(self, tag):
        return [p.name.removesuffix(".nii.gz") for p in self.root.glob(f"labels/{tag}/*.nii.gz")]

    def get_image_uri(self, identity):
        return str(self.root / f"{identity}.nii.gz")

    def get_label_uri(self, identity, tag):
        return str(self.root / "labels" / tag / f"{identity}.nii.gz")

    def update_label_info(self, identity, tag, info):
        self.info.setdefault((identity, tag), {}).update(info)


@pytest.fixture
def place(tmp_path) -> SimpleNamespace:
    root = tmp_path / "work"
    write_cines(root, 10)
    model = load_model(write_model(tmp_path / "model.pt"))
    cines = LoadCined(root=root, size=32, sector=False)
    reader = CineReader(cines, 4, model.about["clip"], 2, 0.5, b"salt" * 8)

    def read(identity, view=None):
        found = reader({"image": f"{identity}.nii.gz", "id": identity})
        if "bad" in found:
            kind, problem, remedy = found["bad"]
            raise CineError(identity, problem, remedy, kind)
        return found["seen"]

    versions = Versions(tmp_path / "versions", tmp_path / "model.pt")

    def at(version):
        return Analyst(load_model(versions.checked_path(version)), torch.device("cpu"))

    server = SimpleNamespace(model=model, cines=cines, read=read, at=at, ready=at(0).ready)
    server.facts = lambda identity: {"view": "A4C", "patient": f"p{identity}"}
    server.name = lambda identity: f"a visit/{identity}.avi"
    server.limited = lambda: nullcontext(lambda: None)
    return SimpleNamespace(root=root, server=server, store=Store(root), versions=versions)


def maps(file: str | Path) -> np.ndarray:
    return np.asarray(nibabel.load(file).dataobj).T


@pytest.fixture(autouse=True)
def no_flow(monkeypatch):
    monkeypatch.setattr(propagation, "lucas_kanade", lambda a, b: np.zeros((2, *a.shape)))


def test_propagation_fills_every_frame_and_keeps_the_drawn(place):
    task = CinePropagation(place.server)
    assert task.info()["type"] == "segmentation"  # what 3D Slicer runs on a whole cine
    image = place.store.get_image_uri("c00")
    file, params = task({"image": image})
    drawn, found = maps(place.store.get_label_uri("c00", "final")), maps(file)
    assert params["drawn"] == [1, 5] and found.any((1, 2)).all()
    assert (found[[1, 5]] == drawn[[1, 5]]).all()
    assert (nibabel.load(file).affine == nibabel.load(image).affine).all()
    one, params = task({"image": image, "frames": "5"})
    assert params["drawn"] == [5] and (maps(one)[5] == drawn[5]).all()
    for f in (file, one):
        Path(f).unlink()


def test_propagation_takes_sent_labels_and_no_other_file(place, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    task = CinePropagation(place.server)
    image = place.store.get_image_uri("c01")
    sent = tmp_path / "sent.nii.gz"
    sent.write_bytes(Path(place.store.get_label_uri("c01", "final")).read_bytes())
    file, _ = task({"image": image, "label": str(sent)})
    assert maps(file).any((1, 2)).all()
    with pytest.raises(ValueError, match="no file that was sent"):
        task({"image": image, "label": place.store.get_label_uri("c01", "final")})
    with pytest.raises(ValueError, match="must be frames with a label"):
        task({"image": image, "frames": "0"})
    Path(place.store.get_label_uri("c01", "final")).unlink()
    with pytest.raises(ValueError, match="nothing is drawn in this cine"):
        task({"image": image})


def test_strategies_name_unlabelled_cines_only(place):
    known = strategies(place.server)
    assert set(known) == {"coverage", "uncertainty", "both", "random"}
    for name in ("c02", "c04"):
        Path(place.store.get_label_uri(name, "final")).unlink()
    (place.root / "c04.nii.gz").write_bytes(b"damaged")
    for name in ("coverage", "uncertainty", "both"):
        assert known[name]({}, place.store)["id"] == "c02"  # c04 cannot be shown
    assert known["random"]({}, place.store)["id"] in ("c02", "c04")
    write = Path(place.store.get_label_uri("c02", "final"))
    write.write_bytes(b"")
    assert known["coverage"]({}, place.store) is None


def test_a_choice_takes_its_time_and_no_more(place):
    cache = EmbeddingCache(place.server, seconds=0)
    for name in ("c07", "c08", "c09"):
        Path(place.store.get_label_uri(name, "final")).unlink()
    strategy = NextCine("coverage", cache)
    found = [strategy({}, place.store) for _ in range(10)]
    assert [f["seen"] for f in found] == list(range(1, 11))  # one more each time
    assert all(f["of"] == 10 and f["id"] in ("c07", "c08", "c09") for f in found)
    place.server.model.sha256 = "another"
    assert strategy({}, place.store)["seen"] == 1  # a new version is asked anew


def test_training_is_reported_and_scored(place):
    task = Finetuning(place.server, place.versions, None)
    found = task({"epochs": 6, "lr": 0.05, "part": ["head", "decoder"], "x": "$evil"}, place.store)
    stats = task.stats()
    assert found["version"] == 1 and found["promoted"] and stats["current"] == 1
    assert stats["training"]["state"] == "done"
    assert stats["versions"]["1"]["dice_mean"] == found["scores"]["dice_mean"]
    assert set(task.config()) == {"part", "blocks", "epochs", "lr"}
    # 3D Slicer's two bars: epochs done, and the Dice of what serves
    task._say({"state": "running", "epoch": 3, "epochs": 6})
    stats = task.stats()
    assert (stats["epoch"], stats["total_epochs"]) == (3, 6)
    assert stats["best_metric"] == found["scores"]["dice_mean"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"epochs": "many"}, "invalid literal"),
        ({"epochs": 0}, "out of range"),
        ({"lr": None}, "lr is"),
    ],
)
def test_senseless_trainings_are_refused(place, request_, said):
    task = Finetuning(place.server, place.versions, None)
    with pytest.raises(ValueError, match=said):
        task(request_, place.store)
    assert place.versions.current == 0


def test_a_failed_training_is_reported(place):
    for file in place.root.glob("labels/final/*"):
        file.unlink()
    task = Finetuning(place.server, place.versions, None)
    with pytest.raises(ValueError, match="too few"):
        task({}, place.store)
    assert task.stats()["training"]["state"] == "failed" and place.versions.current == 0


def test_scorings_write_what_json_holds(place):
    import json

    known = scorings(place.server, place.versions)
    (place.root / "labels" / "original").mkdir()
    own = Path(place.store.get_label_uri("c03", "final"))
    Path(place.store.get_label_uri("c03", "original")).write_bytes(own.read_bytes())
    found = known["dice"]({}, place.store)
    assert found == {"cines": 1, "set_aside": [], "lv_cavity": 1.0, "myocardium": 1.0}
    assert place.store.info[("c03", "final")]["dice_original"]["lv_cavity"] == 1.0
    judged = known["plausibility"]({"y": "final"}, place.store)
    assert judged["cines"] == 10 and judged["score"] == 1
    assert known["plausibility"]({"y": "original"}, place.store)["cines"] == 1
    assert known["dice"]({"y": "original", "y_pred": "final"}, place.store)["cines"] == 1
    assert place.store.info[("c03", "final")]["plausibility"]["score"] == 1
    json.dumps([found, judged, list(place.store.info.values())])
    app = SimpleNamespace(_scoring_methods=known)  # what the server lets through
    for method, options in (("dice", {"y", "y_pred"}), ("plausibility", {"y"})):
        assert options <= task_keys(app, "/scoring/{method}", {"method": method})


def test_a_label_that_cannot_be_read_does_not_end_a_scoring(place):
    known = scorings(place.server, place.versions)
    (place.root / "labels" / "original").mkdir()
    for identity in ("c03", "c05"):
        own = Path(place.store.get_label_uri(identity, "final"))
        Path(place.store.get_label_uri(identity, "original")).write_bytes(own.read_bytes())
    Path(place.store.get_label_uri("c03", "final")).write_bytes(b"damaged")
    found = known["dice"]({}, place.store)
    assert found == {"cines": 1, "set_aside": ["c03"], "lv_cavity": 1.0, "myocardium": 1.0}
    judged = known["plausibility"]({}, place.store)
    assert (judged["cines"], judged["set_aside"]) == (9, ["c03"])


def test_two_versions_are_compared_by_running_both(place):
    trainer = Finetuning(place.server, place.versions, None)
    trainer({"epochs": 6, "lr": 0.05}, place.store)
    score = scorings(place.server, place.versions)["versions"]
    found = score({}, place.store)
    assert (found["cines"], found["version"], found["other"]) == (10, 1, 0)
    assert found["version_dice"]["lv_cavity"] > found["other_dice"].get("lv_cavity", 0) + 0.2
    same = score({"version": 1, "other": "1"}, place.store)
    assert same["between"]["lv_cavity"] == 1 and same["version_dice"] == same["other_dice"]
    assert trainer.stats()["compared"] == same
    with pytest.raises(ValueError, match="no version 7: there are"):
        score({"version": 7}, place.store)
    with pytest.raises(ValueError, match="must be a number"):
        score({"other": "new"}, place.store)


def test_a_cine_that_cannot_be_compared_is_set_aside(place, monkeypatch):
    score = scorings(place.server, place.versions)["versions"]
    report = place.versions.folder / "compared.set_aside.csv"
    labels = {i: Path(place.store.get_label_uri(i, "final")) for i in ("c02", "c04", "c06", "c08")}
    kept = {i: label.read_bytes() for i, label in labels.items()}
    for label in labels.values():
        label.unlink()
    without = score({}, place.store)
    assert without["cines"] == 6 and without["set_aside"] == [] and not report.exists()
    for identity, label in labels.items():
        label.write_bytes(kept[identity])
    cine = Path(place.store.get_image_uri("c02"))
    good, _ = cine.read_bytes(), cine.write_bytes(b"damaged")
    labels["c04"].write_bytes(b"damaged")
    labels["c06"].write_bytes(Path(place.store.get_image_uri("c06")).read_bytes()[:200])
    maps = Analyst.frame_maps

    def runs_out(analyst, seen):
        if seen.row["id"] == "c08":
            raise RuntimeError("out of memory")
        return maps(analyst, seen)

    monkeypatch.setattr(Analyst, "frame_maps", runs_out)
    found = score({}, place.store)
    assert found == without | {"set_aside": ["c02", "c04", "c06", "c08"]}
    header, *rows = csv.reader(report.read_text().splitlines())
    assert header == ["file", "kind", "reason", "what to do"]
    assert [row[0] for row in rows] == [f"a visit/{i}.avi" for i in labels]
    reasons = (
        "cannot be read",
        "cannot be read",
        "cannot be read",
        "the model failed on it (Runtime",
    )
    assert all(words in row[2] for words, row in zip(reasons, rows, strict=True))
    assert rows[3][3] == "Report it, leave it out"
    assert report.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(Analyst, "frame_maps", maps)
    cine.write_bytes(good)
    for identity, label in labels.items():
        label.write_bytes(kept[identity])
    assert score({}, place.store)["cines"] == 10 and not report.exists()


def test_where_nothing_can_be_compared_the_scoring_says_so(place):
    for image in place.root.glob("*.nii.gz"):
        image.write_bytes(b"damaged")
    score = scorings(place.server, place.versions)["versions"]
    with pytest.raises(ValueError, match=r"^no cine could be compared: all 10 were set aside, the"):
        score({}, place.store)
    assert not (place.versions.folder / "compared.json").exists()
    report = (place.versions.folder / "compared.set_aside.csv").read_text()
    assert len(report.splitlines()) == 1 + 10
