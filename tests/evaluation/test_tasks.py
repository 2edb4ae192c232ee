"""Known embeddings give known figures; stale or wrong input is refused in one sentence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists.scan import load_datalist
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder
from discovr_monai.evaluation.features.extract import (
    Features,
    Section,
    check_splits,
    subset_by_patient,
)
from discovr_monai.evaluation.report.nearest import telling_cases
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.tasks.anomaly import Anomaly, anomaly_scores
from discovr_monai.evaluation.tasks.knn import KNN, knn_scores
from discovr_monai.evaluation.tasks.linear_probe import AttentiveHead, LinearProbe, fit_logistic
from discovr_monai.evaluation.tasks.lvef import LVEF
from discovr_monai.weights.files import CheckpointError
from tests.evaluation.conftest import write_checkpoint

CLASSES = ["normal", "abnormal"]


def made_up(strength: float = 3.0, tokens: bool = False, **rows_of) -> SimpleNamespace:
    """Features in which the first column tells the class and the second the EF."""
    rng = np.random.default_rng(0)
    sections, rows = {}, {}
    for name, count in {"training": 80, "validation": 40, "test": 60, **rows_of}.items():
        rows[name] = []
        x = rng.normal(size=(count, 6)).astype(np.float32)
        for i in range(count):
            label, ef = i % 2, float(np.clip(55 + 10 * x[i, 1], 0, 100))
            x[i, 0] = strength * (2 * label - 1) + 0.1 * x[i, 0]
            patient = f"{name}{i // 2}"
            rows[name].append(
                {"image": f"{name}{i}.avi", "id": f"{name}{i}", "patient": patient, "label": label,
                 "ef": ef}
            )  # fmt: skip
        every = np.repeat(x[:, None], 3, 1).astype(np.float16) if tokens else None
        sections[name] = Section(rows[name], x, x, x, every)
    fake = SimpleNamespace(
        rows=rows, keep_tokens=tokens, clips_per_cine=1,
        encoder=SimpleNamespace(device=torch.device("cpu"), branch="video_teacher", module=None),
    )  # fmt: skip
    fake.sections = sections
    fake.thumbnail = lambda row: np.full((8, 8), 100, np.uint8)
    return fake


class Made(SimpleNamespace):
    def __getitem__(self, name):
        return self.sections[name]


def features(**options) -> Made:
    return Made(**vars(made_up(**options)))


def figures(content, section="test", **wanted):
    return {
        r["metric"]: r
        for r in content["results"]
        if r["section"] == section and all(r[k] == v for k, v in wanted.items())
    }


@pytest.fixture
def results(tmp_path):
    return Results("task", tmp_path / "out", draws=50)


# ---- kNN -----------------------------------------------------------------------------------


def test_knn_is_the_weighted_vote():
    rng = np.random.default_rng(0)
    bank, labels, queries = (
        rng.normal(size=(20, 5)),
        rng.integers(0, 3, 20),
        rng.normal(size=(4, 5)),
    )
    found = knn_scores(bank, labels, queries, k=7, temperature=0.07, classes=3)
    for query, row in zip(queries, found, strict=True):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        near = np.argsort(-cosine)[:7]
        votes = np.array([np.exp(cosine[near] / 0.07)[labels[near] == c].sum() for c in range(3)])
        np.testing.assert_allclose(row, votes / votes.sum(), rtol=1e-10)


def test_knn_does_not_overflow_at_small_temperature():
    found = knn_scores(np.eye(2), np.array([0, 1]), np.eye(2), 2, 1e-4, 2)
    np.testing.assert_allclose(found, np.eye(2))


def test_separable_features_are_classified(results):
    content = KNN(features(), results, classes=CLASSES, k=[5]).run()
    assert figures(content)["macro_f1"]["value"] == 1
    written = json.loads((results.folder / "results.json").read_text())
    assert written == json.loads(json.dumps(content))
    assert (results.folder / "test_confusion.png").exists()


def test_the_report_says_it_all_without_names(results):
    results.settings = {"branch": "video_teacher", "training": {"preset": "demo"}}
    KNN(features(), results, classes=CLASSES, k=[1, 5]).run()
    page = (results.folder / "report.html").read_text()
    assert page.count('class="query"') == 2  # nothing was called wrongly
    assert "normal: 30 of 30 right; abnormal: 30 of 30 right." in page
    for word in ("kNN macro F1", "training.preset", "abnormal, called so", "k=5"):
        assert word in page, word
    assert ".avi" not in page
    assert [h["method"] for h in results.headlines] == ["k=5", "k=5"]


def test_telling_cases_are_of_each_class_and_wrong_ones():
    truth = np.array([0, 0, 1, 1, 0])
    sure = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.7, 0.3], [0.4, 0.6]])
    assert telling_cases(truth, sure) == [0, 2, 3, 4]


def test_k_beyond_the_bank(results):
    with pytest.raises(ValueError, match="k 81 needs 1 to 80 labelled cines"):
        KNN(features(), results, classes=CLASSES, k=[81]).run()


# ---- probes --------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["logistic", "linear", "attentive"])
def test_probes_learn_what_is_there_and_nothing_else(results, probe):
    options = {"classes": CLASSES, "probe": probe, "epochs": 30, "lr": 1e-2, "batch_size": 16}
    good = LinearProbe(features(tokens=True), results, **options).run()
    assert figures(good)["auroc"]["value"] > 0.95
    blank = Results("none", results.folder, draws=50)
    bad = LinearProbe(features(strength=0, tokens=True), blank, **options).run()
    assert figures(bad)["auroc"]["low"] < 0.5 < figures(bad)["auroc"]["high"]


def test_c_is_chosen_on_validation():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 200)), rng.integers(0, 2, 30)  # nothing to learn: shrink
    _, chosen = fit_logistic(
        x, y, rng.normal(size=(60, 200)), rng.integers(0, 2, 60), [1e-4, 1, 100], 2
    )
    assert chosen == 1e-4


def test_few_labels_by_one_key(results):
    shares = [0.05, 0.5, 1.0]
    for task, options in [
        (LinearProbe, {"classes": CLASSES}),
        (KNN, {"classes": CLASSES, "k": [1]}),
        (Anomaly, {"classes": CLASSES, "k": 1}),
        (LVEF, {}),
    ]:
        mine = Results(task.__name__, results.folder / task.__name__, draws=20)
        content = task(features(), mine, label_fractions=shares, **options).run()
        assert {r["label_fraction"] for r in content["results"]} == set(shares)
    assert (results.folder / "LinearProbe" / "few_labels.png").exists()


def test_subsets_are_nested_and_hold_every_class():
    rows = made_up().rows["training"]
    labels = np.array([r["label"] for r in rows])
    small, large = (subset_by_patient(rows, f, 0, labels) for f in (0.1, 0.5))
    assert set(small) <= set(large) and len(small) < len(large) < len(rows)
    assert len(subset_by_patient(rows, 1e-3, 0, labels)) >= 1
    with pytest.raises(ValueError, match=r"label fraction 0 must lie in \(0, 1\]"):
        subset_by_patient(rows, 0, 0)


def test_a_class_on_later_rows_only_is_kept_and_has_its_column():
    rows = [{"image": f"{i}", "patient": f"p{i // 2}"} for i in range(40)]
    labels = np.arange(40) % 2  # every patient's first row is of class 0, the second of class 1
    labels[[7, 21]] = 2
    small, large = (subset_by_patient(rows, f, 0, labels) for f in (0.05, 0.3))
    assert set(labels[small]) == {0, 1, 2} and set(small) <= set(large)
    x = np.eye(4)[labels[labels != 1]]  # of three classes, the middle one is missing
    predict, _ = fit_logistic(x, labels[labels != 1], np.eye(4)[:3], np.arange(3), [1.0], 3)
    found = predict(np.eye(4)[:3])
    assert found.shape == (3, 3) and found.argmax(1)[[0, 2]].tolist() == [0, 2]
    assert (found[:, 1] == 0).all()


def test_a_diverged_training_is_no_result():
    from torch.utils.data import DataLoader, TensorDataset

    from discovr_monai.evaluation.heads.fitting import fit

    head = torch.nn.Linear(2, 1)
    data = TensorDataset(torch.full((4, 2), torch.inf), torch.zeros(4, 1))
    with pytest.raises(
        ValueError, match=r"diverged: no epoch's loss was a number. Lower lr \(0.1\)"
    ):
        fit(
            head,
            [{"params": list(head.parameters()), "lr_scale": 1.0}],
            DataLoader(data, 2),
            prepare=lambda batch, device, non_blocking, **_: (batch[0], batch[1]),
            loss=torch.nn.functional.mse_loss,
            validate=lambda: float(head(data.tensors[0]).mean()),
            epochs=2,
            lr=0.1,
        )


def test_an_attentive_probe_needs_tokens(results):
    with pytest.raises(ValueError, match="set tokens to true"):
        LinearProbe(features(), results, classes=CLASSES, probe="attentive")


def test_the_attentive_head_looks_at_all_tokens():
    head = AttentiveHead(8, 2).eval()
    tokens = torch.randn(2, 5, 8)
    other = tokens.clone()
    other[:, 4, 0] += 5
    assert not torch.allclose(head(tokens), head(other))


# ---- EF and anomaly ------------------------------------------------------------------------


def test_ridge_finds_the_ef_and_the_median_stands_beside(results):
    content = LVEF(features(), results).run()
    ridge, median = figures(content, method="ridge"), figures(content, method="training median")
    truth = np.array([r["ef"] for r in features().rows["test"]])
    training = np.array([r["ef"] for r in features().rows["training"]])
    assert ridge["mae"]["value"] < 0.5
    expected = np.abs(truth - np.median(training)).mean()
    assert median["mae"]["value"] == pytest.approx(expected, rel=1e-5)
    assert ridge["auroc_under_50"]["value"] > 0.99
    assert ridge["coverage_90"]["value"] > 0.75
    assert (results.folder / "test_agreement.png").exists()


def test_anomalies_are_far_from_the_normal_ones(results):
    content = Anomaly(features(), results, classes=CLASSES).run()
    assert figures(content)["auroc"]["value"] == 1
    assert figures(content)["f1"]["value"] == 1
    rng = np.random.default_rng(0)
    bank, query = rng.normal(size=(9, 4)), rng.normal(size=(1, 4))
    cosine = (bank @ query[0]) / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    expected = np.sort(1 - cosine)[:3].mean()
    assert anomaly_scores(bank, query, 3)[0] == pytest.approx(expected)


def test_more_neighbours_than_normal_hearts(results):
    with pytest.raises(ValueError, match="k 50 needs 1 to 40 normal cines"):
        Anomaly(features(), results, classes=CLASSES, k=50).run()


# ---- bad labels ----------------------------------------------------------------------------


def spoiled(section, change):
    found = features()
    found.rows[section] = [change(i, dict(r)) for i, r in enumerate(found.rows[section])]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, r: {k: v for k, v in r.items() if k != "label"}, "60 of 60 rows of section 'test' have no 'label'"),
        (lambda i, r: r | {"label": 0}, "section 'test' holds only class 'normal'"),
        (lambda i, r: r | {"label": 7 if i == 3 else i % 2}, "test3.avi: label 7 is none of the classes"),
    ],
)  # fmt: skip
def test_class_labels_that_cannot_be_used(results, change, message):
    for task in (KNN, Anomaly, LinearProbe):
        with pytest.raises(ValueError, match=message):
            task(spoiled("test", change), results, classes=CLASSES).run()


def test_classes_may_be_given_by_name(results):
    found = spoiled("test", lambda i, r: r | {"label": CLASSES[r["label"]]})
    assert figures(KNN(found, results, classes=CLASSES, k=[1]).run())["accuracy"]["value"] == 1


@pytest.mark.parametrize("value", [101, -1, "much", float("nan")])
def test_an_ef_outside_its_range(results, value):
    found = spoiled("training", lambda i, r: r | {"ef": value if i == 5 else r["ef"]})
    with pytest.raises(ValueError, match=r"training5.avi: ef .* no ejection fraction in percent"):
        LVEF(found, results).run()


def test_a_leaked_patient_stops_the_run():
    rows = made_up().rows
    rows["test"][4] = rows["test"][4] | {"patient": rows["training"][0]["patient"]}
    with pytest.raises(ValueError, match="1 patients of section 'test' are also in 'training'"):
        check_splits(rows)


def test_a_leaked_cine_stops_the_run_where_patients_are_unknown():
    row = {"image": "a.avi", "id": "x"}
    with pytest.raises(ValueError, match="of section 'test' are also in 'training'"):
        check_splits({"training": [row], "test": [row]})


# ---- features ------------------------------------------------------------------------------


@pytest.fixture
def real(labelled, checkpoint, tmp_path):
    def build(ckpt=checkpoint, branch="video_teacher", file="f.npz", **options):
        encoder = EvaluatedEncoder(ckpt, branch)
        loader = LoadCined(root=labelled, size=encoder.image_size)
        data = load_datalist(labelled, loader=loader, output_dir=tmp_path)
        sections = options.pop("sections", ["training", "validation", "test"])
        return Features(encoder, data, loader, sections, tmp_path / file, **options)

    return build


def test_features_are_computed_once_and_reused(real):
    first = real()
    found = first["training"].mean
    assert found.shape == (len(first.rows["training"]), 24)
    second = real()
    second._section = None  # would fail if it computed
    np.testing.assert_array_equal(second["training"].mean, found)


def test_a_cine_does_not_depend_on_its_neighbours(real):
    whole, alone = real(), real(file="g.npz", batch_size=1)
    np.testing.assert_allclose(whole["test"].cls, alone["test"].cls, atol=1e-6)


def test_missing_sections_are_added(real):
    real(sections=["training"]).load()
    later = real()
    assert set(later.load()) == {"training", "validation", "test"}


@pytest.mark.parametrize("branch", ["video_student", "image_teacher", "mean_frame", "temporal_std", "pixel_pca"])  # fmt: skip
def test_every_branch_gives_features_and_tokens(real, branch):
    found = real(branch=branch, tokens=True, clips_per_cine=1)
    section = found["training"]
    assert np.isfinite(section.pooled("both")).all()
    t, h, w = found.encoder.module.grid
    assert section.tokens.shape[1:] == (t * h * w, found.encoder.module.token_dim)


def test_motion_is_the_deviation_over_time_by_place():
    from discovr_monai.evaluation.features.encoders import pool_tokens

    tokens = torch.zeros(2, 3, 8, 8, 5)  # (B, t, h, w, d)
    tokens += torch.randn(2, 1, 8, 8, 5)  # what stands still
    tokens[:, 1, :2, 6:, 3] += 3.0  # one place and feature moves, at the upper right
    found = torch.cat([torch.ones(2, 1, 1, 5), tokens.flatten(1, 3)[:, None]], 2)  # CLS first
    pooled = pool_tokens(found, (3, 8, 8))
    assert pooled["motion"].shape == (2, 5 * 4 * 4)
    motion = pooled["motion"].clone().unflatten(1, (5, 4, 4))
    assert motion[:, 3, 0, 3] == pytest.approx(np.std([0, 3, 0]), abs=1e-4)
    motion[:, 3, 0, 3] = 0
    assert motion.abs().max() < 1e-5
    torch.testing.assert_close(pooled["mean"], tokens.mean((1, 2, 3)))
    by_frame = torch.cat([torch.ones(2, 3, 1, 5), tokens.flatten(2, 3)], 2)  # the image branch
    torch.testing.assert_close(pool_tokens(by_frame, (3, 8, 8))["motion"], pooled["motion"])


@pytest.mark.parametrize("pooling", ["cls", "both", "motion"])
def test_an_ef_can_be_fine_tuned_from_any_pooling(real, pooling):
    from discovr_monai.evaluation.tasks.lvef import Regressor

    encoder = real().encoder.module
    network = Regressor(encoder, 1, pooling, 55.0, 12.0, layer_decay=0.75, weight_decay=0.0)
    out = network(torch.randn(2, *encoder.clip_shape))
    torch.testing.assert_close(out, torch.full((2,), 55.0))
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_temporal_std_sees_motion_and_the_mean_frame_does_not():
    from discovr_monai.evaluation.features.encoders import SimpleFeatures

    like = {"patch_size": 8, "image_size": 32, "num_frames": 4, "tubelet_size": 2}
    still = torch.zeros(1, 3, 4, 32, 32)
    moving = still.clone()
    moving[:, :, ::2, 8:16, 8:16], moving[:, :, 1::2, 8:16, 8:16] = 1, -1
    for kind, differs in (("temporal_std", True), ("mean_frame", False)):
        a, b = (SimpleFeatures(kind, like).embed(c)["mean"] for c in (still, moving))
        assert bool((a - b).abs().max() > 0.1) is differs


def test_stale_features_are_refused(real, tmp_path, labelled):
    real().load()
    other = write_checkpoint(tmp_path / "other.pt", seed=1)
    with pytest.raises(ValueError, match=r"f.npz was made by another checkpoint: remove it"):
        real(other).load()
    with pytest.raises(ValueError, match="made with clips_per_cine 3, not 2"):
        real(clips_per_cine=2).load()
    changed = real()
    changed.cines["test"] = "0"
    with pytest.raises(ValueError, match="made from other cines of section 'test'"):
        changed.load()
    (tmp_path / "f.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="f.npz is not a features file, or damaged"):
        real().load()


def test_a_checkpoint_of_another_shape(checkpoint):
    with pytest.raises(CheckpointError, match="trained with embed_dim 24, the config expects 768"):
        EvaluatedEncoder(checkpoint, expect={"embed_dim": 768})
    with pytest.raises(ValueError, match="branch 'teacher' must be one of video_teacher"):
        EvaluatedEncoder(checkpoint, branch="teacher")


def test_no_image_branch(tmp_path):
    from discovr_monai.networks.discovr import Discovr
    from discovr_monai.networks.vit import VisionTransformer
    from discovr_monai.weights.files import describe_encoders
    from tests.evaluation.conftest import CLIP, SIZES

    network = Discovr(video=VisionTransformer(num_frames=4, tubelet_size=2, **SIZES))
    state = {
        "format": 1,
        "about": describe_encoders(network, CLIP),
        "network": network.state_dict(),
    }
    torch.save(state, tmp_path / "v.pt")
    with pytest.raises(CheckpointError, match="trained without an image branch"):
        EvaluatedEncoder(tmp_path / "v.pt", branch="image_teacher")


def test_other_patients_choose_the_epoch_than_calibrate_the_interval(real, results, monkeypatch):
    """A constant prediction, so that an error tells whose it is."""
    from discovr_monai.evaluation.tasks import lvef

    found, chose, calibrated = real(clips_per_cine=1), [], []
    rows = found.rows["validation"]
    for number, row in enumerate(rows):
        row["ef"] = 40.0 + number
    mean = np.mean([row["ef"] for row in found.rows["training"]])

    class Recorded(lvef.ClipDataset):
        def __init__(self, rows, *args, **options):
            super().__init__(rows, *args, **options)
            chose.extend(row["patient"] for row in rows)

    def untrained(*_, validate, **__):
        chose.clear()
        with monkeypatch.context() as patch:
            patch.setattr(lvef, "ClipDataset", Recorded)
            validate()

    def radius(errors, coverage):
        numbers = np.rint(np.asarray(errors) + mean - 40).astype(int)
        calibrated.extend(rows[i]["patient"] for i in numbers)
        return 10.0

    monkeypatch.setattr(lvef, "fit", untrained)
    monkeypatch.setattr(lvef, "conformal_radius", radius)
    LVEF(found, results, method="fine_tune", pooling="mean", blocks=1, epochs=1).run()
    assert chose and calibrated and not set(chose) & set(calibrated)
    assert {row["patient"] for row in rows} == {*chose, *calibrated}


def test_fine_tuning_needs_two_patients_in_validation(real, results):
    found = real()
    for row in found.rows["validation"]:
        row["patient"] = "p"
    with pytest.raises(ValueError, match="section 'validation' has cines of 1 patient, too few"):
        LVEF(found, results, method="fine_tune")
    LVEF(found, results)
