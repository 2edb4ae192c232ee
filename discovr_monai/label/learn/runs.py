"""Every training on labels is a run of MLflow, whether it ends well or not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from discovr_monai.base.running import touch
from discovr_monai.base.tracking import (
    artifacts_place,
    begin_run,
    connect,
    end_run,
    store_file,
    unique_run_name,
    versions,
)

EXPERIMENT = "discovr-annotation"


@contextmanager
def tracked_training(
    tracking_uri: str | None, parameters: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """A run that is open while the block lasts, and fails where the block does.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address; None logs nothing.
        parameters: of the training; never a path or a patient's name.

    Yields:
        A function that logs metrics of an epoch; those that are not finite are left out.
    """
    if tracking_uri is None:
        yield lambda metrics, epoch: None
        return
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow.entities import Metric, Param, RunTag

    client = connect(tracking_uri)
    known = client.get_experiment_by_name(EXPERIMENT)
    place = artifacts_place(tracking_uri)
    owner = known.experiment_id if known else client.create_experiment(EXPERIMENT, place)
    run = begin_run(client, owner, unique_run_name("labels"))

    def log(metrics: Mapping[str, float], epoch: int) -> None:
        now = int(time.time() * 1000)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        entries = [Metric(name, value, now, epoch) for name, value in finite.items()]
        client.log_batch(run, metrics=entries)
        touch(store_file(client.tracking_uri), run)

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
        end_run(client, run, status)
