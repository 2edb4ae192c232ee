"""MONAI Label's inference tasks: a model's contours and EF, and contours that were drawn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from discovr_monai.base.notice import NOTICE
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.masks import read_masks
from discovr_monai.data.write.labels import write_nifti_labels
from discovr_monai.inference.reading import Seen
from discovr_monai.label.archive.saved import FINAL, SUFFIX, identity_of, saved_labels
from discovr_monai.label.learn.propagation import frame_features, lucas_kanade, propagate
from discovr_monai.label.server.analyst import Analysis, CineAnalyst

AS_KNOWN = "as known"  # a request's view: the one that the datalist or the server names
FINDINGS = ("ef", "ef_low", "ef_high", "ef_withheld", "ef_unfamiliarity", "contours_withheld",
            "contours_unfamiliarity", "edv_ml", "esv_ml", "contour_ef", "ed_frame", "es_frame",
            "view", "frames", "fps")  # fmt: skip


class CineTask(InferTask):
    """An inference task that returns labels of every frame.

    All tasks are of the kind "segmentation": to 3D Slicer, the other kinds are points and
    scribbles.

    Args:
        analyst: shared with other tasks.
        config: what a request may set.
    """

    description = ""

    def __init__(self, analyst: CineAnalyst, config: dict[str, Any]) -> None:
        labels = {name: value for value, name in enumerate(analyst.model.structures, 1)}
        super().__init__(InferType.SEGMENTATION, labels, 3, self.description, config)
        self.analyst = analyst

    def is_valid(self) -> bool:
        """Always: without a head for contours, EF and propagation remain."""
        return True


class CineInference(CineTask):
    """Labels of every frame; EF, volumes, ED, ES and areas over time stand in the params.

    Where the heads do not speak (the view is unknown, or the cine is unlike their training), there
    are no labels, and the params say why.
    """

    description = "LV cavity, myocardium, left atrium of every frame; EF and volumes. " + NOTICE

    def __init__(self, analyst: CineAnalyst) -> None:
        views = {view for head in analyst.model.heads.values() for view in head["views"]}
        super().__init__(analyst, {"view": [AS_KNOWN, *sorted(views)]})

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """A temporary NIfTI file with the presented cine's geometry, or None; and the params."""
        image = Path(str(request["image"]))
        view = request.get("view")
        view = view[0] if isinstance(view, list) else view
        view = None if view in (None, "", AS_KNOWN) else str(view)
        with self.analyst.limited():
            analysis = self.analyst(identity_of(image), view)
            volume = self._volume(analysis)
        params = self._params(analysis)
        if volume is None:
            return None, params
        return _temporary_nifti(volume, analysis.finding.seen, image), params

    def _volume(self, analysis: Analysis) -> np.ndarray | None:
        return analysis.labels

    def _params(self, analysis: Analysis) -> dict[str, Any]:
        values, analyst = analysis.finding.values, analysis.analyst
        params: dict[str, Any] = {k: values[k] for k in FINDINGS if k in values}
        params |= {"label_names": self.labels, "notice": NOTICE}
        params |= {"model": analyst.model.sha256, "version": analyst.version}
        if analysis.labels is not None:
            seen = analysis.finding.seen
            areas = area_over_time(analysis.labels, list(self.labels), seen.spacing, seen.fps)
            params["area_over_time"] = areas
        return params


class CineConfidence(CineInference):
    """The probability, in percent, of the label that each pixel has."""

    description = "How sure the contours are: percent for every pixel. " + NOTICE

    def _volume(self, analysis: Analysis) -> np.ndarray | None:
        return None if analysis.labels is None else self.analyst.confidence(analysis)


class CinePropagation(CineTask):
    """Carries the contours of one or two frames to all frames.

    It starts from the label that the client sends, else from the one that was last saved as
    "final". The option "frames" says which frames were drawn ("0, 14", from 0); if it is empty,
    every frame with a label counts as drawn.
    """

    description = "Contours of one or two frames, carried to every frame. " + NOTICE

    def __init__(self, analyst: CineAnalyst) -> None:
        super().__init__(analyst, {"frames": ""})

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """A temporary NIfTI file with the presented cine's geometry, and which frames were drawn.

        Raises:
            ValueError, CineError: nothing is drawn, or the label is not of this cine.
        """
        image = Path(str(request["image"]))
        identity = identity_of(image)
        seen = self.analyst.read(identity)
        frames = read_cine(image, name=identity, color="grey").frames
        labels = self._start(request, image, frames.shape)
        drawn = _drawn_frames(labels, str(request.get("frames") or ""))
        model = self.analyst.model
        with self.analyst.limited() as check_time:

            def flow(target: np.ndarray, source: np.ndarray) -> np.ndarray:
                check_time()
                return lucas_kanade(target, source)

            features = frame_features(model.encoders[model.branch], self.analyst.ready, seen.cine)
            volume = propagate(frames, {t: labels[t] for t in drawn}, features, flow)
        params = {"drawn": drawn, "label_names": self.labels, "notice": NOTICE}
        return _temporary_nifti(volume, seen, image), params

    @staticmethod
    def _start(request: Mapping[str, Any], image: Path, shape: tuple[int, int, int]) -> np.ndarray:
        """(T, H, W) labels that a request sends, or that are saved."""
        if request.get("label"):
            sent = Path(str(request["label"]))
            if sent.parent.resolve() != Path(tempfile.gettempdir()).resolve():  # params can say it
                raise ValueError("the label is no file that was sent with this request: send it")
            return read_masks(sent.parent, sent.name, shape)
        labels = saved_labels(image, FINAL, shape)
        if labels is None:
            raise ValueError("nothing is drawn in this cine: draw a contour, best at end diastole")
        return labels


def area_over_time(
    labels: np.ndarray,
    structures: list[str],
    spacing: tuple[float, float] | None,
    fps: float | None,
) -> dict[str, Any]:
    """Areas of the structures, frame by frame.

    >>> area_over_time(np.ones((2, 3, 3), np.uint8), ["cavity"], (10.0, 10.0), 50.0)
    {'unit': 'cm2', 'seconds': [0.0, 0.02], 'cavity': [9.0, 9.0]}

    Args:
        labels: (T, H, W); the label of the first structure is 1.
        structures: names of labels 1, 2, ...
        spacing: (row, column) mm; None gives areas in pixels.
        fps: frames per second, or None.
    """
    pixel = spacing[0] * spacing[1] / 100 if spacing else 1.0
    areas: dict[str, Any] = {"unit": "cm2" if spacing else "pixels"}
    areas["seconds"] = [round(t / fps, 4) for t in range(len(labels))] if fps else None
    for value, name in enumerate(structures, 1):
        areas[name] = [round(float(n) * pixel, 3) for n in (labels == value).sum((1, 2))]
    return areas


def _drawn_frames(labels: np.ndarray, named: str) -> list[int]:
    """The labelled frames that a request names, or all of them.

    Raises:
        ValueError: for what is no list of labelled frames.
    """
    labelled = np.flatnonzero(labels.any((1, 2))).tolist()
    numbers = named.replace(",", " ").split()
    if not numbers:
        return labelled
    if not all(n.isdigit() for n in numbers) or not {int(n) for n in numbers} <= set(labelled):
        raise ValueError(f"frames {named[:80]!r} must be frames with a label: {labelled[:20]}")
    return sorted({int(n) for n in numbers})


def _temporary_nifti(volume: np.ndarray, seen: Seen, image: Path) -> str:
    """Writes (T, H, W) uint8 with an image's geometry; the caller removes the file."""
    handle, file = tempfile.mkstemp(prefix="infer-", suffix=SUFFIX)
    os.close(handle)
    write_nifti_labels(Path(file), volume, seen.spacing, seen.fps, image, name=identity_of(image))
    return file
