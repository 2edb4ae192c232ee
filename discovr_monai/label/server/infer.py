"""Contours, EF and volumes of a presented cine as MONAI Label's inference tasks."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import discovr_monai.label.server.standins  # noqa: F401  before any module of MONAI Label

# isort: split
import numpy as np
import torch
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from torch import Tensor

from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import CineError, DatalistRow, PreparedCine
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.sector import resize_square
from discovr_monai.data.write.labels import full_frame_labels, write_nifti_labels
from discovr_monai.evaluation.heads.segmenter import percent_sure
from discovr_monai.inference.findings import Analyst, Finding
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.inference.reading import CineReader, Seen
from discovr_monai.label.archive.saved import SUFFIX, identity_of
from discovr_monai.label.archive.studies import Studies
from discovr_monai.label.learn.versions import Versions

AS_KNOWN = "as known"  # the view that the datalist or the server names
logger = logging.getLogger(__name__)
DEADLINE = 600.0  # seconds that one inference may take
FINDINGS = ("ef", "ef_low", "ef_high", "ef_withheld", "ef_unfamiliarity", "contours_withheld",
            "contours_unfamiliarity", "edv_ml", "esv_ml", "contour_ef", "ed_frame", "es_frame",
            "view", "frames", "fps")  # fmt: skip


class PresentedCines(LoadCined):
    """Reads presented cines such that the network sees what it sees of their sources.

    The window that was found in the source is cut out again; what was sent by a client, and has
    no record, is read as any file is.

    Args:
        studies: where they are.
        size: of the network's frames.
    """

    def __init__(self, studies: Studies, size: int) -> None:
        super().__init__(root=studies.work, size=size)
        self.studies, self.side, self._read = studies, size, -1.0
        self._records: dict[str, dict[str, Any]] = {}

    def record(self, identity: str) -> Mapping[str, Any]:
        """What is known of a cine; {} for what a client sent."""
        journal = self.studies.private / "cines.jsonl"
        stamp = journal.stat().st_mtime if journal.exists() else 0.0
        if stamp != self._read:
            self._records, self._read = self.studies.records(), stamp
        found = self._records.get(identity, {})
        return found if "window" in found else {}

    def load(self, name: str, first: int | None = None, frames: int | None = None) -> PreparedCine:
        """See :meth:`CineLoader.load`."""
        record = self.record(name.removesuffix(SUFFIX))
        if not record:
            return super().load(name, first, frames)
        cine = read_cine(self.root / name, name=name, color="grey")
        _, _, top, left, height, width = window = tuple(record["window"])
        cut = resize_square(cine.frames[:, top : top + height, left : left + width], self.side)
        spacing = tuple(record["spacing"]) if record["spacing"] else None
        return PreparedCine(cut, record["fps"], "header", window, spacing)


class TimedAnalyst(Analyst):
    """An :class:`Analyst` that gives up, between two batches, when its time is over.

    Attributes:
        version: of the model.
        ends: ``at`` is when this thread's time is over; see :meth:`CineAnalyst.limited`.
    """

    ends = threading.local()
    version = 0

    @classmethod
    def check(cls) -> None:
        """TimeoutError once the time is over."""
        if time.monotonic() > getattr(cls.ends, "at", float("inf")):
            raise TimeoutError("the inference took too long: shorten the cine, or use a GPU")

    def ready(self, batch: dict[str, Any]) -> Tensor:
        """See :meth:`Analyst.ready`; TimeoutError once the time is over."""
        self.check()
        return super().ready(batch)


@dataclass
class Result:
    """What one inference gives.

    Attributes:
        analyst: of the version that was asked.
        finding: see :class:`Finding`.
        labels: (T, H, W) uint8 on the source's frames, or None where withheld.
        spacing: (row, column) mm, or None.
    """

    analyst: TimedAnalyst
    finding: Finding
    labels: np.ndarray | None
    spacing: tuple[float, float] | None


class CineAnalyst:
    """One model over presented cines, shared by all tasks and threads.

    Each call is answered by the version that serves then: a training, in a process of its own, may
    have made a better one.

    Args:
        versions: of a model with heads; see ``discovr-monai model``.
        studies: where the cines are.
        device: for the model.
        view: of the cines whose datalist row does not say; None: unknown.
        seconds: that one inference may take.
    """

    def __init__(
        self,
        versions: Versions,
        studies: Studies,
        device: torch.device,
        view: str | None = None,
        seconds: float = DEADLINE,
    ) -> None:
        self.versions, self.device, self.view, self.seconds = versions, device, view, seconds
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
        """An analyst of any version; it stays that version's.

        Raises:
            CheckpointError, ValueError: if there is none.
        """
        model = load_model(self.versions.checked_path(version)).to(self.device)
        analyst = TimedAnalyst(model, self.device, view=self.view)
        analyst.version = version
        return analyst

    @property
    def analyst(self) -> TimedAnalyst:
        """Of the version that serves now."""
        with self._lock:
            newest = self.versions.current
            if newest != self._newest:
                self._newest = newest  # looked at once: one that is broken never serves
                try:
                    self._analyst = self.at(newest)
                except (ValueError, OSError, RuntimeError) as error:
                    known = self._analyst.version
                    logger.error("version %d cannot serve, %d goes on: %s", newest, known, error)
            return self._analyst

    @property
    def model(self) -> EchoModel:
        """Of the version that serves now."""
        return self.analyst.model

    def ready(self, batch: dict[str, Any]) -> Tensor:
        """See :meth:`Analyst.ready`; all versions take the same."""
        return self._analyst.ready(batch)

    @property
    def views(self) -> list[str]:
        """That some head was trained on."""
        return sorted({v for head in self.model.heads.values() for v in head["views"]})

    def facts(self, identity: str) -> dict[str, Any]:
        """What the archive says of a cine: "view", "patient", "fps", each None if unknown."""
        record = self.cines.record(identity)
        found = {key: record.get(key) for key in ("view", "patient", "fps")}
        return found | {"view": found["view"] or self.view}

    def name(self, identity: str) -> str:
        """A cine's file below the studies, for private reports; the id of what a client sent."""
        return str(self.cines.record(identity).get("name", identity))

    def read(self, identity: str, view: str | None = None) -> Seen:
        """A cine's windows.

        Args:
            view: if the archive's datalist says none.

        Raises:
            CineError: if it cannot be read.
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

    def __call__(self, identity: str, view: str | None = None) -> Result:
        """What the heads say of a cine.

        Raises:
            ValueError: if it cannot be read; TimeoutError.
        """
        with self.limited():
            seen, analyst = self.read(identity, view), self.analyst
            finding = analyst([seen])[0]
        labels = None
        if finding.labels is not None:
            labels = full_frame_labels(finding.labels, seen.window)
        return Result(analyst, finding, labels, seen.spacing)

    def confidence(self, result: Result) -> np.ndarray:
        """(T, H, W) uint8 percent on the source's frames, 0 outside the window."""
        seen = result.finding.seen
        with self.limited():
            found = result.analyst.frame_maps(seen, percent_sure)
        return full_frame_labels(found, seen.window)

    @contextmanager
    def limited(self) -> Iterator[Callable[[], None]]:
        """The time that this thread's inference has; a block within another shares its time.

        Yields:
            What raises TimeoutError once it is over.
        """
        if hasattr(TimedAnalyst.ends, "at"):
            yield TimedAnalyst.check
            return
        TimedAnalyst.ends.at = time.monotonic() + self.seconds
        try:
            yield TimedAnalyst.check
        finally:
            del TimedAnalyst.ends.at


def area_over_time(
    labels: np.ndarray,
    structures: list[str],
    spacing: tuple[float, float] | None,
    fps: float | None,
) -> dict[str, Any]:
    """Areas of (T, H, W) labels, frame by frame: cm2 where the spacing is known, else pixels."""
    pixel = spacing[0] * spacing[1] / 100 if spacing else 1.0
    out: dict[str, Any] = {"unit": "cm2" if spacing else "pixels"}
    out["seconds"] = [round(t / fps, 4) for t in range(len(labels))] if fps else None
    for value, name in enumerate(structures, 1):
        out[name] = [round(float(n) * pixel, 3) for n in (labels == value).sum((1, 2))]
    return out


class CineInference(InferTask):
    """Label map of every frame, with EF, volumes, ED, ES and areas over time in its params.

    Where the heads do not speak (unknown view, unlike their training), there is no mask, and the
    params say why.

    Args:
        analyst: shared with other tasks.
    """

    description = "LV cavity, myocardium, left atrium of every frame; EF and volumes. " + NOTICE

    def __init__(self, analyst: CineAnalyst) -> None:
        labels = {name: value for value, name in enumerate(analyst.model.structures, 1)}
        config = {"view": [AS_KNOWN, *analyst.views]}
        super().__init__(InferType.SEGMENTATION, labels, 3, self.description, config)
        self.analyst = analyst

    def is_valid(self) -> bool:
        """True: without a head for contours there is still the EF."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """A temporary NIfTI file with the presented cine's geometry, or None; and the params."""
        path = Path(str(request["image"]))
        identity = identity_of(path)
        view = request.get("view")
        view = view[0] if isinstance(view, list) else view
        with self.analyst.limited():
            result = self.analyst(identity, None if view in (None, "", AS_KNOWN) else str(view))
            volume = self._volume(result)
        params = self._params(result)
        if volume is None:
            return None, params
        seen = result.finding.seen
        handle, file = tempfile.mkstemp(prefix="infer-", suffix=SUFFIX)  # the caller removes it
        os.close(handle)
        write_nifti_labels(Path(file), volume, result.spacing, seen.fps, path, name=identity)
        return file, params

    def _volume(self, result: Result) -> np.ndarray | None:
        return result.labels

    def _params(self, result: Result) -> dict[str, Any]:
        values = result.finding.values
        params: dict[str, Any] = {k: values[k] for k in FINDINGS if k in values}
        params |= {"label_names": self.labels, "notice": NOTICE}
        analyst = result.analyst
        params |= {"model": analyst.model.sha256, "version": analyst.version}
        if result.labels is not None:
            fps = result.finding.seen.fps
            params["area_over_time"] = area_over_time(
                result.labels, list(self.labels), result.spacing, fps
            )
        return params


class CineConfidence(CineInference):
    """The probability, in percent, of the label that each pixel has."""

    description = "How sure the contours are: percent for every pixel. " + NOTICE

    def _volume(self, result: Result) -> np.ndarray | None:
        return None if result.labels is None else self.analyst.confidence(result)
