"""The recorded comparison of compare_methods.py in MLflow: a row for each method and seed.

    python benchmarks/compare/comparison_mlflow.py [--store bundles/discovr/output/mlruns.db]
    make mlflow

Each row has the figures that sum its five tasks up, on the protocol's test section; it opens to
the tasks with all of theirs. Nothing is evaluated here: figures come from results/recorded/*.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from comparison_results import BUNDLE, RESULTS, protocol

from discovr_monai.base.tracking import log_evaluation

EXPERIMENT = "discovr-comparison"
HEADLINES = {  # task -> the method and the metrics that sum it up
    "knn": ("k=20", {"macro_f1": "kNN macro F1", "auroc": "kNN AUROC"}),
    "linear_probe": ("logistic", {"macro_f1": "probe macro F1", "auroc": "probe AUROC"}),
    "lvef": ("ridge", {"mae": "EF MAE", "r2": "EF R2"}),
    "anomaly": ("5 nearest", {"auroc": "anomaly AUROC"}),
    "segmentation": ("linear head, all", {"dice_mean": "Dice"}),
}


def log_comparison(files: list[Path], store: str) -> int:
    """Writes the results of some JSONs; how many.

    Args:
        files: of one size of the protocol.
        store: MLflow's address, "sqlite:////.../mlruns.db".
    """
    plan = protocol("recorded")
    for file in files:
        result = json.loads(file.read_text())
        method = plan["methods"][result["method"]]
        identity = f"{result['method']}-{result['seed']}-{result['protocol']}"
        settings = {
            "checkpoint": hashlib.sha256(identity.encode()).hexdigest()[:16],
            "branch": method.get("branch", "video_teacher"),
            "data": result["protocol"],
            "training": {
                "preset": result["method"],
                "seed": result["seed"],
                "title": method["title"],
                "epochs": plan["size"]["epochs"] if method.get("train", True) else 0,
                "cines": plan["data"]["develop"]["clips"],
            },
        }
        for task, content in result["tasks"].items():
            _log(store, task, settings, content["results"])
    return len(files)


def _log(store: str, task: str, settings: dict[str, Any], figures: list[dict[str, Any]]) -> None:
    wanted, names = HEADLINES[task]
    metrics = {
        f"{f['section']}/{f['method'].replace(',', '').replace('=', ' ')}/{f['metric']}": f["value"]
        for f in figures
        if f["value"] is not None and f["label_fraction"] == 1
    }
    headlines = {
        names[f["metric"]]: f["value"]
        for f in figures
        if (f["section"], f["method"]) == ("test", wanted) and f["metric"] in names
    }
    log_evaluation(
        store, experiment=EXPERIMENT, task=task, settings=settings, metrics=metrics,
        headlines=headlines, artifacts=[],
    )  # fmt: skip


def recorded() -> list[Path]:
    """The JSON of each method and seed."""
    return sorted((RESULTS / "recorded").glob("*-[0-9]*.json"))  # cost.json lies beside them


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = BUNDLE / "output" / "mlruns.db"
    parser.add_argument("--store", type=Path, default=default, help="the SQLite file")
    options = parser.parse_args()
    count = log_comparison(recorded(), f"sqlite:///{options.store.resolve()}")
    print(f"{count} results are in experiment {EXPERIMENT}")


if __name__ == "__main__":
    main()
