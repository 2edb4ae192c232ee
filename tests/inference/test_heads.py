"""Heads speak only of what they know, and belong to one checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.evaluation.heads.saved import (
    Familiarity,
    bundle_heads,
    read_head,
    views_of,
    write_head,
)
from discovr_monai.evaluation.heads.segmenter import SegmentationHead
from discovr_monai.inference.findings import Analyst
from discovr_monai.inference.model import load_model
from discovr_monai.inference.plan import find_cines
from discovr_monai.inference.reading import CineReader
from discovr_monai.weights.files import CheckpointError
from tests.evaluation.conftest import write_checkpoint


def look(model, labelled, change=lambda cine: cine, **options):
    root, rows = find_cines(labelled, None, "test")
    reader = CineReader(LoadCined(root=root, size=32), 4, model.about["clip"], 3, 0.5)
    row = {**rows[0], "id": "x"}
    if "row" in options:
        row |= options.pop("row")
    seen = reader(row)["seen"]
    seen.cine, seen.clips = change(seen.cine), change(seen.clips)
    (found,) = Analyst(model, torch.device("cpu"), **options)([seen])
    return found


def test_the_head_is_the_probe(model_file, model, labelled, heads):
    """What inference says is what the evaluation predicted for the same cines."""
    import csv

    predicted = {
        r["id"]: float(r["predicted"])
        for r in csv.DictReader((heads[0].parent / "lvef" / "predictions.csv").open())
        if r["method"] == "ridge"
    }
    from discovr_monai.base.privacy import load_salt, salted_id

    root, rows = find_cines(labelled, None, "test")
    reader = CineReader(LoadCined(root=root, size=32), 4, model.about["clip"], 3, 0.5)
    analyst = Analyst(model, torch.device("cpu"), contours=False)
    seen = [reader({**r, "id": salted_id(r["image"], load_salt())})["seen"] for r in rows]
    spoken = [f for f in analyst(seen) if f.values["ef"] is not None]
    assert spoken
    for found in spoken:
        wanted = min(max(predicted[found.values["id"]], 0), 100)
        assert found.values["ef"] == pytest.approx(wanted, abs=0.02)


def test_an_unknown_or_other_view_is_withheld(model, labelled):
    known = look(model, labelled)
    assert known.values["ef"] is not None
    assert known.values["ef_withheld"] is None
    unknown = look(model, labelled, row={"view": None})
    assert unknown.values["ef"] is None
    assert (
        unknown.values["ef_withheld"]
        == "the view is unknown: the head is for A4C (name it by --view)"
    )
    assert unknown.labels is None
    assert look(model, labelled, row={"view": None}, view="A4C").values["ef"] is not None
    other = look(model, labelled, row={"view": "PSAX"}, view="A4C")
    assert other.values["ef_withheld"] == "the view is PSAX, the head is for A4C"
    assert "PSAX" in other.values["contours_withheld"]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: np.random.default_rng(0).integers(0, 256, c.shape, np.uint8),
        lambda c: 255 - c,
        np.zeros_like,
    ],
    ids=["noise", "negative", "black"],
)
def test_what_is_unlike_the_training_is_withheld(model, labelled, change):
    found = look(model, labelled, change)
    assert found.values["ef"] is None
    assert "unlike the cines that the head was trained on" in found.values["ef_withheld"]
    assert found.labels is None


def test_familiarity_keeps_what_is_alike():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    train, held, fresh = (rng.normal(size=(n, 6)) @ mix for n in (500, 400, 400))
    found = Familiarity.fit(train.astype(np.float32), held.astype(np.float32))
    inside = found(torch.from_numpy(fresh).float()) <= 1
    assert inside.float().mean() > 0.96
    assert (found(torch.from_numpy(fresh + 40).float()) > 1).all()


def test_a_few_cines_do_not_make_half_of_the_others_strangers():
    rng = np.random.default_rng(1)
    inside = []
    for _ in range(20):
        train, held, fresh = (rng.normal(size=(n, 6)).astype(np.float32) for n in (18, 2, 200))
        found = Familiarity.fit(train, held)
        inside.append(float((found(torch.from_numpy(fresh)) <= 1).float().mean()))
    assert np.mean(inside) > 0.88  # the limit of two cines would let 66 % pass


def test_a_head_needs_its_views():
    rows = [{"image": "a", "view": "A4C"}, {"image": "b"}]
    with pytest.raises(ValueError, match="view of some training cines is unknown"):
        views_of(rows, None)
    assert views_of(rows, "A2C") == ["A2C", "A4C"]


def test_a_head_of_another_checkpoint_is_refused(heads, tmp_path, checkpoint):
    other = write_checkpoint(tmp_path / "other.pt", seed=5)
    with pytest.raises(CheckpointError, match="was made from another checkpoint than other.pt"):
        bundle_heads(other, heads, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="two heads for ef"):
        bundle_heads(checkpoint, [heads[0], heads[0]], tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_a_head_of_the_image_student_keeps_its_encoder(checkpoint, tmp_path):
    from discovr_monai.evaluation.features.encoders import EvaluatedEncoder

    encoder = EvaluatedEncoder(checkpoint, "image_student")
    about = {"kind": "segmentation", "checkpoint": encoder.sha256, "branch": "image_student",
             "head": "linear", "structures": ["lv_cavity"], "views": ["A4C"]}  # fmt: skip
    width = encoder.module.token_dim
    parts = {
        "segmentation": SegmentationHead(width, 2, 1),
        "segmentation_familiarity": Familiarity(2 * width),
    }
    write_head(tmp_path / "head.safetensors", about, parts)
    bundle_heads(checkpoint, [tmp_path / "head.safetensors"], tmp_path / "model.pt")
    assert load_model(tmp_path / "model.pt").structures == ["lv_cavity"]


def test_a_file_that_is_no_head(tmp_path, heads):
    file = tmp_path / "head.safetensors"
    with pytest.raises(CheckpointError, match="head head.safetensors does not exist"):
        read_head(file)
    file.write_bytes(heads[0].read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a head, or damaged"):
        read_head(file)
    write_head(file, {"kind": "mood"}, {})
    with pytest.raises(CheckpointError, match="head of another version"):
        read_head(file)


def test_a_model_without_heads_gives_embeddings_only(checkpoint, labelled):
    model = load_model(checkpoint)
    found = look(model, labelled)
    assert "ef" not in found.values
    assert found.labels is None
    assert found.embedding.shape == (24,)


def test_the_file_is_the_networks_plain_state_dict(model_file, model):
    """So CheckpointLoader and the bundle's ckpt_export take it as it is."""
    found = torch.load(model_file, weights_only=True)
    own = load_model(model_file).state_dict()
    assert set(found) == set(own)
    assert all(torch.equal(found[k], own[k]) for k in own)


def test_the_model_file_serves_every_evaluation(model_file):
    from discovr_monai.evaluation.features.encoders import EvaluatedEncoder

    clip = torch.randn(1, 3, 4, 32, 32)
    for branch in ("video_teacher", "image_teacher"):
        model = load_model(model_file, branch)
        mean = EvaluatedEncoder(model_file, branch).module.embed(clip)["cls"]
        assert torch.equal(model(clip), mean)
    with pytest.raises(CheckpointError, match="model.pt"):
        load_model(model_file, "image_student")
