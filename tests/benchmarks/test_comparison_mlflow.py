"""The recorded comparison goes into MLflow: all of it, with the figures that the page has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "compare")]

import comparison_mlflow  # noqa: E402


def test_every_recorded_run_is_taken_and_nothing_else():
    files = comparison_mlflow.recorded()
    assert len(files) >= 29
    assert all({"method", "seed", "tasks"} <= json.loads(f.read_text()).keys() for f in files)


def test_a_recorded_run_is_a_row_with_its_headlines(tmp_path):
    store = f"sqlite:///{tmp_path / 'mlruns.db'}"
    file = next(f for f in comparison_mlflow.recorded() if f.stem == "discovr-0")
    assert comparison_mlflow.log_comparison([file], store) == 1
    client = MlflowClient(store)
    owner = client.get_experiment_by_name(comparison_mlflow.EXPERIMENT)
    runs = client.search_runs([owner.experiment_id], "tags.kind = 'checkpoint'")
    assert [run.data.tags["mlflow.runName"].split(" (")[0] for run in runs] == [
        "discovr, seed 0, video teacher"
    ]
    found = json.loads(file.read_text())["tasks"]["lvef"]["results"]
    mae = next(
        f["value"] for f in found
        if (f["section"], f["method"], f["metric"]) == ("test", "ridge", "mae")
        and f["label_fraction"] == 1
    )  # fmt: skip
    assert runs[0].data.metrics["EF MAE"] == mae
    assert {"Dice", "kNN AUROC", "probe AUROC", "anomaly AUROC"} <= runs[0].data.metrics.keys()
    assert runs[0].info.status == "FINISHED"
