"""How MLflow's runs are grouped and named, and what its first table shows."""

from __future__ import annotations

import json

import pytest
from mlflow.tracking import MlflowClient

from discovr_monai.base.tracking import (
    CHECKPOINTS,
    VIEW,
    addresses,
    log_evaluation,
    save_view,
    serve,
    training_store,
    unique_run_name,
)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Two tasks of one checkpoint, one of another; the first task twice."""
    folder = tmp_path_factory.mktemp("store")
    store = f"sqlite:///{folder / 'mlruns.db'}"
    (folder / "report.html").write_text("page")
    for checkpoint, task, value in (
        ("aaaa1111", "knn", 0.5), ("aaaa1111", "lvef", 6.0), ("bbbb2222", "knn", 0.75),
        ("aaaa1111", "knn", 0.625),
    ):  # fmt: skip
        log_evaluation(
            store,
            experiment="evaluations",
            task=task,
            settings={
                "checkpoint": checkpoint, "branch": "video_teacher", "data": "0f0f", "k": [1, 5],
                "training": {"preset": "demo", "seed": 3, "weights": {"video": 1.0}},
            },
            metrics={"test/k 5/f1": value, "bad": float("nan")},
            headlines={f"{task} score": value},
            artifacts=[folder / "report.html"],
        )  # fmt: skip
    return store


def runs(store, words):
    client = MlflowClient(store)
    owner = client.get_experiment_by_name("evaluations").experiment_id
    return client.search_runs([owner], words, order_by=["start_time ASC"])


def test_a_checkpoint_is_one_row_with_what_sums_it_up(logged):
    first, second = runs(logged, "tags.kind = 'checkpoint'")
    assert first.info.run_name == "demo, seed 3, video teacher (aaaa11)"
    assert first.data.metrics == {"knn score": 0.625, "lvef score": 6.0}  # the newest
    assert second.data.metrics == {"knn score": 0.75}
    assert first.data.params["weights"] == "{'video': 1.0}"
    assert {"preset": "demo", "seed": "3", "data": "0f0f"}.items() <= first.data.tags.items()
    assert {r.info.status for r in runs(logged, "")} == {"FINISHED"}


def test_evaluations_are_its_children(logged):
    parent = runs(logged, "tags.kind = 'checkpoint'")[0].info.run_id
    children = runs(logged, f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [r.info.run_name.split(":")[0] for r in children] == ["knn", "lvef", "knn"]
    assert children[0].data.metrics == {"test/k 5/f1": 0.5, "knn score": 0.5}
    assert children[0].data.params["preset"] == "demo"
    assert "training" not in children[0].data.params
    (file,) = MlflowClient(logged).list_artifacts(children[0].info.run_id)
    assert file.path == "report.html"


def test_the_view_is_saved_once_and_a_users_changes_stay(logged):
    client = MlflowClient(logged)
    known = client.get_experiment_by_name("evaluations")
    content = json.loads(known.tags[f"mlflow.sharedViewState.{VIEW}"])
    state = json.loads(content["state"])
    assert state["selectedColumns"][0] == "params.`preset`"
    assert state["orderByKey"] == "metrics.`EF MAE`"
    client.set_experiment_tag(known.experiment_id, "mlflow.note.content", "mine")
    save_view(client, known.experiment_id, CHECKPOINTS)
    again = client.get_experiment(known.experiment_id).tags
    assert again["mlflow.note.content"] == "mine"
    assert again[f"mlflow.sharedViewState.{VIEW}"] == json.dumps(content)


def test_addresses_open_the_view(logged):
    ((name, address),) = addresses(logged, "http://127.0.0.1:1").items()
    assert name == "evaluations"
    assert address.startswith("http://127.0.0.1:1/#/experiments/1/runs?")
    assert address.endswith(f"&viewStateShareKey={VIEW}")


def test_no_store_no_server(tmp_path):
    with pytest.raises(ValueError, match=r"^none.db does not exist: train or evaluate first"):
        serve(tmp_path / "none.db")


def test_trainings_share_the_bundles_store_unless_they_write_elsewhere(tmp_path):
    inside = training_store(str(tmp_path), f"{tmp_path}/output/pretrain")
    assert inside == f"sqlite:///{tmp_path}/output/mlruns.db"
    outside = training_store(str(tmp_path), "/shared/pretrain")
    assert outside == "sqlite:////shared/pretrain/mlruns.db"
    assert (
        training_store(str(tmp_path), f"{tmp_path}/output2")
        == f"sqlite:///{tmp_path}/output2/mlruns.db"
    )


def test_run_names_are_never_the_same():
    assert unique_run_name("a") != unique_run_name("a")
    assert unique_run_name("demo, seed 0").startswith("demo, seed 0 (")
