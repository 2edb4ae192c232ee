"""Checkpoints: atomic, complete, and resumed bit for bit."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from discovr_monai.distributed import gather_objects, rank
from discovr_monai.training.initial import start_from
from discovr_monai.training.trainer import DiscovrTrainer, unwrap
from discovr_monai.weights import (
    FORMAT,
    CheckpointError,
    describe_encoders,
    load_strict,
    read_checkpoint,
    save_atomic,
)


def random_states() -> dict[str, Any]:
    """This process's generators, as tensors and lists (nothing that needs unpickling)."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Undoes :func:`random_states`."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class Checkpoints:
    """Ignite handler: saves last.pt and best.pt, resumes, and saves on Ctrl-C.

    Args:
        output_dir: files are written straight into it.
        save_every: iterations between saves inside an epoch, 0 for epochs' ends only.
        monitor: (engine) -> a number; the lowest at an epoch's end makes best.pt. None: none.
        resume: "auto" continues last.pt if there is one, "never" starts anew, a path continues
            that file.
        init: a converted or own file whose weights a training begins with; what there is to
            resume wins.
        hint: the command that continues an interrupted training, for the message.
        clip: how clips are sampled and normalised; kept in the checkpoint beside the encoders'
            shapes, so that evaluation needs nothing but the file.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        save_every: int = 0,
        monitor: Callable[[Engine], float] | None = None,
        resume: str = "auto",
        init: str | Path | None = None,
        hint: str = "",
        clip: Mapping[str, Any] | None = None,
    ) -> None:
        self.clip, self.init = dict(clip or {}), init
        self.source: dict[str, Any] | None = None  # of the weights that training began with
        self.directory = Path(output_dir)
        self.save_every, self.monitor, self.resume, self.hint = save_every, monitor, resume, hint
        self.best = float("inf")
        self._signalled = 0

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.directory / "last.pt"

    def attach(self, engine: DiscovrTrainer) -> None:
        """Loads what ``resume`` or ``init`` ask for, then hooks onto the engine's events."""
        self._resume(engine)
        if self.init is not None and not engine.state.iteration:
            self._begin(engine)
        engine.add_event_handler(Events.STARTED, self._catch_signals)
        if self.save_every:
            engine.add_event_handler(
                Events.ITERATION_COMPLETED(every=self.save_every), self._save_last
            )
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_if_signalled)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._release_signals)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._exception)

    def state(self, trainer: DiscovrTrainer) -> dict[str, Any]:
        """Everything that the next step depends on."""
        network = unwrap(trainer.network)
        about = describe_encoders(network, self.clip)
        return {
            "format": FORMAT,
            "about": about if self.source is None else about | {"source": self.source},
            "network": network.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "iteration": trainer.state.iteration,
            "epoch_length": trainer.state.epoch_length,
            "skipped": trainer.skipped,
            "skipped_in_a_row": trainer.skipped_in_a_row,
            "best": self.best,
            "random": gather_objects(random_states()),
        }

    def save(self, trainer: DiscovrTrainer, path: Path) -> None:
        """Writes a checkpoint on rank 0; a full disk is reported and training goes on."""
        state = self.state(trainer)  # collective: every rank takes part
        if rank():
            return
        try:
            save_atomic(lambda temporary: torch.save(state, temporary), path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as either
            kept = "the previous one is intact" if path.exists() else "there is none yet"
            trainer.logger.error(
                f"could not save {path.name} ({_first_line(error)}); {kept}. "
                "Free space in the output folder: training goes on and tries again"
            )

    def load(self, trainer: DiscovrTrainer, path: str | Path) -> None:
        """Restores a trainer.

        Raises:
            CheckpointError: if the file does not fit this training.
        """
        state = read_checkpoint(path)
        name = Path(path).name
        try:
            load_strict(unwrap(trainer.network), state["network"], name)
            trainer.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if state["epoch_length"] != trainer.state.epoch_length:
            raise CheckpointError(
                f"{name} comes from epochs of {state['epoch_length']} batches, this training has "
                f"{trainer.state.epoch_length}: keep the data, batch_size and number of ranks, or "
                "start anew with --resume never"
            )
        trainer.state.iteration = state["iteration"]
        trainer.state.epoch = state["iteration"] // state["epoch_length"]
        trainer.skipped, trainer.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.best = state["best"]
        self.source = (state.get("about") or {}).get("source")
        if len(state["random"]) > rank():
            set_random_states(state["random"][rank()])

    def _resume(self, trainer: DiscovrTrainer) -> None:
        if self.resume == "never":
            return
        if self.resume != "auto":
            self.load(trainer, self.resume)
        elif self.last.exists():
            self.load(trainer, self.last)
        if trainer.state.iteration and not rank():
            print(f"Resuming from iteration {trainer.state.iteration} (--resume never starts anew)")

    def _begin(self, trainer: DiscovrTrainer) -> None:
        assert self.init is not None
        about, words = start_from(unwrap(trainer.network), self.init)
        self.source = about.get("source")
        if rank():
            return
        print(words)
        for key in ("mean", "std"):
            theirs, ours = about["clip"].get(key), self.clip.get(key)
            if theirs and ours and list(theirs) != list(ours):
                print(f"Its clips had {key} {theirs}, these have {ours}: set {key} to its own")
        if self.source and self.source.get("licence"):
            print(f"Licence of these weights: {self.source['licence']}")

    def _save_last(self, trainer: DiscovrTrainer) -> None:
        self.save(trainer, self.last)

    def _epoch_completed(self, trainer: DiscovrTrainer) -> None:
        value = self.monitor(trainer) if self.monitor is not None else None
        if value is not None and value < self.best:
            self.best = value
            self.save(trainer, self.directory / "best.pt")
        self.save(trainer, self.last)

    def _catch_signals(self, trainer: DiscovrTrainer) -> None:
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
                self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled += 1
        if self._signalled > 1:
            raise KeyboardInterrupt
        print("\nStopping after this step (once more: at once) ...", flush=True)

    def _release_signals(self, _: Engine) -> None:
        for number, handler in getattr(self, "_previous", {}).items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop_if_signalled(self, trainer: DiscovrTrainer) -> None:
        if not self._signalled:
            return
        self.save(trainer, self.last)
        self._release_signals(trainer)
        if not rank():
            print(f"Saved at iteration {trainer.state.iteration}. To go on: {self.hint}")
        raise SystemExit(130)

    def _exception(self, trainer: DiscovrTrainer, error: BaseException) -> None:
        self._release_signals(trainer)


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__
