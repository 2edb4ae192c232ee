"""Propagation, choice of cines and training as MONAI Label's tasks: thin, nothing learnt.

The app registers them: :func:`infer_tasks`, :func:`strategies`, :func:`trainers`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from discovr_monai.base.files import write_text
from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import DatalistRow
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.masks import read_masks
from discovr_monai.data.write.labels import write_nifti_labels
from discovr_monai.inference.findings import Analyst
from discovr_monai.inference.model import EchoModel
from discovr_monai.inference.reading import Seen
from discovr_monai.label.archive.saved import FINAL, SUFFIX, identity_of, saved_labels
from discovr_monai.label.learn.acquisition import STRATEGIES, choose, mean_entropy
from discovr_monai.label.learn.finetuning import PARTS, Settings, finetune
from discovr_monai.label.learn.propagation import frame_features, lucas_kanade, propagate
from discovr_monai.label.learn.versions import Versions


class Reads(Protocol):
    """What tasks need of a server's model and cines."""

    @property
    def cines(self) -> LoadCined:
        """By name below its root, as the network sees them."""

    @property
    def model(self) -> EchoModel:
        """The version that serves now."""

    def at(self, version: int) -> Analyst:
        """Of any version."""

    def facts(self, identity: str) -> Mapping[str, Any]:
        """What the archive says of a cine, where known: "view", "patient", "fps"."""

    def name(self, identity: str) -> str:
        """The cine's file below the studies; it may name a patient."""

    def read(self, identity: str, view: str | None = None) -> Seen:
        """A cine's windows; CineError if it cannot be read."""

    def limited(self) -> AbstractContextManager[Callable[[], None]]:
        """A block that may take so long; what it gives raises TimeoutError once that is over."""

    def ready(self, batch: dict[str, Any]) -> torch.Tensor:
        """{"image": (B, C, T, S, S) uint8} as the network takes it."""


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device


# ---- propagation ---------------------------------------------------------------------------


class CinePropagation(InferTask):
    """From the contours of one or two frames to all frames.

    Of the kind "segmentation": for 3D Slicer the other kinds are points and scribbles.

    The label is what the client sends, else what was saved last as final. Config "frames" names
    the drawn ones ("0, 14", from 0); if empty, all frames with a label are taken as drawn.

    Args:
        server: model and cines.
    """

    description = "Contours of one or two frames, carried to every frame. " + NOTICE

    def __init__(self, server: Reads) -> None:
        labels = {name: value for value, name in enumerate(server.model.structures, 1)}
        super().__init__(InferType.SEGMENTATION, labels, 3, self.description, {"frames": ""})
        self.server = server

    def is_valid(self) -> bool:
        """True: the video encoder is all that is needed."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """A temporary NIfTI file with the presented cine's geometry, and which frames were drawn.

        Raises:
            ValueError, CineError: nothing is drawn, or not on this cine.
        """
        image = Path(str(request["image"]))
        identity = identity_of(image)
        seen = self.server.read(identity)
        frames = read_cine(image, name=identity, color="grey").frames
        if request.get("label"):
            sent = Path(str(request["label"]))
            if sent.parent.resolve() != Path(tempfile.gettempdir()).resolve():  # params can say it
                raise ValueError("the label is no file that was sent with this request: send it")
            labels: np.ndarray | None = read_masks(sent.parent, sent.name, frames.shape)
        else:
            labels = saved_labels(image, FINAL, frames.shape)
        if labels is None:
            raise ValueError("nothing is drawn in this cine: draw a contour, best at end diastole")
        at = _drawn(labels, str(request.get("frames") or ""))
        model = self.server.model
        with self.server.limited() as check:

            def flow(target: np.ndarray, source: np.ndarray) -> np.ndarray:
                check()
                return lucas_kanade(target, source)

            features = frame_features(model.encoders[model.branch], self.server.ready, seen.cine)
            found = propagate(frames, {t: labels[t] for t in at}, features, flow)
        handle, file = tempfile.mkstemp(prefix="infer-", suffix=SUFFIX)  # the caller removes it
        os.close(handle)
        write_nifti_labels(Path(file), found, seen.spacing, seen.fps, image, name=identity)
        return file, {"drawn": at, "label_names": self.labels, "notice": NOTICE}


def _drawn(labels: np.ndarray, frames: str) -> list[int]:
    """Which frames count as drawn.

    Raises:
        ValueError: for what is no list of labelled frames.
    """
    there = np.flatnonzero(labels.any((1, 2))).tolist()
    words = frames.replace(",", " ").split()
    if not words:
        return there
    if not all(w.isdigit() for w in words) or not {int(w) for w in words} <= set(there):
        raise ValueError(f"frames {frames[:80]!r} must be frames with a label: {there[:20]}")
    return sorted({int(w) for w in words})


# ---- what to annotate next -----------------------------------------------------------------


class Looks:
    """What the strategies know of each cine: its embedding and how unsure the head is; kept.

    Args:
        server: model and cines.
        seconds: that one call may look at cines it has not seen; the others wait for the next.
    """

    def __init__(self, server: Reads, seconds: float = 60.0) -> None:
        self.server, self.seconds = server, seconds
        self._known: dict[str, tuple[np.ndarray, float]] = {}
        self._model = ""
        self._lock = threading.Lock()

    def __call__(self, identities: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Ids that could be read, their features (M, D) and uncertainty (M,).

        Args:
            identities: of cines, those first that must be known.
        """
        end = time.monotonic() + self.seconds
        with self._lock:
            model = self.server.model.sha256
            if model != self._model:  # another version is unsure elsewhere
                self._known, self._model = {}, model
            for identity in identities:
                if identity not in self._known:
                    self._look(identity)
                    if time.monotonic() > end:
                        break
            kept = [i for i in identities if i in self._known and self._known[i][0].size]
        if not kept:
            return [], np.zeros((0, 1)), np.zeros(0)
        features, unsure = zip(*(self._known[i] for i in kept), strict=True)
        return kept, np.stack(features), np.array(unsure)

    def missing(self, identities: Sequence[str]) -> list[str]:
        """Those that were not looked at yet."""
        return [i for i in identities if i not in self._known]

    @torch.no_grad()
    def _look(self, identity: str) -> None:
        model = self.server.model
        try:
            clips = self.server.read(identity).clips
        except ValueError:
            self._known[identity] = (np.zeros(0), 0.0)  # not to be shown to an annotator either
            return
        ready = self.server.ready({"image": torch.from_numpy(clips)})
        features = model.look(ready)["embedding"].mean(0).cpu().numpy()
        unsure = mean_entropy(model.segmenter(), ready) if "segmentation" in model.heads else 0.0
        self._known[identity] = (features, unsure)


class NextCine(Strategy):
    """The unlabelled cine that a strategy of :func:`choose` names first.

    Args:
        strategy: "coverage", "uncertainty", "both" or "random".
        looks: shared by all strategies.
    """

    def __init__(self, strategy: str, looks: Looks) -> None:
        super().__init__(f"Next cine to annotate, by {strategy}")
        self.strategy, self.looks = strategy, looks

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """{"id": ..., "seen": among how many cines it was chosen, "of": how many there are}.

        None where all is labelled. Until the server has looked at all, it chooses among those it
        has seen: labelled ones first, then in the order of their salted ids.
        """
        labelled = set(datastore.get_labeled_images(FINAL))
        everyone = sorted(datastore.list_images())
        if self.strategy == "random":
            left = [i for i in everyone if i not in labelled]
            chosen = str(np.random.default_rng().choice(left)) if left else ""
            return {"id": chosen, "seen": len(everyone), "of": len(everyone)} if left else None
        order = sorted(everyone, key=lambda i: (i not in labelled, i))
        known, features, unsure = self.looks(order)
        done = [place for place, identity in enumerate(known) if identity in labelled]
        found = choose(self.strategy, features, done, uncertainty=unsure)
        unlabelled = [i for i in everyone if i not in labelled]
        left = [known[found[0]]] if found else self.looks.missing(unlabelled)
        return {"id": left[0], "seen": len(known), "of": len(everyone)} if left else None


# ---- training ------------------------------------------------------------------------------


class Finetuning(TrainTask):
    """A new version from the final labels; MONAI Label runs it in a process of its own.

    Args:
        server: cines.
        versions: of the model that is served.
        tracking_uri: MLflow's store, None for none.
    """

    def __init__(self, server: Reads, versions: Versions, tracking_uri: str | None) -> None:
        super().__init__("Fine-tunes the contours on the labels so far; serves what is better")
        self.server, self.versions, self.tracking_uri = server, versions, tracking_uri

    @property
    def _progress(self) -> Path:
        return self.versions.folder / "training.json"

    def config(self) -> dict[str, Any]:
        """What a client may set."""
        default = Settings()
        return {"part": list(PARTS), "blocks": default.blocks, "epochs": default.epochs,
                "lr": default.lr}  # fmt: skip

    def stats(self) -> dict[str, Any]:
        """The last training's progress, and every version's scores.

        "epoch", "total_epochs" and "best_metric" are what 3D Slicer draws its bars from.
        """
        running = json.loads(self._progress.read_text()) if self._progress.exists() else {}
        process = running.pop("process", None)
        if process is not None and not psutil.pid_exists(process):
            running["state"] = "stopped"
        known = {str(n): self.versions.about(n).get("scores", {}) for n in self.versions.numbers}
        compared = self.versions.folder / "compared.json"
        current = self.versions.current
        told = {"training": running, "current": current, "versions": known}
        told |= {"epoch": running.get("epoch", 0), "total_epochs": running.get("epochs", 1)}
        told["best_metric"] = known[str(current)].get("dice_mean", 0.0)
        if compared.exists():
            told["compared"] = json.loads(compared.read_text())
        return told

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Trains; {"version", "promoted", "reason", "scores"}.

        Raises:
            ValueError, CineError: with what to do; the serving version goes on.
        """
        running = {"state": "running", "epoch": 0, "epochs": 1, "process": os.getpid()}
        self._say(running)
        try:
            settings = _settings(request)
            running["epochs"] = settings.epochs
            rows = [self._row(i) for i in sorted(datastore.get_labeled_images(FINAL))]
            outcome = finetune(
                self.versions,
                self.server.cines,
                rows,
                settings,
                device=device_of(self.server.model),
                tracking_uri=self.tracking_uri,
                after_epoch=lambda epoch, figure: self._say(
                    running
                    | {"epoch": epoch}
                    | ({"validation_loss": figure} if math.isfinite(figure) else {})
                ),
            )
        except BaseException as error:
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            self._say({"state": "failed", "reason": reason})
            raise
        found = {
            "version": outcome.version,
            "promoted": outcome.promoted,
            "reason": outcome.reason,
            "scores": outcome.scores,
        }
        self._say({"state": "done", **found})
        return found

    def _say(self, progress: Mapping[str, Any]) -> None:
        write_text(self._progress, json.dumps(progress))

    def _row(self, identity: str) -> DatalistRow:
        """By the archive's own facts: what clients may change decides nothing."""
        row: dict[str, Any] = {"image": f"{identity}{SUFFIX}", "id": identity}
        row["mask"] = f"labels/{FINAL}/{identity}{SUFFIX}"
        row |= {k: v for k, v in self.server.facts(identity).items() if v}
        return row  # type: ignore[return-value]


def _settings(request: Mapping[str, Any]) -> Settings:
    """The known keys of a request, as numbers and names; nothing else of it is looked at."""
    part = request.get("part") or Settings.part
    part = part[0] if isinstance(part, list) else part
    try:
        return Settings(
            part=str(part),
            blocks=int(request.get("blocks", Settings.blocks)),
            epochs=int(request.get("epochs", Settings.epochs)),
            lr=float(request.get("lr", Settings.lr)),
        )
    except TypeError as error:
        raise ValueError("blocks and epochs are whole numbers, lr is a number") from error


# ---- for the app ---------------------------------------------------------------------------


def infer_tasks(server: Reads) -> dict[str, InferTask]:
    """Inference tasks by name."""
    return {"discovr_propagation": CinePropagation(server)}


def strategies(server: Reads) -> dict[str, Strategy]:
    """Strategies by name."""
    looks = Looks(server)
    return {name: NextCine(name, looks) for name in STRATEGIES}


def trainers(server: Reads, versions: Versions, tracking_uri: str | None) -> dict[str, TrainTask]:
    """Trainings by name, if there is a head to train."""
    if "segmentation" not in server.model.heads:
        return {}
    return {"discovr_segmentation": Finetuning(server, versions, tracking_uri)}
