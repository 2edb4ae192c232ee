"""Every training on labels is a run of MLflow, whether it ends well or not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from discovr_monai.base.tracking import (
    connect,
    end_killed_runs,
    folder_tag,
    open_experiment,
    unique_run_name,
    versions,
)

EXPERIMENT = "discovr-annotation"


@contextmanager
def tracked_training(
    tracking_uri: str | None, parameters: Mapping[str, Any], output_dir: str | Path
) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """A run that is open while the block lasts, and fails where the block does.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address; None logs nothing.
        parameters: of the training; never a path or a patient's name.
        output_dir: where new versions go; a training there that was killed is marked as such.

    Yields:
        A function that logs metrics of an epoch; those that are not finite are left out.
    """
    if tracking_uri is None:
        yield lambda metrics, epoch: None
        return
    from mlflow.entities import Metric, Param, RunTag

    client = connect(tracking_uri)
    experiment = open_experiment(client, EXPERIMENT)
    end_killed_runs(client, experiment, output_dir)
    name, tags = unique_run_name("labels"), folder_tag(output_dir)
    run = client.create_run(experiment, run_name=name, tags=tags).info.run_id

    def log(metrics: Mapping[str, float], epoch: int) -> None:
        now = int(time.time() * 1000)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        entries = [Metric(name, value, now, epoch) for name, value in finite.items()]
        client.log_batch(run, metrics=entries)

    status = "FAILED"
    try:
        client.log_batch(
            run,
            params=[Param(k, str(v)) for k, v in parameters.items()],
            tags=[RunTag(k, v) for k, v in versions().items()],
        )
        yield log
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)
