"""Every evaluation config by its command, on a small phantom set."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
import yaml

from tests.bundle.conftest import BUNDLE, run
from tests.evaluation.conftest import checkpoint, labelled  # noqa: F401 (fixtures)

TASKS = ("features", "knn", "linear_probe", "lvef", "anomaly", "segmentation")
ARGUMENTS = {
    "features": [],
    "knn": ["--k", "[1,5]"],
    "linear_probe": ["--label_fractions", "[0.5,1.0]"],
    "lvef": ["--thresholds", "[50]"],
    "anomaly": ["--k", "3"],
    "segmentation": ["--epochs", "2"],
}


@pytest.fixture(scope="module")
def evaluate(bundle, labelled, checkpoint, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("evaluation")

    def command(task, *arguments, **options):
        draws = [] if task == "features" else ["--bootstrap_draws", "30"]
        return run(
            bundle, "run", "evaluating", "--config_file", f"configs/{task}.yaml",
            "--ckpt", str(checkpoint), "--dataset_dir", str(labelled),
            "--output_dir", str(folder / task), "--cache_dir", str(folder / "cache"),
            *ARGUMENTS[task], *draws, *arguments, **options,
        )  # fmt: skip

    command.folder = folder
    return command


@pytest.mark.parametrize("task", TASKS)
def test_each_config_runs_by_its_command(evaluate, bundle, labelled, task):  # noqa: F811
    done = evaluate(task)
    assert done.returncode == 0, done.stderr[-3000:]
    if task == "features":
        assert len(list((bundle / "output" / "features").glob("*.npz"))) == 1
        return
    folder = evaluate.folder / task
    content = json.loads((folder / "results.json").read_text())
    assert content["task"] == task and content["results"]
    for row in content["results"]:
        if None not in (row["value"], row["low"], row["high"]):
            assert row["low"] <= row["high"]
    assert (folder / "results.csv").read_text().startswith("section,method,label_fraction,metric")
    text = (folder / "predictions.csv").read_text() + (folder / "results.json").read_text()
    names = [r["image"].split("/")[-1].split(".")[0] for r in _rows(labelled)]
    assert not any(name in text for name in names)  # salted ids only
    store = bundle / "output" / "mlruns.db"
    with sqlite3.connect(store) as database:
        runs = database.execute(
            "select name from runs where name like ?", (f"{task}: %",)
        ).fetchall()
        params = " ".join(v for (v,) in database.execute("select value from params"))
    assert len(runs) == 1
    assert str(labelled.parent) not in params


def _rows(folder):
    sections = json.loads((folder / "datalist.json").read_text())
    return [row for rows in sections.values() for row in rows]


@pytest.mark.parametrize("task", ["linear_probe", "segmentation"])
def test_the_same_checkpoint_gives_the_same_bytes(evaluate, task, tmp_path):
    """In another process, with other hashes, from features made anew."""
    first, again = evaluate.folder / task, tmp_path / "again"
    if not (first / "results.json").exists():
        assert evaluate(task).returncode == 0
    done = evaluate(
        task, "--output_dir", str(again), "--mlflow", "False", "--cache_dir", str(tmp_path),
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("results.json", "results.csv", "predictions.csv"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_the_trained_probes_and_fine_tuning_run(evaluate, tmp_path):
    file = str(tmp_path / "tokens.npz")
    for task, more in [
        ("linear_probe", ["--probe", "attentive", "--tokens", "True", "--features_file", file]),
        ("lvef", ["--method", "fine_tune", "--blocks", "1", "--epochs", "1"]),
    ]:
        done = evaluate(task, "--output_dir", str(tmp_path / task), "--epochs", "2",
                        "--mlflow", "False", *more)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]


def test_bad_input_ends_in_one_sentence(evaluate, labelled, tmp_path):  # noqa: F811
    rows = json.loads((labelled / "datalist.json").read_text())
    rows["test"][0] = {**rows["test"][0], "patient": rows["training"][0]["patient"]}
    leaky = tmp_path / "leaky.json"
    leaky.write_text(json.dumps(rows))
    for arguments, message in [
        (["--datalist", str(leaky)], "of section 'test' are also in 'training'"),
        (["--expect", "{'embed_dim': 768}"], "the config expects 768"),
        (["--ckpt", str(tmp_path / "no.pt")], "checkpoint no.pt does not exist"),
        (["--poolling", "cls"], "Did you mean 'pooling'?"),
    ]:
        done = evaluate("knn", *arguments)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("Error: ") and message in last


def test_shared_keys_mean_the_same_everywhere():
    shared = yaml.safe_load((BUNDLE / "configs" / "features.yaml").read_text())
    for task in TASKS[1:]:
        own = yaml.safe_load((BUNDLE / "configs" / f"{task}.yaml").read_text())
        assert {"evaluating", "initialize", "run", "finalize"} <= set(own)
        different = {k for k in shared if k in own and own[k] != shared[k]}
        allowed = {"imports", "output_dir", "evaluating", "tokens", "batch_size"}
        assert different <= allowed, task
