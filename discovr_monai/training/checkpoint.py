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
from torch import Tensor

from discovr_monai.base.distributed import all_reduce_max, gather_objects, is_distributed, rank
from discovr_monai.base.files import save_atomic
from discovr_monai.networks.parallel import is_sharded
from discovr_monai.training.initial import start_from
from discovr_monai.training.trainer import DiscovrTrainer
from discovr_monai.weights.checkpoint_folder import (
    find_sharded,
    read_into,
    read_state,
    shapes,
    write_sharded,
)
from discovr_monai.weights.files import (
    FORMAT,
    CheckpointError,
    describe_encoders,
    differences,
    load_strict,
    read_checkpoint,
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


def sharded_tensors(trainer: DiscovrTrainer) -> dict[str, Tensor]:
    """This rank's parts of the network and of the optimiser's state, by name."""
    network = trainer.network
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.state_dict(keep_vars=True).items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def load_sharded_tensors(trainer: DiscovrTrainer, folder: Path) -> None:
    """Fills the network and the optimiser's state, however many ranks wrote the folder.

    Raises:
        ValueError: if names or shapes differ, with the first of each.
    """
    network = trainer.network
    saved = shapes(folder)
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    of_network = {name: t for name, t in saved.items() if name.startswith("network.")}
    if wrong := differences(tensors, of_network):
        raise ValueError(
            f"checkpoint {folder.name} does not fit the network: {wrong}. "
            "Use the config that it was trained with"
        )
    for name, parameter in network.state_dict(keep_vars=True).items():
        if not parameter.requires_grad:
            continue
        for full, like in saved.items():
            prefix, _, key = full.rpartition(".")
            if prefix == f"optimizer.{name}":
                whole = like.shape == parameter.shape
                state = torch.zeros_like(parameter) if whole else parameter.new_zeros(like.shape)
                trainer.optimizer.state[parameter][key] = tensors[full] = state.detach()
    read_into(folder, tensors)


class Checkpoints:
    """Ignite handler: saves last.pt and best.pt, resumes, and saves on Ctrl-C.

    Args:
        output_dir: files are written straight into it.
        save_every: iterations between checkpoints (with accumulation, at the next optimiser
            step); 0 for one at each epoch's end. The training's end always makes one.
        monitor: (engine) -> a number; the lowest at an epoch's end makes best.pt. None: none.
        resume: "auto" continues last.pt if there is one, "never" starts anew, a path continues
            that file.
        init: a converted or own file whose weights a training begins with, unless there is
            something to resume.
        hint: the command that continues an interrupted training, for the message.
        clip: how clips are sampled and normalised; kept in the checkpoint beside the encoders'
            shapes, so that evaluation needs nothing but the file.
        training: preset, seed, ...; kept there too, for those who compare checkpoints.
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
        training: Mapping[str, Any] | None = None,
    ) -> None:
        self.clip, self.init, self.training = dict(clip or {}), init, dict(training or {})
        self.source: dict[str, Any] | None = None  # of the weights that training began with
        self.directory = Path(output_dir)
        self.save_every, self.monitor, self.resume, self.hint = save_every, monitor, resume, hint
        self.best = float("inf")
        self._signalled = 0
        self._due = False

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
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._save_now_and_then)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_if_signalled)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._release_signals)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._exception)

    def state(self, trainer: DiscovrTrainer) -> dict[str, Any]:
        """Everything that the next step depends on, beside the tensors and generators."""
        about = describe_encoders(trainer.network, self.clip)
        about |= {"training": self.training} if self.training else {}
        about |= {} if self.source is None else {"source": self.source}
        return {
            "format": FORMAT,
            "about": about,
            **trainer.position(),
            "skipped": trainer.skipped,
            "skipped_in_a_row": trainer.skipped_in_a_row,
            "best": self.best,
        }

    def save(self, trainer: DiscovrTrainer, path: Path) -> None:
        """Writes a checkpoint; a full disk is reported and training goes on. Collective.

        A whole network goes into the file ``path`` on rank 0, a sharded one into a folder of its
        name, by all ranks.
        """
        self._due = False
        try:
            if is_sharded(trainer.network):
                path = path.with_suffix("")
                write_sharded(path, sharded_tensors(trainer), self.state(trainer))
                return
            random_of_ranks = gather_objects(random_states())
            if rank():
                return
            state = self.state(trainer) | {
                "network": trainer.network.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "random": random_of_ranks,
            }
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
            CheckpointError: if the file, or the folder of a sharded training, does not fit.
        """
        path = Path(path)
        try:
            if is_sharded(trainer.network):
                state = read_state(path)
                load_sharded_tensors(trainer, path)
            else:
                state = read_checkpoint(path)
                load_strict(trainer.network, state["network"], path.name)
                trainer.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        try:
            trainer.go_on(state)
        except ValueError as error:
            raise CheckpointError(
                f"{path.name} is of another training: {error}. Keep the data, or start anew with "
                "--resume never"
            ) from error
        trainer.skipped, trainer.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.best = state["best"]
        self.source = (state.get("about") or {}).get("source")
        for states in state.get("random", [])[rank() : rank() + 1]:
            set_random_states(states)

    def _resume(self, trainer: DiscovrTrainer) -> None:
        if self.resume == "never":
            return
        path = self.last if self.resume == "auto" else Path(self.resume)
        file, folder = path if path.is_file() else None, find_sharded(path.with_suffix(""))
        mine, other = (folder, file) if is_sharded(trainer.network) else (file, folder)
        if mine is None and other is not None:
            raise CheckpointError(
                f"{other.name} is of a training with strategy {'fsdp' if folder else 'ddp'}: go on "
                f"with that one, or begin from its weights: --resume never --init {other.name}"
            )
        if mine is not None or self.resume != "auto":
            self.load(trainer, mine or path)
        if trainer.state.iteration and not rank():
            epoch, batch = divmod(trainer.state.iteration, trainer.state.epoch_length)
            print(f"Resuming after {epoch} epochs and {batch} batches (--resume never starts anew)")

    def _begin(self, trainer: DiscovrTrainer) -> None:
        assert self.init is not None
        about, report = start_from(trainer.network, self.init)
        self.source = about.get("source")
        if rank():
            return
        print(report)
        for key in ("mean", "std"):
            theirs, ours = about["clip"].get(key), self.clip.get(key)
            if theirs and ours and list(theirs) != list(ours):
                print(f"Its clips had {key} {theirs}, these have {ours}: set {key} to its own")
        if self.source and self.source.get("licence"):
            print(f"Licence of these weights: {self.source['licence']}")

    def _save_now_and_then(self, trainer: DiscovrTrainer) -> None:
        self._due = self._due or trainer.state.iteration % self.save_every == 0
        if self._due and trainer.between_steps:
            self.save(trainer, self.last)
            # once more at its end, with what the epoch's end brings
            self._due = trainer.state.iteration % trainer.state.epoch_length == 0

    def _epoch_completed(self, trainer: DiscovrTrainer) -> None:
        due = self._due or not self.save_every or trainer.state.epoch == trainer.state.max_epochs
        value = self.monitor(trainer) if self.monitor is not None else None
        if value is not None and value < self.best:
            self.best = value
            self.save(trainer, self.directory / "best.pt")
        if due:
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
        if not trainer.between_steps:
            return
        stop = self._signalled > 0
        if is_distributed():  # ranks hear of it at different steps, and stop together
            asked = torch.tensor(float(stop), device=trainer.state.device)
            stop = bool(all_reduce_max(asked))
        if not stop:
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
