"""Segmentation: what the patch tokens know of anatomy.

A head gives label maps of a tubelet's frames from its tokens. It is trained on the labelled frames
only, and used on every frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
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
from discovr_monai.evaluation.heads.saved import (
    check_all_labels,
    fit_familiarity,
    views_of,
    write_head,
)
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
from discovr_monai.evaluation.report.segmentation_report import Case, Drawing, report
from discovr_monai.evaluation.tasks.targets import values_of
from discovr_monai.pages.drawing import SHOWN


def _with_masks(rows: Sequence[DatalistRow], section: str) -> list[DatalistRow]:
    """The rows with a mask. Public sets lack a few tracings, so missing ones are only printed."""
    kept = [r for r in rows if r.get("mask")]
    if not kept:
        values_of(rows, "mask", section, "Add paths of label maps to the datalist")
    if len(kept) < len(rows):
        print(f"section {section!r}: {len(rows) - len(kept)} of {len(rows)} cines have no mask")
    return kept


@dataclass
class Labelled:
    """One labelled frame: its row, its number in the cine, and its label map (S, S)."""

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


@dataclass(eq=False, repr=False)
class Segmentation:
    """Segmentation from patch tokens, with contours, volumes and EF.

    Args:
        encoder, data, loader: what sees which cines.
        results: collects the figures.
        structures: names of labels 1, 2, ...; the first is the LV cavity.
        train, validation, test: sections.
        head: "linear" or "conv", see :class:`SegmentationHead`.
        blocks: how many of the encoder's last blocks are trained too; 0 for a frozen encoder.
        label_fractions: shares of the training patients whose masks are used, 1 among them.
        every_frame: whether all frames of the test cines are segmented, as EF and the area over
            time need it, or the labelled ones only.
        epochs, lr, weight_decay, layer_decay, batch_size, seed: of the training.
        fps: frames per second of the animations.
        save_head: file to write the head of all labels to, for inference; None for none.
        view: of the training cines, where the datalist does not say; a saved head needs it.
        start: the head to go on from, of the same kind; None for a new one.
        after_epoch: is called with the loss on the validation section after each epoch.

    Raises:
        ValueError, CineError: if the options do not fit together, or masks cannot be used.
    """

    encoder: EvaluatedEncoder
    data: Datalist
    loader: LoadCined
    results: Results
    _: KW_ONLY
    structures: Sequence[str] = ("lv_cavity", "myocardium", "left_atrium")
    train: str = "training"
    validation: str = "validation"
    test: Sequence[str] = ("test",)
    head: str = "linear"
    blocks: int = 0
    label_fractions: Sequence[float] = (1.0,)
    every_frame: bool = True
    epochs: int = 30
    lr: float = 1e-2
    weight_decay: float = 0.01
    layer_decay: float = 0.75
    batch_size: int = 32
    seed: int = 0
    fps: float = 15.0
    save_head: str | Path | None = None
    view: str | None = None
    start: SegmentationHead | None = None
    after_epoch: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        trained_branch = self.encoder.branch in TRAINED
        if self.save_head is not None and (self.blocks or not trained_branch):
            raise ValueError("save_head needs a frozen branch of the network: set blocks to 0")
        if self.head not in HEADS:
            raise ValueError(f"head {self.head!r} must be one of {', '.join(HEADS)}")
        names = dict.fromkeys((self.train, self.validation, *self.test))
        rows = {name: self.data.rows(name) for name in names}
        check_splits(rows)
        self.rows = {name: _with_masks(rows[name], name) for name in names}
        self.views: list[str] = []
        if self.save_head is not None:
            check_all_labels(self.label_fractions)
            self.views = views_of([*self.rows[self.train], *self.rows[self.validation]], self.view)

    def run(self) -> dict[str, Any]:
        """Evaluates, writes the results and returns them."""
        grid = self.encoder.module.grid
        held = self._inputs(self._labelled(self.rows[self.validation]))
        self.results.facts["grid"] = list(grid)
        method = f"{self.head} head" + (f", last {self.blocks} blocks" if self.blocks else "")
        for fraction in self.label_fractions:
            kept = subset_by_patient(self.rows[self.train], fraction, self.seed)
            rows = [self.rows[self.train][i] for i in kept]
            network = self._fit(self._inputs(self._labelled(rows)), held)
            if self.save_head is not None and fraction == 1:
                self._save(network.head)
            drawing = Drawing(self.fps, self._larger)
            for section in self.test:
                report(
                    self.results,
                    section,
                    method,
                    self._cases(network, self.rows[section], section),
                    self.structures,
                    grid=(grid[1], grid[2]),
                    label_fraction=fraction,
                    drawing=drawing if fraction == max(self.label_fractions) else None,
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
        """The ED and ES frames where the datalist names them, else every frame with a label."""
        items = []
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
            items += [Labelled(row, int(f), masks[f].astype(np.uint8)) for f in frames]
        if not items:
            raise ValueError("no frame of the datalist is labelled: nothing to train on")
        return items

    def _inputs(self, items: Sequence[Labelled]) -> LabelledClips | TensorDataset:
        """Clips around the labelled frames, or with a frozen encoder their tokens, made once."""
        clips = LabelledClips(items, self.loader, self.encoder)
        if self.blocks:
            return clips
        tokens, positions, labels = [], [], []
        network = self.encoder.module
        for batch in tqdm(DataLoader(clips, self.batch_size), desc="tokens", unit="batch"):
            of_clip = network.tokens(self.encoder.prepare(batch, self.encoder.device))
            tubelet = batch["position"] // network.tubelet_size
            tokens.append(of_clip[torch.arange(len(tubelet)), tubelet].float().cpu())
            positions.append(batch["position"])
            labels.append(batch["labels"].byte())
        return TensorDataset(torch.cat(tokens), torch.cat(positions), torch.cat(labels))

    def _prepare(self, batch: Any, *_: Any, **__: Any) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of :meth:`_inputs` -> what :class:`Segmenter` takes, and the label maps."""
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
        dice_ce = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.batch_size, len(train))
        loader = DataLoader(train, size, shuffle=True, drop_last=True, generator=generator)
        checks = DataLoader(held, self.batch_size)

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            size = labels.shape[-2:]
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            return dice_ce(logits, labels)  # type: ignore[no-any-return]

        def validate() -> float:
            losses = []
            for batch in checks:
                inputs, labels = self._prepare(batch)
                losses.append(float(loss(network(inputs), labels)) * len(labels))
            figure = sum(losses) / len(held)
            if self.after_epoch is not None:
                self.after_epoch(figure)
            return figure

        fit(
            network,
            network.groups,
            loader,
            prepare=self._prepare,
            loss=loss,
            validate=validate,
            epochs=self.epochs,
            lr=self.lr,
            warmup_epochs=1,
            device=self.encoder.device,
            progress=f"{self.head} head",
        )
        return network

    def _save(self, head: SegmentationHead) -> None:
        """Writes the head, and which cines are like its training cines."""
        assert self.save_head is not None
        sections = (self.train, self.validation)
        file = Path(self.save_head).with_suffix(".features.npz")
        file.unlink(missing_ok=True)
        features = Features(self.encoder, self.data, self.loader, sections, file)
        familiar = fit_familiarity(*(features[section] for section in sections))
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
        """(T, s, s) uint8: the cine as large as a page shows it."""
        larger = LoadCined(root=self.loader.root, size=SHOWN, sector=self.loader.sector)
        return np.asarray(larger(cast(dict, row))["image"][0])

    def _cases(self, network: Segmenter, rows: Sequence[DatalistRow], section: str) -> list[Case]:
        return [
            self._case(network, row)
            for row in tqdm(rows, desc=f"segmenting {section}", unit="cine")
        ]

    @torch.no_grad()
    def _case(self, network: Segmenter, row: DatalistRow) -> Case:
        """Label maps of a cine, as large as its own frames."""
        loaded = self.loader(cast(dict, row))
        cine, truth, fps = loaded["image"], self._masks(row), loaded.get("fps")
        wanted = list(range(cine.shape[1]))
        if not self.every_frame:
            wanted = sorted({item.frame for item in self._labelled([row])})
        encoder = self.encoder
        predicted = label_frames(
            network,
            cine,
            self._clips(network, cine.shape[1], wanted, fps, row["image"]),
            truth.shape[-1],
            lambda batch: encoder.prepare(batch, encoder.device),
            self.batch_size,
        )
        return Case(
            row=row,
            frames=wanted,
            predicted=predicted[wanted],
            truth=truth[wanted].astype(np.uint8),
            fps=fps,
            picture=np.asarray(cine[0]),
        )

    def _clips(
        self, network: Segmenter, length: int, wanted: Sequence[int], fps: float | None, name: str
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Clips of a cine, and the positions in each whose label maps are used."""
        count = self.encoder.num_frames
        stride = clip_stride(self.encoder.clip, count, fps, name)
        if self.every_frame:
            return [(c, np.arange(count)) for c in cover(length, count, max(1, round(stride)))]
        tubelet = network.head.tubelet
        around = (frames_around(length, f, count, stride, 0, tubelet) for f in wanted)
        return [(clip, np.array([position])) for clip, position in around]
