"""Clips of bytes to what a network takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


class PrepareClip:
    """The trainer's ``prepare_batch``: uint8 clips to normalised floats, on the device.

    Args:
        mean, std: per channel, for intensities in 0..1 (ImageNet's, as in the paper).
        key: the clip's key in a batch, (B, C, T, H, W) uint8 with C = 1 or 3.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        key: str = "image",
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} need three values each, std above 0")
        self.mean, self.std, self.key = list(mean), list(std), key

    def __call__(
        self,
        batch: Mapping[str, Any],
        device: torch.device | str | None = None,
        non_blocking: bool = False,
        **_: Any,
    ) -> Tensor:
        """(B, C, T, H, W) uint8 -> (B, 3, T, H, W) float32, grey repeated."""
        clip = torch.as_tensor(batch[self.key])  # drops MetaTensor's bookkeeping
        if hasattr(clip, "as_tensor"):
            clip = clip.as_tensor()
        clip = clip.to(device, non_blocking=non_blocking)
        if clip.dtype != torch.uint8:
            raise ValueError(f"clips must be uint8 (0..255), got {clip.dtype}")
        mean = torch.tensor(self.mean, device=clip.device).view(3, 1, 1, 1)
        std = torch.tensor(self.std, device=clip.device).view(3, 1, 1, 1)
        return (clip.float() / 255 - mean) / std
