"""Segmentation transfer: what the patch tokens know of anatomy.

A head on the tokens of one tubelet gives label maps of its frames. Trained on the labelled
frames only, used on every frame.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from discovr_monai.data.datalist import Datalist
from discovr_monai.data.masks import mask_name, read_masks, window_masks
from discovr_monai.data.transforms import LoadCined
from discovr_monai.evaluation.encoders import Backbone, EvaluatedEncoder, FrozenEncoder
from discovr_monai.evaluation.features import check_splits, subset_by_patient
from discovr_monai.evaluation.fitting import fit, last_blocks, scaled_groups
from discovr_monai.evaluation.labels import values_of
from discovr_monai.evaluation.results import Results
from discovr_monai.evaluation.segmentation_report import Case, report
from discovr_monai.types import CineError, DatalistRow

HEADS = ("linear", "conv")


def frames_around(
    length: int, frame: int, num_frames: int, stride: float, slot: int, tubelet: int
) -> tuple[np.ndarray, int]:
    """A clip that holds a given frame at a given place of its tubelet, the middle if it can.

    Args:
        length: of the cine; frame: in 0..length-1.
        num_frames, stride: of the clip.
        slot: place in the tubelet, 0..tubelet-1.

    Returns:
        (num_frames,) frames of the cine (its ends repeat where it is too short), and the
        position of ``frame`` among them.
    """
    places = np.arange(slot, num_frames, tubelet)
    first = frame - places * stride
    outside = np.maximum(-first, 0) + np.maximum(first + (num_frames - 1) * stride - length + 1, 0)
    middle = np.abs(places - (num_frames - 1) / 2)
    position = int(places[np.lexsort((middle, outside))[0]])
    steps = np.rint(frame + (np.arange(num_frames) - position) * stride).astype(int)
    return np.clip(steps, 0, length - 1), position


def cover(length: int, num_frames: int, stride: int) -> Iterator[np.ndarray]:
    """Clips (num_frames,) of ``stride`` that together hold every frame of a cine."""
    for phase in range(min(stride, length)):
        walk = np.arange(phase, length, stride)
        for start in range(0, len(walk), num_frames):
            start = max(0, min(start, len(walk) - num_frames))  # the last one ends at the end
            clip = walk[start : start + num_frames]
            yield np.pad(clip, (0, num_frames - len(clip)), mode="edge")


def _with_masks(rows: Sequence[DatalistRow], section: str) -> list[DatalistRow]:
    """Rows with a mask; public sets lack a few tracings, which is said and allowed."""
    kept = [r for r in rows if r.get("mask")]
    if not kept:
        values_of(rows, "mask", section, "Add paths of label maps to the datalist")
    if len(kept) < len(rows):
        print(f"section {section!r}: {len(rows) - len(kept)} of {len(rows)} cines have no mask")
    return kept


class SegmentationHead(nn.Module):
    """Patch tokens to logits for each frame of the tubelet.

    Args:
        dim: width of a token.
        classes: with background.
        tubelet: frames of a token.
        kind: "linear" (batch norm without affine, 1 x 1) or "conv" (two 3 x 3 layers, each
            followed by doubling the grid).
    """

    def __init__(self, dim: int, classes: int, tubelet: int, kind: str = "linear") -> None:
        super().__init__()
        if kind not in HEADS:
            raise ValueError(f"head {kind!r} must be one of {', '.join(HEADS)}")
        self.classes, self.tubelet = classes, tubelet
        norm = nn.BatchNorm2d(dim, affine=False)
        out = classes * tubelet
        if kind == "linear":
            self.layers = nn.Sequential(norm, nn.Conv2d(dim, out, 1))
        else:
            self.layers = nn.Sequential(
                norm,
                nn.Conv2d(dim, 128, 3, padding=1),
                nn.GroupNorm(8, 128),
                nn.GELU(),
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Conv2d(128, 64, 3, padding=1),
                nn.GroupNorm(8, 64),
                nn.GELU(),
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Conv2d(64, out, 1),
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, h, w, d) -> (B, tubelet, classes, h', w')."""
        maps = self.layers(tokens.permute(0, 3, 1, 2))  # (B, u C, h', w')
        return maps.unflatten(1, (self.tubelet, self.classes))


class Segmenter(nn.Module):
    """An encoder, frozen but for its last blocks, and a head.

    Args:
        encoder: :class:`FrozenEncoder` (copied if blocks are trained) or simple features.
        head: see :class:`SegmentationHead`.
        blocks: how many last blocks are trained.
        layer_decay, weight_decay: see :func:`last_blocks`.
    """

    def __init__(
        self,
        encoder: Backbone,
        head: SegmentationHead,
        blocks: int = 0,
        *,
        layer_decay: float = 0.75,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.blocks = encoder, head, blocks
        self.groups = scaled_groups(head, 1.0, weight_decay)
        if blocks:
            if not isinstance(encoder, FrozenEncoder):
                raise ValueError("simple features have no blocks to train: set blocks to 0")
            self.encoder = own = copy.deepcopy(encoder)
            self.groups += last_blocks(
                own.encoder, blocks, layer_decay=layer_decay, weight_decay=weight_decay
            )

    def tokens(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, t, h, w, d); with gradient only if blocks are trained."""
        if not self.blocks:
            return self.encoder.tokens(clip)
        found = self.encoder(clip)[:, :, 1:]
        return found.reshape(len(clip), *self.encoder.grid, -1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, classes, h', w') of one frame of each sample.

        Args:
            inputs: "position" (B,) of the frame in its clip, and "clip" (B, 3, T, H, W), or
                "tokens" (B, h, w, d) of its tubelet where the backbone is frozen.
        """
        position = inputs["position"]
        if "tokens" in inputs:
            tokens = inputs["tokens"]
        else:
            tubelet = position // self.head.tubelet
            tokens = self.tokens(inputs["clip"])[torch.arange(len(position)), tubelet]
        return self.head(tokens)[torch.arange(len(position)), position % self.head.tubelet]

    def every_frame(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> logits (B, T, classes, h', w')."""
        tokens = self.tokens(clip)  # (B, t, h, w, d)
        maps = self.head(tokens.flatten(0, 1))  # (B t, u, C, h', w')
        return maps.flatten(0, 1).unflatten(0, (len(clip), -1))


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
            clip_stride(like, row.get("fps"), item.row["image"]),
            (index + index // tubelet) % tubelet,  # ED and ES both take every place in turn
            tubelet,
        )
        labels = torch.from_numpy(item.labels.astype(np.float32))[None, None]
        labels = F.interpolate(labels, (like.image_size,) * 2, mode="nearest-exact")[0]
        image = torch.from_numpy(np.ascontiguousarray(cine[:, steps]))
        return {"image": image, "position": position, "labels": labels.long()}


def clip_stride(encoder: EvaluatedEncoder, fps: float | None, name: str) -> float:
    """Frames between samples of the training's clips, for a cine of this frame rate."""
    if encoder.clip["stride"] is not None:
        return float(encoder.clip["stride"])
    fps = fps or encoder.clip["default_fps"]
    if not fps:
        raise CineError(name, "its frame rate is unknown", "Give fps in the datalist")
    return float(encoder.clip["duration"] * fps / encoder.num_frames)


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
    ) -> None:
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

    def run(self) -> dict:
        """Evaluates, writes, returns the results."""
        held = self._inputs(self._labelled(self.rows[self.validation]))
        self.results.facts["grid"] = list(self.encoder.module.grid)
        for fraction in self.label_fractions:
            kept = subset_by_patient(self.rows[self.train], fraction, self.seed)
            rows = [self.rows[self.train][i] for i in kept]
            network = self._fit(self._inputs(self._labelled(rows)), held)
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
            return sum(found) / len(held)

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

    # ---- testing -------------------------------------------------------------------------

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
        stride = clip_stride(like, fps, row["image"])
        tubelet = network.head.tubelet
        if self.every_frame:
            steps = list(cover(cine.shape[1], like.num_frames, max(1, round(stride))))
            places = [np.arange(like.num_frames)] * len(steps)
        else:
            around = [
                frames_around(cine.shape[1], f, like.num_frames, stride, 0, tubelet) for f in wanted
            ]
            steps, places = [a for a, _ in around], [np.array([p]) for _, p in around]
        out = np.zeros((cine.shape[1], size, size), np.uint8)
        for first in range(0, len(steps), self.batch_size):
            chunk = steps[first : first + self.batch_size]
            clips = torch.from_numpy(np.stack([np.asarray(cine[:, s]) for s in chunk]))
            logits = network.every_frame(like.prepare({"image": clips}, like.device))
            for s, p, maps in zip(chunk, places[first:], logits, strict=False):
                found = F.interpolate(maps[p], (size, size), mode="bilinear", align_corners=False)
                out[s[p]] = found.argmax(1).byte().cpu().numpy()
        return out[list(wanted)]
