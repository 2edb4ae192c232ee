"""The datastore's tags, and inference of many cines in turn."""

from __future__ import annotations

from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")

from discovr_monai.base.types import CineError
from discovr_monai.label.server.analyst import CineAnalyst
from discovr_monai.label.server.batch import CineBatch
from discovr_monai.label.server.datastore import CineDatastore

SHAPE = (20, 20, 6)


@pytest.fixture
def store(tmp_path) -> CineDatastore:
    """Three images of noise."""
    (tmp_path / "work").mkdir()
    for name in "abc":
        noise = np.random.default_rng(0).integers(0, 255, SHAPE, dtype=np.uint8)
        nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), tmp_path / "work" / f"{name}.nii.gz")
    return CineDatastore(tmp_path / "work", values=3)


def label(folder, value: int = 1) -> str:
    file = folder / "sent.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full(SHAPE, value, np.uint8), np.eye(4)), file)
    return str(file)


def test_every_tag_has_its_own_labels(store, tmp_path):
    store.save_label("a", label(tmp_path), "final", {})
    store.save_label("b", label(tmp_path), "original", {})
    assert store.get_labeled_images() == store.get_labeled_images("final") == ["a"]
    assert store.get_labeled_images("original") == ["b"]
    assert store.get_unlabeled_images() == ["b", "c"]
    assert store.get_unlabeled_images("original") == ["a", "c"]


def test_values_that_no_structure_has_are_refused_when_they_are_sent(store, tmp_path):
    store.save_label("a", label(tmp_path, 3), "final", {})
    with pytest.raises(ValueError, match="value 4, the model knows 1 to 3"):
        store.save_label("a", label(tmp_path, 4), "final", {})


def test_a_batch_goes_on_after_a_bad_cine_and_leaves_submitted_labels(store, tmp_path):
    store.save_label("c", label(tmp_path), "final", {})
    asked = []

    def infer(request, datastore):
        asked.append((request["image"], request["label_tag"], request["save_label"]))
        if request["image"] == "a":
            raise ValueError("it is no cine")
        if request["image"] == "b":
            raise KeyError("/secret")
        return {"label": "c", "file": label(tmp_path)}

    found = CineBatch()({"images": "all"}, store, infer)
    assert found == {"a": "failed: it is no cine", "b": "failed (KeyError)", "c": "saved"}
    assert asked == [(name, "original", True) for name in "abc"]
    assert not (tmp_path / "sent.nii.gz").exists()
    assert list(CineBatch()({"images": "unlabeled"}, store, infer)) == ["a", "b"]
    assert list(CineBatch()({"images": "all", "max_batch_size": 1}, store, infer)) == ["a"]
    with pytest.raises(ValueError, match="for what annotators submit"):
        CineBatch()({"label_tag": "final"}, store, infer)


def test_the_archives_view_comes_before_a_requests():
    analyst = CineAnalyst.__new__(CineAnalyst)
    rows = []
    analyst.reader = lambda row: rows.append(row) or {"seen": None}
    known = {"patient": "p", "study": "s", "fps": 50.0}
    analyst.view = "A2C"
    for record in (known | {"view": "PLAX"}, known | {"view": None}, {}):
        analyst.cines = SimpleNamespace(record=lambda _, found=record: found)
        analyst.read("a", "A4C")
        assert analyst.facts("a")["view"] == (record.get("view") or "A2C")
    assert [row["view"] for row in rows] == ["PLAX", "A4C", "A4C"]


def test_what_cannot_be_read_is_told_by_id_and_named_for_private_reports():
    analyst = CineAnalyst.__new__(CineAnalyst)
    analyst.view = None
    analyst.reader = lambda row: {"bad": ("unreadable", "it is cut short", "Copy it again")}
    record = {"name": "a visit/one.avi", "patient": "p", "study": "s"}
    analyst.cines = SimpleNamespace(record=lambda identity: record if identity == "a" else {})
    with pytest.raises(CineError, match=r"^a: it is cut short\. Copy it again$") as caught:
        analyst.read("a")
    assert caught.value.kind == "unreadable"
    assert (analyst.name("a"), analyst.name("sent")) == ("a visit/one.avi", "sent")
