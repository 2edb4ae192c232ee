"""MLflow for what has no training loop: one run with parameters, figures and pictures."""

from __future__ import annotations

import logging
import math
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def unique_run_name(prefix: str = "discovr") -> str:
    """A run name that no other run has: MLflow would otherwise join unfinished runs."""
    return f"{prefix}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def versions() -> dict[str, str]:
    """Versions of what matters, and the git commit where there is one."""
    found = {p: version(p) for p in ("discovr-monai", "torch", "monai", "pytorch-ignite", "numpy")}
    try:
        here = Path(__file__).parent
        run = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        found["git_commit"] = run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git_commit"] = "unknown"
    return found


def log_run(
    tracking_uri: str,
    *,
    experiment: str,
    run_name: str,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[Path],
) -> None:
    """Writes one finished run.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address; its artifacts lie
            beside a SQLite file.
        experiment, run_name: where it goes; the name must be new.
        parameters: never a path or a patient's name.
        metrics: those that are not finite are left out.
        artifacts: files.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    place = None
    if tracking_uri.startswith("sqlite:///"):
        store = Path(tracking_uri.removeprefix("sqlite:///"))
        store.parent.mkdir(parents=True, exist_ok=True)
        place = (store.parent / "mlruns").resolve().as_uri()
    client = MlflowClient(tracking_uri)
    known = client.get_experiment_by_name(experiment)
    owner = known.experiment_id if known else client.create_experiment(experiment, place)
    run = client.create_run(owner, run_name=run_name)
    now = int(time.time() * 1000)
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(k, v, now, 0) for k, v in metrics.items() if math.isfinite(v)],
        params=[Param(k, str(v)) for k, v in parameters.items()],
        tags=[RunTag(k, v) for k, v in versions().items()],
    )
    for file in artifacts:
        client.log_artifact(run.info.run_id, str(file))
    client.set_terminated(run.info.run_id)
