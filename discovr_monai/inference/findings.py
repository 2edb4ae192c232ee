"""The findings of a cine: always its embedding, EF and contours only where a head is fit to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor

from discovr_monai.data.clips.normalise import PrepareClip
from discovr_monai.evaluation.heads.contours import (
    ejection_fraction,
    largest_component,
    simpson_volume,
)
from discovr_monai.evaluation.heads.segmenter import clip_stride, cover, label_frames, most_likely
from discovr_monai.inference.model import EchoModel
from discovr_monai.inference.reading import Seen

EMPTY = 0.05  # contours are withheld if a larger share of the frames has no cavity


@dataclass
class Finding:
    """What inference says of one cine.

    Attributes:
        seen: the cine.
        values: the columns of its row in the table, except for the embedding.
        embedding: (D,) float32.
        labels: (T, s, s) uint8 labels of the cine's square window; None where they are withheld.
    """

    seen: Seen
    values: dict[str, Any]
    embedding: np.ndarray
    labels: np.ndarray | None = None


class Analyst:
    """Runs the model over cines.

    Args:
        model: the encoders and heads with their weights, on ``device``.
        device: where the model computes.
        batch_size: windows that go through the encoders at once.
        view: the view of cines whose datalist row names none; None means unknown.
        contours: whether to segment every frame, if the model has a head for it.
        bf16: whether the encoders compute in bf16.
        inferer: MONAI's inferer around the model; None calls the model directly.
    """

    def __init__(
        self,
        model: EchoModel,
        device: torch.device,
        *,
        batch_size: int = 16,
        view: str | None = None,
        contours: bool = True,
        bf16: bool = False,
        inferer: Inferer | None = None,
    ) -> None:
        self.model, self.device, self.batch_size, self.view = model, device, batch_size, view
        self.prepare = PrepareClip(model.about["clip"]["mean"], model.about["clip"]["std"])
        self.bf16, self.inferer = bf16, inferer or SimpleInferer()
        self.segmenter = model.segmenter() if contours and "segmentation" in model.heads else None

    def __call__(self, cines: Sequence[Seen]) -> list[Finding]:
        """The findings of some cines, whose windows go through the encoders together."""
        means = self._averages(cines)
        return [
            self._finding(seen, {k: v[i] for k, v in means.items()}) for i, seen in enumerate(cines)
        ]

    @torch.no_grad()
    def _averages(self, cines: Sequence[Seen]) -> dict[str, Tensor]:
        """The mean over each cine's windows of every output of :meth:`EchoModel.look`."""
        clips = np.concatenate([c.clips for c in cines])
        owner = np.repeat(np.arange(len(cines)), [len(c.clips) for c in cines])
        chunks: dict[str, list[Tensor]] = {}
        for first in range(0, len(clips), self.batch_size):
            chunk = torch.from_numpy(clips[first : first + self.batch_size])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                looks = self.inferer(self.ready({"image": chunk}), self.model.look)
            for key, value in looks.items():
                chunks.setdefault(key, []).append(value.float().cpu())
        index = torch.from_numpy(owner)
        count = torch.bincount(index, minlength=len(cines))[:, None]
        out = {}
        for key, outputs in chunks.items():
            values = torch.cat(outputs)
            total = torch.zeros(len(cines), values.shape[1]).index_add_(0, index, values)
            out[key] = total / count
        return out

    def ready(self, batch: dict[str, Any]) -> Tensor:
        """Normalises a batch of windows, {"image": (B, C, T, S, S) uint8}, for the network."""
        return self.prepare(batch, self.device)

    def _finding(self, seen: Seen, looks: dict[str, Tensor]) -> Finding:
        row = seen.row
        view = str(row.get("view") or self.view or "") or None
        values: dict[str, Any] = {
            "id": row["id"],
            "patient": seen.patient,
            "study": seen.study,
            "view": view,
            "frames": int(seen.cine.shape[1]),
            "fps": seen.fps,
            "windows": len(seen.clips),
        }
        labels = None
        if "ef" in self.model.heads:
            values |= self._ef(view, looks)
        if self.segmenter is not None:
            reason, unfamiliarity = self._withheld("segmentation", view, looks)
            values |= {"contours_withheld": reason, "contours_unfamiliarity": unfamiliarity}
            values |= dict.fromkeys(("edv_ml", "esv_ml", "contour_ef", "ed_frame", "es_frame"))
            if reason is None:
                maps = self.frame_maps(seen)
                labels = np.stack([_whole(f, len(self.model.structures)) for f in maps])
                lv = self.model.structures[0] == "lv_cavity" and str(view).startswith("A")
                values |= _volumes(labels, seen) if lv else {}
                labels = None if values["contours_withheld"] else labels
        return Finding(seen, values, looks["embedding"].numpy(), labels)

    def _withheld(
        self, kind: str, view: str | None, looks: dict[str, Tensor]
    ) -> tuple[str | None, float | None]:
        """Why a head's result is withheld (None: it is not), and how unfamiliar the cine is."""
        features = looks[f"{kind}_seen"][None].to(self.device)
        distance = round(float(self.model.unfamiliarity(kind, features)), 4)
        finite = distance if math.isfinite(distance) else None
        views = self.model.heads[kind]["views"]
        either = " or ".join(views)
        if view is None:
            return f"the view is unknown: the head is for {either} (name it by --view)", finite
        if view not in views:
            return f"the view is {view}, the head is for {either}", finite
        if finite is None or finite > 1:
            return f"unlike the cines that the head was trained on ({distance:.2f} > 1)", finite
        return None, finite

    def _ef(self, view: str | None, looks: dict[str, Tensor]) -> dict[str, Any]:
        reason, unfamiliarity = self._withheld("ef", view, looks)
        names = ("ef", "ef_low", "ef_high")
        out: dict[str, Any] = dict.fromkeys(names)
        if reason is None:
            head = self.model.ef
            ef = float(head(looks["ef_features"][None].to(self.device)))
            radius = float(head.radius)
            limits = (ef, ef - radius, ef + radius)
            out = {k: round(min(max(v, 0.0), 100.0), 2) for k, v in zip(names, limits, strict=True)}
        return {**out, "ef_withheld": reason, "ef_unfamiliarity": unfamiliarity}

    def frame_maps(self, seen: Seen, read: Callable[[Tensor], Tensor] = most_likely) -> np.ndarray:
        """The segmentation head's result for every frame, whether it will be withheld or not.

        Args:
            read: see :func:`discovr_monai.evaluation.heads.segmenter.label_frames`.

        Returns:
            (T, s, s) uint8 in the cine's square window.
        """
        assert self.segmenter is not None
        clip, frames = self.model.about["clip"], self.model.clip_shape[1]
        stride = max(1, round(clip_stride(clip, frames, seen.fps, seen.row["image"])))
        whole = np.arange(frames)
        clips = [(steps, whole) for steps in cover(seen.cine.shape[1], frames, stride)]
        side = max(seen.window[4:6])
        batch = max(1, self.batch_size // 4)
        return label_frames(self.segmenter, seen.cine, clips, side, self.ready, batch, read)


def _whole(labels: np.ndarray, structures: int) -> np.ndarray:
    """Keeps only the largest part of each structure in (s, s) labels: a heart has one of each."""
    out = np.zeros_like(labels)
    for label in range(1, structures + 1):
        out[largest_component(labels == label)] = label
    return out


def _volumes(labels: np.ndarray, seen: Seen) -> dict[str, Any]:
    """ED and ES volumes (single-plane Simpson, mL), their frames and the EF of label 1.

    Without a pixel spacing only the frames and the EF are known. If too many frames are empty,
    the reason to withhold the contours is returned instead.
    """
    spacing = seen.spacing or (1.0, 1.0)
    volumes = np.array([simpson_volume(frame == 1, spacing) for frame in labels])
    empty = volumes <= 0
    if empty.mean() > EMPTY:
        return {"contours_withheld": f"no cavity in {100 * empty.mean():.0f} % of the frames"}
    in_mm = seen.spacing is not None
    volumes = np.where(empty, np.median(volumes), volumes)  # an empty frame is no end-systole
    high, low = np.percentile(volumes, 95), np.percentile(volumes, 5)
    return {
        "edv_ml": round(float(high), 1) if in_mm else None,
        "esv_ml": round(float(low), 1) if in_mm else None,
        "contour_ef": round(ejection_fraction(volumes), 2),
        "ed_frame": int(volumes.argmax()),
        "es_frame": int(volumes.argmin()),
    }
