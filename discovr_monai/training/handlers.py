"""What a person sees of a training: means, validation, progress, warnings and pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

from discovr_monai.base.distributed import all_reduce_mean, rank, world_size
from discovr_monai.networks.parallel import is_sharded
from discovr_monai.training.diagnostics import collapse_report
from discovr_monai.training.mlflow_handler import Tracking, step_metrics
from discovr_monai.training.trainer import DiscovrTrainer


class EpochMeans:
    """Puts each figure's mean over an epoch into ``state.metrics`` as "epoch_<name>".

    A figure that is not finite in a step does not count in that step.
    """

    def attach(self, engine: Engine) -> None:
        """Hooks onto the engine's events."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _reset(self, engine: Engine) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def _add(self, engine: Engine) -> None:
        for name, value in step_metrics(engine).items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def _finish(self, engine: Engine) -> None:
        means = {f"epoch_{n}": self.sums[n] / self.counts[n] for n in self.sums}
        engine.state.metrics.update(means)


class ValidationLoss:
    """Computes the objective on held-out cines, always with the same masks and clips.

    The means over all validation cines go into ``state.metrics`` as "val_loss" and "val_<term>".
    No parameter changes. Without validation cines this does nothing.

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
            is_share = number < shared  # later batches are the same on every rank
            losses = engine.evaluate_batch(batch, number, rank() * clips if is_share else 0)
            weight = clips * (world_size() if is_share else 1)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value * weight
        total = all_reduce_mean(
            torch.tensor(list(sums.values()), dtype=torch.float64, device=engine.state.device)
        )
        for name, value in zip(sums, total.tolist(), strict=True):
            engine.state.metrics[f"val_{name}"] = value / len(self.dataloader.dataset)


class Progress:
    """Prints what is trained, then a bar with losses and time left, then what to do next.

    On a terminal the bar is redrawn; elsewhere a line is written every few seconds.

    Args:
        summary: what is trained on ("225 clips, 0.1 h, 110 patients").
        model: short description of what is trained.
        next_steps: lines printed at the end: where the outputs are, which command comes next.
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
        metrics = step_metrics(engine)
        shown = {"epoch": f"{engine.state.epoch}/{engine.state.max_epochs}"}
        for name in ("loss", *engine.loss_function.terms):
            shown[name] = f"{metrics[name]:.3f}"
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
    """Warns when a teacher no longer tells samples apart.

    Args:
        min_information: a teacher below so many nats counts as collapsed (see ``diagnose``).
        patience: collapsed diagnoses in a row before the warning, which is given once.
        warm_up: optimiser steps that are not looked at.
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
        metrics, step = step_metrics(engine), engine.state.iteration
        if step < self.warm_up or not any(name.endswith("_information") for name in metrics):
            return
        report = collapse_report(metrics, step, self.min_information)
        self._in_a_row = self._in_a_row + 1 if report else 0
        if self._in_a_row == self.patience:
            for line in report:
                engine.logger.warning(f"collapse: {line}")


class Pictures:
    """Draws what the network sees, every few epochs, and adds the files to MLflow's run.

    Args:
        draw: (trainer, epoch) -> files.
        every: epochs between pictures; the last epoch always draws. 0 for never.
        tracking: MLflow's handler; None keeps the files in their folder only.
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
