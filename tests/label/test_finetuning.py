"""Training on the labels so far: better versions serve, bad runs change nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.label.learn import finetuning
from discovr_monai.label.learn.finetuning import FinetuningSettings, deal, finetune
from discovr_monai.label.learn.versions import Versions
from discovr_monai.weights.files import CheckpointError, read_checkpoint
from tests.label.models import write_cines, write_model

QUICK = {"epochs": 12, "lr": 0.05, "batch_size": 8}


@pytest.fixture(scope="module")
def cines(tmp_path_factory) -> tuple[LoadCined, list]:
    root = tmp_path_factory.mktemp("cines") / "work"
    rows = write_cines(root, 40)
    return LoadCined(root=root, size=32, sector=False), rows


@pytest.fixture
def versions(tmp_path) -> Versions:
    return Versions(tmp_path / "versions", write_model(tmp_path / "model.pt"))


def test_the_labels_make_a_better_version(versions, cines, tmp_path):
    loader, rows = cines
    seen = []
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    told = lambda epoch, loss: seen.append((epoch, loss))  # noqa: E731
    outcome = finetune(
        versions, loader, rows, FinetuningSettings(**QUICK), tracking_uri=uri, after_epoch=told
    )
    assert outcome.promoted and outcome.version == versions.current == 1
    assert outcome.scores["dice_mean"] > outcome.serving["dice_mean"] + 0.1
    assert [e for e, _ in seen] == list(range(1, 13)) and seen[-1][1] < seen[0][1]
    assert versions.about(1)["scores"] == outcome.scores
    _only_the_head_changed(versions)
    _the_run_names_nobody(uri, tmp_path, outcome)


def _only_the_head_changed(versions: Versions) -> None:
    old, new = (read_checkpoint(versions.path(n))["network"] for n in (0, 1))
    assert old.keys() == new.keys()
    changed = {k.split(".")[0] for k in old if not torch.equal(old[k], new[k])}
    assert changed == {"segmentation", "segmentation_familiarity"}


def _the_run_names_nobody(uri: str, folder: Path, outcome) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("discovr-annotation").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["promoted"] == 1
    assert run.data.metrics["dice_mean"] == pytest.approx(outcome.scores["dice_mean"])
    assert len(client.get_metric_history(run.info.run_id, "validation_loss")) == 12
    told = str(run.data.params) + str(run.data.tags)
    assert str(folder) not in told and "p1" not in run.data.params.values()


@pytest.mark.parametrize(
    ("score", "expected"), [(float("nan"), "is not above"), (0.0, "is not above")]
)
def test_a_worse_version_never_serves(versions, cines, monkeypatch, score, expected):
    loader, rows = cines
    real = finetuning.PartlyLabelled.scores
    calls = []

    def scores(self, network):
        calls.append(network)
        return real(self, network) if len(calls) == 1 else {"dice_mean": score}

    monkeypatch.setattr(finetuning.PartlyLabelled, "scores", scores)
    outcome = finetune(versions, loader, rows, FinetuningSettings(**(QUICK | {"epochs": 1})))
    assert not outcome.promoted and versions.current == 0
    assert "not above the serving version's" in outcome.reason and expected in outcome.reason


def test_a_diverging_run_makes_no_version(cines, tmp_path):
    loader, rows = cines
    model = write_model(tmp_path / "model.pt")
    state = torch.load(model, weights_only=True)
    for name in [k for k in state if k.startswith("segmentation.") and k.endswith("weight")]:
        state[name] = torch.full_like(state[name], 3e38)
    torch.save(state, model)
    versions = Versions(tmp_path / "versions", model)
    with pytest.raises(ValueError, match="diverged"):
        finetune(versions, loader, rows, FinetuningSettings(**(QUICK | {"epochs": 1})))
    assert versions.numbers == [0] and versions.current == 0


def test_an_empty_label_stops_nothing(versions, cines, tmp_path):
    from nibabel import Nifti1Image, save

    _, rows = cines
    root = tmp_path / "work"
    rows = write_cines(root, 12)
    held = deal(rows, 0.25)["held out"]
    for row in (held[0], deal(rows, 0.25)["training"][0]):
        save(Nifti1Image(np.zeros((40, 40, 8), np.uint8), np.eye(4)), root / row["mask"])
    loader = LoadCined(root=root, size=32, sector=False)
    quick = FinetuningSettings(**(QUICK | {"epochs": 1}))
    assert finetune(versions, loader, rows, quick).version == 1
    for row in held:
        save(Nifti1Image(np.zeros((40, 40, 8), np.uint8), np.eye(4)), root / row["mask"])
    with pytest.raises(ValueError, match="no held-out cine has a contour"):
        finetune(versions, loader, rows, quick)


def test_few_labels_do_not_change_what_is_familiar(versions, cines):
    loader, rows = cines
    outcome = finetune(versions, loader, rows[:14], FinetuningSettings(**(QUICK | {"epochs": 1})))
    old, new = (read_checkpoint(versions.path(n))["network"] for n in (0, outcome.version))
    assert all(torch.equal(old[k], new[k]) for k in old if k.startswith("segmentation_fam"))


def test_blocks_are_not_trained_on_cines_of_an_unknown_view(versions, cines):
    loader, rows = cines
    unknown = [{k: v for k, v in row.items() if k != "view"} for row in rows]
    with pytest.raises(ValueError, match="view of some labelled cines is unknown"):
        finetune(versions, loader, unknown, FinetuningSettings(part="blocks"))


def test_a_crash_leaves_the_serving_version_and_a_failed_run(
    versions, cines, monkeypatch, tmp_path
):
    loader, rows = cines
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"

    def crash(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(finetuning.PartlyLabelled, "tuned", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(versions, loader, rows, FinetuningSettings(**QUICK), tracking_uri=uri)
    assert versions.numbers == [0] and versions.current == 0
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("discovr-annotation").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.parametrize("part", ["decoder", "blocks"])
def test_decoders_and_blocks_can_be_trained(versions, cines, part):
    loader, rows = cines
    settings = FinetuningSettings(part=part, epochs=2, lr=0.01, batch_size=8)
    outcome = finetune(versions, loader, rows, settings)
    old, new = (read_checkpoint(versions.path(n))["network"] for n in (0, outcome.version))
    changed = {k for k in old if k in new and not torch.equal(old[k], new[k])}
    encoder = {
        k.split(".")[1] + k.split(".")[2] for k in changed if k.startswith("image_teacher.b")
    }
    assert encoder == ({"blocks1"} if part == "blocks" else set())
    assert not any(k.startswith("video_teacher") for k in changed)


def test_held_out_patients_stay_held_out():
    rows = [{"image": f"{i}", "patient": f"p{i // 2}"} for i in range(60)]
    few, all_of_them = deal(rows[:30], 0.25), deal(rows, 0.25)
    held = {r["patient"] for r in all_of_them["held out"]}
    trained = {r["patient"] for s in ("training", "validation") for r in all_of_them[s]}
    assert not held & trained and held | trained == {f"p{i}" for i in range(30)}
    assert {r["patient"] for r in few["held out"]} <= held
    for section in ("training", "validation"):
        assert {r["patient"] for r in few[section]} <= trained
    assert 0.1 < len(held) / 30 < 0.45


def test_too_few_labels_are_said(versions, cines):
    loader, rows = cines
    with pytest.raises(ValueError, match="too few to train and to judge"):
        finetune(versions, loader, rows[:1])
    small = [r for r in rows if r in deal(rows, 0.25)["held out"]][:1]
    small += [r for r in rows if r not in deal(rows, 0.25)["held out"]][:3]
    with pytest.raises(ValueError, match="too few to train the encoder's blocks"):
        finetune(versions, loader, small, FinetuningSettings(part="blocks"))


def test_propagated_cines_are_thinned_out(versions, cines, tmp_path):
    root = tmp_path / "work"
    rows = write_cines(root, 6, frames=40, drawn=tuple(range(40)))
    counts = []
    real = finetuning.PartlyLabelled._inputs

    def counted(self, items):
        counts.append(len({(i.row["image"], i.frame) for i in items}))
        return real(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning.PartlyLabelled, "_inputs", counted)
        dealt = deal(rows, 0.3)
        finetune(versions, LoadCined(root=root, size=32, sector=False), rows,
                 FinetuningSettings(epochs=1, held_out=0.3))  # fmt: skip
    assert counts == [12 * len(dealt["training"]), 12 * len(dealt["validation"])]


def test_bad_settings_are_refused(versions, cines):
    for bad in ({"part": "all"}, {"epochs": 0}, {"lr": 0.0}, {"held_out": 1.0}, {"blocks": 0}):
        with pytest.raises(ValueError, match="must|out of range"):
            FinetuningSettings(**bad)
    state = torch.load(versions.path(0), weights_only=True)
    assert np.isfinite(state["segmentation.layers.1.weight"]).all()
    with pytest.raises(CheckpointError, match="no segmentation head"):
        finetuning._tunable(SimpleNamespace(heads={}), FinetuningSettings(), "model.pt")  # type: ignore[arg-type]
