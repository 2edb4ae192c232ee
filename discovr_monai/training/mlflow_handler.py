"""MLflow as a handler of the trainer: its figures, settings and pictures in one run."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from mlflow.entities import Metric, RunTag
from monai.handlers import MLFlowHandler

from discovr_monai.base.distributed import rank
from discovr_monai.base.tracking import (
    TRAININGS,
    artifacts_place,
    end_killed_runs,
    folder_tag,
    make_store,
    save_view,
    versions,
)


def step_metrics(engine: Engine) -> dict[str, float]:
    """The figures of the trainer's last iteration."""
    output: Any = engine.state.output
    return output[0]


class Tracking(MLFlowHandler):
    """Logs every figure of every iteration and epoch, the settings, versions and pictures.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address.
        run_name: unique (see :func:`unique_run_name`).
        parameters: settings to record. None may be a path.
        experiment_name: the experiment.
        every: iterations between records.
        pause: seconds between writes. A write waits for the disk, so figures are gathered in
            memory; they are written at once when an epoch or the training ends, or fails.
        output_dir: the training's folder. A run of this folder that was killed is marked as such
            when this one starts.
    """

    LARGEST = 1000  # figures that MLflow takes in one write

    def __init__(
        self,
        tracking_uri: str,
        run_name: str,
        parameters: Mapping[str, Any] | None = None,
        experiment_name: str = "discovr",
        every: int = 1,
        pause: float = 5.0,
        output_dir: str | Path | None = None,
    ) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # not each table that it makes
        store = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri  # MONAI's handler does so
        make_store(store)
        super().__init__(
            tracking_uri=tracking_uri,
            experiment_name=experiment_name,
            run_name=run_name,
            experiment_param=dict(parameters or {}),
            iteration_log=lambda engine, event: event % every == 0,
            epoch_log=True,
            iteration_logger=self._log_iteration,
            close_on_complete=True,
            artifact_location=artifacts_place(store),
        )
        self.pause, self.output_dir = pause, output_dir
        self._last_record = self._last_write = time.perf_counter()
        self._clips = 0.0  # since the last record
        self._waiting: list[Metric] = []

    def attach(self, engine: Engine) -> None:
        """Hooks onto the engine's events, on rank 0 only."""
        if rank():
            return
        super().attach(engine)
        engine.add_event_handler(Events.STARTED, self._tag)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._failed)

    def start(self, engine: Engine) -> None:
        """Begins a run, or goes on with one of this name that did not finish."""
        self._set_experiment()
        assert self.experiment is not None
        end_killed_runs(self.client, self.experiment.experiment_id, self.output_dir)
        super().start(engine)
        assert self.cur_run is not None
        run = self.cur_run.info
        if run.status != "RUNNING":
            self.client.update_run(run.run_id, "RUNNING")
        for name, value in folder_tag(self.output_dir).items():
            self.client.set_tag(run.run_id, name, value)

    def log_picture(self, path: Path, folder: str = "pictures") -> None:
        """Adds a file to the run's artifacts."""
        if self.cur_run is not None:
            self.client.log_artifact(self.cur_run.info.run_id, str(path), folder)

    def _tag(self, engine: Engine) -> None:
        assert self.cur_run is not None
        parameters = self.experiment_param
        tags = {name: str(parameters[name]) for name in ("preset", "seed") if name in parameters}
        tags |= {"kind": "training", **versions()}
        entries = [RunTag(name, value) for name, value in tags.items()]
        self.client.log_batch(self.cur_run.info.run_id, tags=entries)
        save_view(self.client, self.cur_run.info.experiment_id, TRAININGS)

    def _count(self, engine: Engine) -> None:
        self._clips += step_metrics(engine)["clips"]

    def _log_iteration(self, engine: Engine) -> None:
        now = time.perf_counter()
        rate = self._clips / max(now - self._last_record, 1e-9)
        self._last_record, self._clips = now, 0.0
        finite = {k: v for k, v in step_metrics(engine).items() if math.isfinite(v)}
        self._keep({**finite, "clips_per_second": rate}, step=engine.state.iteration)
        if now - self._last_write >= self.pause:
            self._write()

    def _default_epoch_log(self, engine: Engine) -> None:
        self._keep(engine.state.metrics, step=engine.state.epoch)
        self._write()

    def _keep(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in metrics.items()]

    def _write(self) -> None:
        while self.cur_run is not None and self._waiting:
            self.client.log_batch(self.cur_run.info.run_id, metrics=self._waiting[: self.LARGEST])
            del self._waiting[: self.LARGEST]
        self._last_write = time.perf_counter()

    def close(self) -> None:
        """Writes the figures that still wait, and ends the run."""
        try:
            self._write()
        finally:
            super().close()

    def _failed(self, engine: Engine, error: BaseException) -> None:
        if self.cur_run is not None:
            stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
            self.run_finish_status = "KILLED" if stopped else "FAILED"
            self.close()
