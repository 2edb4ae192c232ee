"""The served model over the presented cines, shared by all tasks and threads of the server."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discovr_monai.base.types import CineError, DatalistRow, PreparedCine
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.sector import resize_square
from discovr_monai.data.write.labels import full_frame_labels
from discovr_monai.evaluation.heads.segmenter import percent_sure
from discovr_monai.inference.findings import Analyst, Finding
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.inference.reading import CineReader, Seen
from discovr_monai.label.archive.saved import SUFFIX
from discovr_monai.label.archive.studies import Studies
from discovr_monai.label.learn.versions import Versions

TIME_LIMIT = 600.0  # seconds that one inference may take
logger = logging.getLogger(__name__)
_thread = threading.local()  # its "deadline" is when this thread's inference must have ended


def check_time() -> None:
    """Raises TimeoutError once the time of this thread's inference is over."""
    if time.monotonic() > getattr(_thread, "deadline", math.inf):
        raise TimeoutError("the inference took too long: shorten the cine, or use a GPU")


class PresentedCines(LoadCined):
    """Reads presented cines such that the network sees exactly what it sees of their sources.

    The window that was found in the source is cut out of the presented frames again. A cine that
    a client sent has no record, and is read like any file.

    Args:
        studies: the archive and the folder in which it is presented.
        size: side of the network's frames, in pixels.
    """

    def __init__(self, studies: Studies, size: int) -> None:
        super().__init__(root=studies.work, size=size)
        self.studies, self.side = studies, size
        self._records: dict[str, dict[str, Any]] = {}
        self._modified = -1.0  # of the journal, when the records were read

    def record(self, identity: str) -> Mapping[str, Any]:
        """What the journal says of a presented cine; {} for what a client sent."""
        journal = self.studies.journal
        modified = journal.stat().st_mtime if journal.exists() else 0.0
        if modified != self._modified:
            self._records, self._modified = self.studies.records(), modified
        record = self._records.get(identity, {})
        return record if "window" in record else {}

    def load(self, name: str, first: int | None = None, frames: int | None = None) -> PreparedCine:
        """See :meth:`CineLoader.load`."""
        record = self.record(name.removesuffix(SUFFIX))
        if not record:
            return super().load(name, first, frames)
        cine = read_cine(self.root / name, name=name, color="grey")
        _, _, top, left, height, width = window = tuple(record["window"])
        square = resize_square(cine.frames[:, top : top + height, left : left + width], self.side)
        spacing = tuple(record["spacing"]) if record["spacing"] else None
        return PreparedCine(square, record["fps"], "header", window, spacing)


class TimedAnalyst(Analyst):
    """An :class:`Analyst` of one version, which gives up between two batches if time is over."""

    def __init__(
        self, version: int, model: EchoModel, device: torch.device, view: str | None
    ) -> None:
        super().__init__(model, device, view=view)
        self.version = version

    def ready(self, batch: dict[str, Any]) -> Tensor:
        """See :meth:`Analyst.ready`; TimeoutError once the time is over."""
        check_time()
        return super().ready(batch)


@dataclass
class Analysis:
    """What the heads say of one cine.

    Attributes:
        analyst: of the version that spoke.
        finding: see :class:`Finding`.
        labels: (T, H, W) uint8 on the source's own frames, or None where withheld.
    """

    analyst: TimedAnalyst
    finding: Finding
    labels: np.ndarray | None


class CineAnalyst:
    """Answers every call by the version of the model that serves at that moment.

    A training, which runs in a process of its own, may have made a better one since the last call.

    Args:
        versions: of a model with heads (see ``discovr-monai model``).
        studies: the archive and the folder in which it is presented.
        device: for the model.
        view: of the cines whose datalist row names none; None if it is unknown.

    Raises:
        ValueError: the model has no heads.
    """

    def __init__(
        self, versions: Versions, studies: Studies, device: torch.device, view: str | None = None
    ) -> None:
        self.versions, self.device, self.view = versions, device, view
        self._lock = threading.Lock()
        self._newest = versions.current
        self._analyst = self.at(self._newest)
        model = self._analyst.model
        if not model.heads:
            raise ValueError(
                "the model has no heads for EF or contours: make one with discovr-monai "
                "model --head, or take the bundle's models/model.pt"
            )
        self.cines = PresentedCines(studies, model.clip_shape[2])
        clip = model.about["clip"]
        self.reader = CineReader(self.cines, model.clip_shape[1], clip, 3, 0.5, studies.salt)

    def at(self, version: int) -> TimedAnalyst:
        """An analyst that stays with one version.

        Raises:
            CheckpointError, ValueError: there is no such version, or its file has changed.
        """
        model = load_model(self.versions.checked_path(version)).to(self.device)
        return TimedAnalyst(version, model, self.device, self.view)

    @property
    def analyst(self) -> TimedAnalyst:
        """Of the version that serves now."""
        with self._lock:
            newest = self.versions.current
            if newest != self._newest:
                self._newest = newest  # a version that cannot be loaded is tried once only
                try:
                    self._analyst = self.at(newest)
                except (ValueError, OSError, RuntimeError) as error:
                    serving = self._analyst.version
                    logger.error("version %d cannot serve, %d goes on: %s", newest, serving, error)
            return self._analyst

    @property
    def model(self) -> EchoModel:
        """Of the version that serves now."""
        return self.analyst.model

    def ready(self, batch: dict[str, Any]) -> Tensor:
        """See :meth:`Analyst.ready`; all versions take the same input."""
        return self._analyst.ready(batch)

    def facts(self, identity: str) -> dict[str, Any]:
        """What the archive says of a cine: "view", "patient" and "fps", None where unknown."""
        record = self.cines.record(identity)
        facts = {key: record.get(key) for key in ("view", "patient", "fps")}
        return facts | {"view": facts["view"] or self.view}

    def name(self, identity: str) -> str:
        """A cine's file below the studies, which may name a patient; the id of a sent cine."""
        return str(self.cines.record(identity).get("name", identity))

    def read(self, identity: str, view: str | None = None) -> Seen:
        """Reads a cine's windows.

        Args:
            identity: of a presented or sent cine.
            view: what it shows, if the archive's datalist names no view.

        Raises:
            CineError: it cannot be read.
        """
        record = self.cines.record(identity)
        row: DatalistRow = {"image": f"{identity}{SUFFIX}", "id": identity}
        if named := record.get("view") or view:
            row["view"] = named
        if record:
            row["patient"], row["study"] = record["patient"], record["study"]
        read = self.reader(row)
        if "bad" in read:
            kind, problem, remedy = read["bad"]
            raise CineError(identity, problem, remedy, kind)
        seen: Seen = read["seen"]
        return seen

    def __call__(self, identity: str, view: str | None = None) -> Analysis:
        """What the heads say of a cine; arguments as :meth:`read`.

        Raises:
            CineError: it cannot be read.
            TimeoutError: it took too long.
        """
        with self.limited():
            seen, analyst = self.read(identity, view), self.analyst
            finding = analyst([seen])[0]
        labels = finding.labels
        if labels is not None:
            labels = full_frame_labels(labels, seen.window)
        return Analysis(analyst, finding, labels)

    def confidence(self, analysis: Analysis) -> np.ndarray:
        """(T, H, W) uint8 percent on the source's own frames, 0 outside the window."""
        seen = analysis.finding.seen
        with self.limited():
            percent = analysis.analyst.frame_maps(seen, percent_sure)
        return full_frame_labels(percent, seen.window)

    @contextmanager
    def limited(self) -> Iterator[Callable[[], None]]:
        """Limits the time of this thread's inference; a block within another shares its time.

        Yields:
            :func:`check_time`, for what computes without an analyst.
        """
        if hasattr(_thread, "deadline"):
            yield check_time
            return
        _thread.deadline = time.monotonic() + TIME_LIMIT
        try:
            yield check_time
        finally:
            del _thread.deadline
