"""Segmentation transfer: what the patch tokens know of anatomy.

A head on the tokens of one tubelet gives label maps of its frames. Trained on the labelled
frames only, used on every frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists.datalist import Datalist
from discovr_monai.data.read.masks import mask_name, read_masks, window_masks
from discovr_monai.evaluation.features.encoders import TRAINED, EvaluatedEncoder
from discovr_monai.evaluation.features.extract import Features, check_splits, subset_by_patient
from discovr_monai.evaluation.heads.fitting import fit
from discovr_monai.evaluation.heads.saved import fit_familiarity, views_of, write_head
from discovr_monai.evaluation.heads.segmenter import (
    HEADS,
    SegmentationHead,
    Segmenter,
    clip_stride,
    cover,
    frames_around,
    label_frames,
)
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.segmentation_report import Case, report
from discovr_monai.evaluation.tasks.targets import values_of
from discovr_monai.pages.drawing import SHOWN


def _with_masks(rows: Sequence[DatalistRow], section: str) -> list[DatalistRow]:
    """Rows with a mask; public sets lack a few tracings, which is said and allowed."""
    kept = [r for r in rows if r.get("mask")]
    if not kept:
        values_of(rows, "mask", section, "Add paths of label maps to the datalist")
    if len(kept) < len(rows):
        print(f"section {section!r}: {len(rows) - len(kept)} of {len(rows)} cines have no mask")
    return kept


@dataclass
class Labelled:
    """One labelled frame: row, frame, its label map (S, S)."""

    row: DatalistRow
    frame: int
    labels: np.ndarray


class LabelledClips(Dataset):
    """Clips around labelled frames: "image" uint8, "position", "labels" at the network's size."""

    def __init__(
        self, items: Sequence[Labelled], loader: LoadCined, like: EvaluatedEncoder
    ) -> None:
        self.items, self.loader, self.like = list(items), loader, like

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, like = self.items[index], self.like
        tubelet = like.module.tubelet_size
        row = self.loader(cast(dict, item.row))
        cine = row["image"]
        steps, position = frames_around(
            cine.shape[1],
            item.frame,
            like.num_frames,
            clip_stride(like.clip, like.num_frames, row.get("fps"), item.row["image"]),
            (index + index // tubelet) % tubelet,  # ED and ES both take every place in turn
            tubelet,
        )
        labels = torch.from_numpy(item.labels.astype(np.float32))[None, None]
        labels = F.interpolate(labels, (like.image_size,) * 2, mode="nearest-exact")[0]
        image = torch.from_numpy(np.ascontiguousarray(cine[:, steps]))
        return {"image": image, "position": position, "labels": labels.long()}


class Segmentation:
    """Segmentation from patch tokens, with contours, volumes and EF.

    Args:
        encoder, data, loader: what sees which cines.
        results: collects the figures.
        structures: names of labels 1, 2, ...; the first is the LV cavity.
        train, validation, test: sections.
        head: "linear" or "conv".
        blocks: last blocks that are trained too; 0 for a frozen backbone.
        label_fractions: shares of the training patients whose masks are used, 1 among them.
        every_frame: whether to segment all frames of the test cines (EF, area over time).
        epochs, lr, weight_decay, layer_decay, batch_size, seed: of the training.
        fps: of the animations.
        save_head: file to write the head of all labels to, for inference; None for none.
        view: of the training cines, where the datalist does not say; a saved head needs it.
        start: the head to go on from, of the same kind; None for a new one.
        after_epoch: is told the loss on the validation section after each epoch.
    """

    def __init__(
        self,
        encoder: EvaluatedEncoder,
        data: Datalist,
        loader: LoadCined,
        results: Results,
        *,
        structures: Sequence[str] = ("lv_cavity", "myocardium", "left_atrium"),
        train: str = "training",
        validation: str = "validation",
        test: Sequence[str] = ("test",),
        head: str = "linear",
        blocks: int = 0,
        label_fractions: Sequence[float] = (1.0,),
        every_frame: bool = True,
        epochs: int = 30,
        lr: float = 1e-2,
        weight_decay: float = 0.01,
        layer_decay: float = 0.75,
        batch_size: int = 32,
        seed: int = 0,
        fps: float = 15.0,
        save_head: str | Path | None = None,
        view: str | None = None,
        start: SegmentationHead | None = None,
        after_epoch: Callable[[float], None] | None = None,
    ) -> None:
        if save_head is not None and (blocks or encoder.branch not in TRAINED):
            raise ValueError("save_head needs a frozen branch of the network: set blocks to 0")
        if head not in HEADS:
            raise ValueError(f"head {head!r} must be one of {', '.join(HEADS)}")
        self.encoder, self.loader, self.results = encoder, loader, results
        self.rows = {n: data.rows(n) for n in dict.fromkeys((train, validation, *test))}
        check_splits(self.rows)
        for name, rows in self.rows.items():
            self.rows[name] = _with_masks(rows, name)
        self.structures = list(structures)
        self.train, self.validation, self.test = train, validation, list(test)
        self.head, self.blocks = head, blocks
        self.label_fractions, self.every_frame = list(label_fractions), every_frame
        self.epochs, self.lr, self.weight_decay = epochs, lr, weight_decay
        self.layer_decay, self.batch_size, self.seed, self.fps = layer_decay, batch_size, seed, fps
        self.save_head, self.data = save_head, data
        self.start, self.after_epoch = start, after_epoch
        if save_head is not None and 1 not in self.label_fractions:
            raise ValueError("save_head needs 1.0 among the label_fractions: a head has all labels")
        both = [*self.rows[train], *self.rows[validation]]
        self.views = [] if save_head is None else views_of(both, view)

    def run(self) -> dict:
        """Evaluates, writes, returns the results."""
        held = self._inputs(self._labelled(self.rows[self.validation]))
        self.results.facts["grid"] = list(self.encoder.module.grid)
        for fraction in self.label_fractions:
            kept = subset_by_patient(self.rows[self.train], fraction, self.seed)
            rows = [self.rows[self.train][i] for i in kept]
            network = self._fit(self._inputs(self._labelled(rows)), held)
            if self.save_head is not None and fraction == 1:
                self._save(network.head)
            for section in self.test:
                cases = self._cases(network, self.rows[section], section)
                report(
                    self.results,
                    section,
                    f"{self.head} head" + (f", last {self.blocks} blocks" if self.blocks else ""),
                    cases,
                    self.structures,
                    grid=self.encoder.module.grid[1:],
                    label_fraction=fraction,
                    draw=fraction == max(self.label_fractions),
                    fps=self.fps,
                    read=self._larger,
                )
        return self.results.finish()

    # ---- labelled frames -----------------------------------------------------------------

    def _masks(self, row: DatalistRow) -> np.ndarray:
        """(T, S, S) labels of a cine, checked."""
        cine = self.loader.load(row["image"])
        shape = (len(cine.frames), *cine.window[:2])
        masks = window_masks(read_masks(self.loader.root, row["mask"], shape), cine.window)
        if masks.max(initial=0) > len(self.structures):
            raise CineError(
                mask_name(row["mask"]),
                f"label {int(masks.max())} is none of the {len(self.structures)} structures",
                "Name it under structures in the config",
            )
        return masks

    def _labelled(self, rows: Sequence[DatalistRow]) -> list[Labelled]:
        """ED and ES where the datalist names them, else every frame with a label."""
        found = []
        for row in rows:
            masks = self._masks(row)
            frames = [row[k] for k in ("ed_frame", "es_frame") if row.get(k) is not None]
            if not frames:
                frames = np.flatnonzero(masks.any((1, 2))).tolist()
            bad = [f for f in frames if not 0 <= f < len(masks)]
            if bad:
                raise CineError(
                    row["image"],
                    f"frame {bad[0]} is labelled, but the cine has {len(masks)} frames",
                    "Count frames from 0 in the datalist",
                )
            found += [Labelled(row, int(f), masks[f].astype(np.uint8)) for f in frames]
        if not found:
            raise ValueError("no frame of the datalist is labelled: nothing to train on")
        return found

    def _inputs(self, items: Sequence[Labelled]) -> LabelledClips | TensorDataset:
        """Clips, or their tokens where the backbone is frozen: computed once."""
        clips = LabelledClips(items, self.loader, self.encoder)
        if self.blocks:
            return clips
        tokens, positions, labels = [], [], []
        network = self.encoder.module
        for batch in tqdm(DataLoader(clips, self.batch_size), desc="tokens", unit="batch"):
            found = network.tokens(self.encoder.prepare(batch, self.encoder.device))
            tubelet = batch["position"] // network.tubelet_size
            tokens.append(found[torch.arange(len(tubelet)), tubelet].float().cpu())
            positions.append(batch["position"])
            labels.append(batch["labels"].byte())
        return TensorDataset(torch.cat(tokens), torch.cat(positions), torch.cat(labels))

    def _prepare(self, batch: Any, *_: Any, **__: Any) -> tuple[dict[str, Tensor], Tensor]:
        device = self.encoder.device
        if isinstance(batch, dict):
            clip = self.encoder.prepare(batch, device)
            inputs = {"clip": clip, "position": batch["position"].to(device)}
            return inputs, batch["labels"].to(device)
        tokens, position, labels = (t.to(device) for t in batch)
        return {"tokens": tokens, "position": position}, labels.long()

    # ---- training ------------------------------------------------------------------------

    def _fit(
        self, train: LabelledClips | TensorDataset, held: LabelledClips | TensorDataset
    ) -> Segmenter:
        torch.manual_seed(self.seed)
        module = self.encoder.module
        classes = len(self.structures) + 1
        head = SegmentationHead(module.token_dim, classes, module.tubelet_size, self.head)
        if self.start is not None:
            head.load_state_dict(self.start.state_dict())
        network = Segmenter(
            module,
            head,
            self.blocks,
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
        ).to(self.encoder.device)
        loss = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.batch_size, len(train))
        loader = DataLoader(train, size, shuffle=True, drop_last=True, generator=generator)
        checks = DataLoader(held, self.batch_size)

        def full(logits: Tensor, labels: Tensor) -> Tensor:
            return F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)

        def validate() -> float:
            found = []
            for batch in checks:
                inputs, labels = self._prepare(batch)
                found.append(float(loss(full(network(inputs), labels), labels)) * len(labels))
            figure = sum(found) / len(held)
            if self.after_epoch is not None:
                self.after_epoch(figure)
            return figure

        fit(
            network,
            network.groups,
            loader,
            prepare=self._prepare,
            loss=lambda logits, labels: loss(full(logits, labels), labels),
            validate=validate,
            epochs=self.epochs,
            lr=self.lr,
            warmup_epochs=1,
            device=self.encoder.device,
            progress=f"{self.head} head",
        )
        return network

    def _save(self, head: SegmentationHead) -> None:
        """The head, and what is like its training."""
        assert self.save_head is not None
        both = (self.train, self.validation)
        file = Path(self.save_head).with_suffix(".features.npz")
        file.unlink(missing_ok=True)
        seen = Features(self.encoder, self.data, self.loader, both, file)
        familiar = fit_familiarity(*(seen[section] for section in both))
        file.unlink()
        about = {
            "kind": "segmentation",
            "checkpoint": self.encoder.sha256,
            "branch": self.encoder.branch,
            "head": self.head,
            "structures": self.structures,
            "views": self.views,
            "cines": len(self.rows[self.train]),
        }
        parts = {"segmentation": head, "segmentation_familiarity": familiar}
        write_head(self.save_head, about, parts)

    # ---- testing -------------------------------------------------------------------------

    def _larger(self, row: DatalistRow) -> np.ndarray:
        """(T, s, s) uint8: a cine as large as a page shows it."""
        loader = self.loader
        other = LoadCined(root=loader.root, size=SHOWN, sector=loader.sector)
        return np.asarray(other(cast(dict, row))["image"][0])

    def _cases(self, network: Segmenter, rows: Sequence[DatalistRow], section: str) -> list[Case]:
        return [
            self._case(network, row)
            for row in tqdm(rows, desc=f"segmenting {section}", unit="cine")
        ]

    @torch.no_grad()
    def _case(self, network: Segmenter, row: DatalistRow) -> Case:
        """Label maps of a cine at its own resolution."""
        loaded = self.loader(cast(dict, row))
        cine, labels = loaded["image"], self._masks(row)
        items = self._labelled([row]) if not self.every_frame else []
        wanted = sorted({i.frame for i in items}) if items else range(cine.shape[1])
        predicted = self._predict(network, cine, wanted, loaded.get("fps"), row, labels.shape[-1])
        return Case(
            row=row,
            frames=list(wanted),
            predicted=predicted,
            truth=labels[list(wanted)].astype(np.uint8),
            fps=loaded.get("fps"),
            picture=np.asarray(cine[0]),
        )

    def _predict(
        self,
        network: Segmenter,
        cine: np.ndarray,
        wanted: Sequence[int],
        fps: float | None,
        row: DatalistRow,
        size: int,
    ) -> np.ndarray:
        """(len(wanted), size, size) uint8 labels."""
        like = self.encoder
        stride = clip_stride(like.clip, like.num_frames, fps, row["image"])
        tubelet = network.head.tubelet
        if self.every_frame:
            whole = np.arange(like.num_frames)
            steps = cover(cine.shape[1], like.num_frames, max(1, round(stride)))
            clips = [(s, whole) for s in steps]
        else:
            around = [
                frames_around(cine.shape[1], f, like.num_frames, stride, 0, tubelet) for f in wanted
            ]
            clips = [(s, np.array([p])) for s, p in around]

        def prepare(batch: dict) -> Tensor:
            return like.prepare(batch, like.device)

        found = label_frames(network, cine, clips, size, prepare, self.batch_size)
        return found[list(wanted)]
