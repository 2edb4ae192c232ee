"""Every training on labels is a run of MLflow, whether it ends well or not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from types import TracebackType
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


class TrackedTraining:
    """A run that is open while the block lasts; it fails where the block does.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address; None logs nothing.
        parameters: of the training; never a path or a patient's name.
    """

    def __init__(self, tracking_uri: str | None, parameters: Mapping[str, Any]) -> None:
        self.uri, self.parameters = tracking_uri, parameters
        self.epochs = 0  # that were logged
        self._client: Any = None
        self._run = ""

    def __enter__(self) -> TrackedTraining:
        if self.uri is None:
            return self
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow.entities import Param, RunTag

        self._client = client = connect(self.uri)
        known = client.get_experiment_by_name(EXPERIMENT)
        place = artifacts_place(self.uri)
        owner = known.experiment_id if known else client.create_experiment(EXPERIMENT, place)
        self._run = begin_run(client, owner, unique_run_name("labels"))
        client.log_batch(
            self._run,
            params=[Param(k, str(v)) for k, v in self.parameters.items()],
            tags=[RunTag(k, v) for k, v in versions().items()],
        )
        return self

    def log_epoch(self, figures: Mapping[str, float]) -> int:
        """Logs the figures of one more epoch; how many there are now."""
        self.epochs += 1
        self.log(figures)
        return self.epochs

    def log(self, figures: Mapping[str, float]) -> None:
        """Logs figures at the last epoch; those that are not finite are left out."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        finite = {k: v for k, v in figures.items() if math.isfinite(v)}
        metrics = [Metric(k, v, now, self.epochs) for k, v in finite.items()]
        self._client.log_batch(self._run, metrics=metrics)
        touch(store_file(self._client.tracking_uri), self._run)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._client is not None:
            end_run(self._client, self._run, "FINISHED" if kind is None else "FAILED")
