"""What a person sees of a training: banner, progress, warnings, MLflow, pictures."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from mlflow.entities import Metric, RunTag
from monai.handlers import MLFlowHandler
from tqdm import tqdm

from discovr_monai.base.distributed import all_reduce_mean, rank, world_size
from discovr_monai.base.running import end_dead_runs, hold, release, touch
from discovr_monai.base.tracking import (
    TRAININGS,
    artifacts_place,
    make_store,
    save_view,
    store_file,
    versions,
)
from discovr_monai.networks.parallel import is_sharded
from discovr_monai.training.diagnostics import collapse_report
from discovr_monai.training.trainer import DiscovrTrainer


def figures(engine: Engine) -> dict[str, float]:
    """The figures of the trainer's last iteration."""
    output: Any = engine.state.output
    return output[0]


class EpochMeans:
    """Means of the losses over an epoch, into ``state.metrics`` at its end."""

    def attach(self, engine: Engine) -> None:
        """Hooks onto the engine's events."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _reset(self, engine: Engine) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def _add(self, engine: Engine) -> None:
        output = figures(engine)
        for name, value in output.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def _finish(self, engine: Engine) -> None:
        means = {f"epoch_{n}": self.sums[n] / self.counts[n] for n in self.sums}
        engine.state.metrics.update(means)


class ValidationLoss:
    """The objective on held-out cines, with fixed masks and clips, into ``state.metrics``.

    Adds "val_loss" and "val_<term>". Nothing is updated. Without validation cines it does
    nothing.

    Args:
        dataloader: batches of the validation cines, always the same clips, by
            :class:`SharedBatches`.
        interval: epochs between validations; the last epoch always has one.
    """

    def __init__(self, dataloader: Any, interval: int = 1) -> None:
        self.dataloader, self.interval = dataloader, interval

    def attach(self, engine: DiscovrTrainer) -> None:
        """Hooks onto the engine's events."""
        if self.interval and len(self.dataloader.dataset):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._validate)

    @torch.no_grad()
    def _validate(self, engine: DiscovrTrainer) -> None:
        if engine.state.epoch % self.interval and engine.state.epoch != engine.state.max_epochs:
            for name in [m for m in engine.state.metrics if m.startswith("val_")]:
                del engine.state.metrics[name]  # of an earlier epoch
            return
        shared = self.dataloader.batch_sampler.shared
        sums: dict[str, float] = {}
        for number, batch in enumerate(self.dataloader):
            clips = len(batch["image"])
            mine = number < shared  # the others are every rank's
            losses = engine.evaluate_batch(batch, number, rank() * clips if mine else 0)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value * clips * (world_size() if mine else 1)
        total = all_reduce_mean(
            torch.tensor(list(sums.values()), dtype=torch.float64, device=engine.state.device)
        )
        for name, value in zip(sums, total.tolist(), strict=True):
            engine.state.metrics[f"val_{name}"] = value / len(self.dataloader.dataset)


class Progress:
    """Banner at the start, a bar with losses and time left, and what to do next at the end.

    On a terminal the bar is redrawn; elsewhere a line is written now and then.

    Args:
        summary: what is trained on ("225 clips, 0.1 h, 110 patients").
        model: what is trained, in a few words.
        next_steps: lines printed at the end: where things are, what to type next.
        every: seconds between lines where the output is no terminal.
    """

    def __init__(
        self, summary: str, model: str = "", next_steps: str = "", every: float = 20.0
    ) -> None:
        self.summary, self.model, self.next_steps, self.every = summary, model, next_steps, every
        self.bar: tqdm | None = None

    def attach(self, engine: DiscovrTrainer) -> None:
        """Hooks onto the engine's events."""
        if rank():
            return
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.COMPLETED, self._completed)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._exception)

    def _started(self, engine: DiscovrTrainer) -> None:
        print(f"Training on {self.summary}", flush=True)
        total = engine.state.max_epochs * engine.state.epoch_length
        steps = f"{engine.state.max_epochs} epochs of {engine.state.epoch_length} batches"
        print(f"{self.model}; {steps} on {engine.state.device}", flush=True)
        self.bar = tqdm(
            total=total,
            initial=engine.state.iteration,
            desc="training",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else self.every,
            maxinterval=max(10.0, self.every),
            dynamic_ncols=True,
        )

    def _advance(self, engine: DiscovrTrainer) -> None:
        if self.bar is None:
            return
        output = figures(engine)
        shown = {"epoch": f"{engine.state.epoch}/{engine.state.max_epochs}"}
        for name in ("loss", *engine.loss_function.terms):
            shown[name] = f"{output[name]:.3f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _completed(self, engine: DiscovrTrainer) -> None:
        self._close()
        skipped = f" ({engine.skipped} non-finite steps skipped)" if engine.skipped else ""
        print(f"\nDone: {engine.state.iteration} steps{skipped}.\n{self.next_steps}", flush=True)

    def _exception(self, engine: Engine, error: BaseException) -> None:
        self._close()


class CollapseWatch:
    """Reports in words when a teacher stops telling samples apart.

    Args:
        min_information: nats below which a teacher counts as collapsed (see ``diagnose``).
        patience: diagnoses in a row before it is said.
        warm_up: optimiser steps before looking.
    """

    def __init__(
        self, min_information: float = 0.05, patience: int = 3, warm_up: int = 100
    ) -> None:
        self.min_information, self.patience, self.warm_up = min_information, patience, warm_up
        self._in_a_row = 0

    def attach(self, engine: Engine) -> None:
        """Hooks onto the engine's events."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._look)

    def _look(self, engine: Engine) -> None:
        found, step = figures(engine), engine.state.iteration
        if step < self.warm_up or not any(k.endswith("_information") for k in found):
            return
        words = collapse_report(found, step, self.min_information)
        self._in_a_row = self._in_a_row + 1 if words else 0
        if self._in_a_row == self.patience:
            for line in words:
                engine.logger.warning(f"collapse: {line}")


class Tracking(MLFlowHandler):
    """MLflow in a SQLite store: every figure of every iteration, parameters, tags, pictures.

    Args:
        tracking_uri: "sqlite:////.../mlruns.db" or a server's address.
        run_name: unique (see :func:`unique_run_name`).
        parameters: what to record; paths are refused by the caller, none is added here.
        experiment_name: the experiment.
        every: iterations between records.
        pause: seconds between writes; figures wait so long in memory, for a write waits for the
            disk. An epoch's end, the training's and its failure write at once.
        output_dir: the training's folder: a run that was at work in it is over when this begins.
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
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # not how it makes its tables
        store = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri  # as MONAI takes it
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
        self.pause, self.output_dir, self._store = pause, output_dir, store_file(store)
        self._clock = self._written = time.perf_counter()
        self._clips = 0.0
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
        end_dead_runs(self.client, self._store, self.output_dir)
        super().start(engine)
        assert self.cur_run is not None
        if self.cur_run.info.status != "RUNNING":
            self.client.update_run(self.cur_run.info.run_id, "RUNNING")
        hold(self._store, self.cur_run.info.run_id, self.output_dir)

    def log_picture(self, path: Path, folder: str = "pictures") -> None:
        """Adds a file to the run's artifacts."""
        if self.cur_run is not None:
            self.client.log_artifact(self.cur_run.info.run_id, str(path), folder)

    def _tag(self, engine: Engine) -> None:
        assert self.cur_run is not None
        told = {k: str(v) for k, v in self.experiment_param.items() if k in ("preset", "seed")}
        words = {"kind": "training", **told, **versions()}
        tags = [RunTag(name, value) for name, value in words.items()]
        self.client.log_batch(self.cur_run.info.run_id, tags=tags)
        save_view(self.client, self.cur_run.info.experiment_id, TRAININGS)

    def _count(self, engine: Engine) -> None:
        self._clips += figures(engine)["clips"]

    def _log_iteration(self, engine: Engine) -> None:
        now = time.perf_counter()
        rate = self._clips / max(now - self._clock, 1e-9)
        self._clock, self._clips = now, 0.0
        metrics = {k: v for k, v in figures(engine).items() if math.isfinite(v)}
        self._keep({**metrics, "clips_per_second": rate}, step=engine.state.iteration)
        if now - self._written >= self.pause:
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
            touch(self._store, self.cur_run.info.run_id)
        self._written = time.perf_counter()

    def close(self) -> None:
        """Writes what still waits, and ends the run."""
        run = self.cur_run
        try:
            self._write()
        finally:
            super().close()
        if run is not None:
            release(self._store, run.info.run_id)

    def _failed(self, engine: Engine, error: BaseException) -> None:
        if self.cur_run is not None:
            stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
            self.run_finish_status = "KILLED" if stopped else "FAILED"
            self.close()


class Pictures:
    """Draws every few epochs what the network sees, and hands the files to MLflow.

    Args:
        draw: (trainer, epoch) -> files.
        every: epochs between pictures; the last epoch always draws. 0 for never.
        tracking: takes the files too.
    """

    def __init__(
        self,
        draw: Callable[[DiscovrTrainer, int], list[Path]],
        every: int = 5,
        tracking: Tracking | None = None,
    ) -> None:
        self.draw, self.every, self.tracking = draw, every, tracking

    def attach(self, engine: DiscovrTrainer) -> None:
        """Hooks onto the engine's events, on rank 0 only; a sharded network has no pictures."""
        if self.every and not rank():
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: DiscovrTrainer) -> None:
        epoch = engine.state.epoch
        if epoch % self.every and epoch != engine.state.max_epochs:
            return
        if is_sharded(engine.network):  # asked here: handlers are attached before there is one
            return
        try:
            files = self.draw(engine, epoch)
        except OSError as error:  # a full disk must not end a training
            engine.logger.warning(f"could not draw pictures: {error.strerror}")
            return
        for file in files:
            if self.tracking is not None:
                self.tracking.log_picture(file)
