"""A segmentation head on patch tokens, and the clips through which it sees a cine's frames."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.data.clips.transforms import SampleClipd
from discovr_monai.evaluation.features.encoders import Backbone, FrozenEncoder
from discovr_monai.evaluation.heads.fitting import last_blocks, scaled_groups

HEADS = ("linear", "conv")


def frames_around(
    length: int, frame: int, num_frames: int, stride: float, slot: int, tubelet: int
) -> tuple[np.ndarray, int]:
    """A clip that holds a given frame at a given place of a tubelet.

    Of the clip's tubelets it is the one with which the fewest frames lie outside of the cine, and
    of these the one nearest to the clip's middle.

    Args:
        length: frames of the cine.
        frame: of the cine, 0..length-1.
        num_frames, stride: of the clip.
        slot: place in the tubelet, 0..tubelet-1.
        tubelet: frames of a tubelet.

    Returns:
        (num_frames,) frames of the cine (its ends repeat where it is too short), and the position
        of ``frame`` among them.

    >>> frames_around(length=20, frame=9, num_frames=4, stride=2, slot=0, tubelet=2)
    (array([ 5,  7,  9, 11]), 2)
    """
    places = np.arange(slot, num_frames, tubelet)
    first = frame - places * stride
    outside = np.maximum(-first, 0) + np.maximum(first + (num_frames - 1) * stride - length + 1, 0)
    middle = np.abs(places - (num_frames - 1) / 2)
    position = int(places[np.lexsort((middle, outside))[0]])
    steps = np.rint(frame + (np.arange(num_frames) - position) * stride).astype(int)
    return np.clip(steps, 0, length - 1), position


def cover(length: int, num_frames: int, stride: int) -> Iterator[np.ndarray]:
    """Clips (num_frames,) of a stride that together hold every frame of a cine.

    >>> [clip.tolist() for clip in cover(length=6, num_frames=2, stride=2)]
    [[0, 2], [2, 4], [1, 3], [3, 5]]
    """
    for phase in range(min(stride, length)):
        walk = np.arange(phase, length, stride)
        for start in range(0, len(walk), num_frames):
            start = max(0, min(start, len(walk) - num_frames))  # the last clip ends with the cine
            clip = walk[start : start + num_frames]
            yield np.pad(clip, (0, num_frames - len(clip)), mode="edge")


class SegmentationHead(nn.Module):
    """Patch tokens to logits for each frame of the tubelet.

    Args:
        dim: width of a token.
        classes: with background.
        tubelet: frames of a token.
        kind: "linear" (batch norm without affine, then a 1 x 1 convolution) or "conv" (two 3 x 3
            convolutions, after each of which the grid is doubled).
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
    """A segmentation head on an encoder that is frozen but for its last blocks.

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
            self.encoder = trained = copy.deepcopy(encoder)
            self.groups += last_blocks(
                trained.encoder, blocks, layer_decay=layer_decay, weight_decay=weight_decay
            )

    def tokens(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, t, h, w, d); with gradient only if blocks are trained."""
        if not self.blocks:
            return self.encoder.tokens(clip)
        tokens: Tensor = self.encoder(clip)[:, :, 1:]
        return tokens.reshape(len(clip), *self.encoder.grid, -1)

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


def clip_stride(clip: Mapping[str, Any], num_frames: int, fps: float | None, name: str) -> float:
    """How many frames of a cine lie between two samples of a clip like those of the training.

    Args:
        clip: how a checkpoint's clips were sampled: "stride" or "duration", "default_fps".
        num_frames: of a clip.
        fps: of the cine, if known.
        name: of the cine, for the error.

    Raises:
        CineError: if clips are sampled by time, and the frame rate is unknown.
    """
    sampling = {key: clip[key] for key in ("stride", "duration", "default_fps")}
    return SampleClipd(num_frames=num_frames, **sampling).stride_of(fps, name)


def most_likely(logits: Tensor) -> Tensor:
    """(F, C, H, W) logits -> (F, H, W), the class with the largest logit."""
    return logits.argmax(1)


def percent_sure(logits: Tensor) -> Tensor:
    """(F, C, H, W) logits -> (F, H, W), the largest class probability in percent.

    It lies between 100 / C, where all classes are as likely, and 100.
    """
    return (100 * logits.softmax(1).amax(1)).round()


def label_frames(
    network: Segmenter,
    cine: np.ndarray,
    clips: Sequence[tuple[np.ndarray, np.ndarray]],
    size: int,
    prepare: Callable[[dict[str, Any]], Tensor],
    batch_size: int,
    read: Callable[[Tensor], Tensor] = most_likely,
) -> np.ndarray:
    """Label maps of a cine's frames, or how sure the network is of them.

    Args:
        cine: (C, T, S, S) uint8.
        clips: for each clip its frames (num_frames,) of the cine, and the positions among them
            whose maps are wanted.
        size: side of the maps.
        prepare: {"image": (B, C, num_frames, S, S) uint8} -> the network's input.
        batch_size: clips at once.
        read: what is made of the logits, :func:`most_likely` or :func:`percent_sure`.

    Returns:
        (T, size, size) uint8; 0 where no clip wanted the frame.
    """
    out = np.zeros((cine.shape[1], size, size), np.uint8)
    for first in range(0, len(clips), batch_size):
        chunk = clips[first : first + batch_size]
        images = torch.from_numpy(np.stack([np.asarray(cine[:, s]) for s, _ in chunk]))
        logits = network.every_frame(prepare({"image": images}))
        for (frames, wanted), maps in zip(chunk, logits, strict=True):
            full = F.interpolate(maps[wanted], (size,) * 2, mode="bilinear", align_corners=False)
            out[frames[wanted]] = read(full).byte().cpu().numpy()
    return out
