"""MONAI Label's training task: a new version of the model from the labels so far."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import psutil
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from discovr_monai.base.files import write_text
from discovr_monai.base.types import DatalistRow
from discovr_monai.label.archive.saved import FINAL, SUFFIX
from discovr_monai.label.learn.finetuning import PARTS, FinetuningSettings, finetune
from discovr_monai.label.learn.versions import Versions
from discovr_monai.label.server.analyst import CineAnalyst


class Finetuning(TrainTask):
    """Makes a version from the final labels; MONAI Label runs it in a process of its own.

    What it is doing stands in FOLDER/training.json, which the server's process reads.

    Args:
        analyst: model and cines.
        versions: of the model that is served.
        tracking_uri: MLflow's store, None for none.
    """

    def __init__(self, analyst: CineAnalyst, versions: Versions, tracking_uri: str | None) -> None:
        super().__init__("Fine-tunes the contours on the labels so far; serves what is better")
        self.analyst, self.versions, self.tracking_uri = analyst, versions, tracking_uri
        self._progress = versions.folder / "training.json"

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults."""
        default = FinetuningSettings()
        return {"part": list(PARTS), "blocks": default.blocks, "epochs": default.epochs,
                "lr": default.lr}  # fmt: skip

    def stats(self) -> dict[str, Any]:
        """The last training's progress, every version's scores, and which version serves.

        3D Slicer draws its bars from "epoch", "total_epochs" and "best_metric".
        """
        training = json.loads(self._progress.read_text()) if self._progress.exists() else {}
        process = training.pop("process", None)
        if process is not None and not psutil.pid_exists(process):
            training["state"] = "stopped"
        current = self.versions.current
        scores = {str(n): self.versions.about(n).get("scores", {}) for n in self.versions.numbers}
        stats = {
            "training": training,
            "current": current,
            "versions": scores,
            "epoch": training.get("epoch", 0),
            "total_epochs": training.get("epochs", 1),
            "best_metric": scores[str(current)].get("dice_mean", 0.0),
        }
        compared = self.versions.folder / "compared.json"  # of the scoring of two versions
        if compared.exists():
            stats["compared"] = json.loads(compared.read_text())
        return stats

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Trains; {"version", "promoted", "reason", "scores"}.

        Raises:
            ValueError, CineError: with what to do; the serving version goes on.
        """
        progress = {"state": "running", "epoch": 0, "epochs": 1, "process": os.getpid()}
        self._say(progress)

        def after_epoch(epoch: int, loss: float) -> None:
            finite = {"validation_loss": loss} if math.isfinite(loss) else {}
            self._say(progress | {"epoch": epoch} | finite)

        try:
            settings = _settings(request)
            progress["epochs"] = settings.epochs
            outcome = finetune(
                self.versions,
                self.analyst.cines,
                [self._row(i) for i in sorted(datastore.get_labeled_images(FINAL))],
                settings,
                device=next(self.analyst.model.parameters()).device,
                tracking_uri=self.tracking_uri,
                after_epoch=after_epoch,
            )
        except BaseException as error:
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            self._say({"state": "failed", "reason": reason})
            raise
        result = {k: v for k, v in asdict(outcome).items() if k != "serving"}
        self._say({"state": "done", **result})
        return result

    def _say(self, progress: Mapping[str, Any]) -> None:
        write_text(self._progress, json.dumps(progress))

    def _row(self, identity: str) -> DatalistRow:
        """A labelled cine by the archive's own facts: clients cannot change who is held out."""
        row: dict[str, Any] = {"image": f"{identity}{SUFFIX}", "id": identity}
        row["mask"] = f"labels/{FINAL}/{identity}{SUFFIX}"
        row |= {k: v for k, v in self.analyst.facts(identity).items() if v}
        return row  # type: ignore[return-value]


def _settings(request: Mapping[str, Any]) -> FinetuningSettings:
    """The known keys of a request; nothing else of it is looked at."""
    default = FinetuningSettings()
    part = request.get("part") or default.part
    try:
        return FinetuningSettings(
            part=str(part[0] if isinstance(part, list) else part),
            blocks=int(request.get("blocks", default.blocks)),
            epochs=int(request.get("epochs", default.epochs)),
            lr=float(request.get("lr", default.lr)),
        )
    except TypeError as error:
        raise ValueError("blocks and epochs are whole numbers, lr is a number") from error
