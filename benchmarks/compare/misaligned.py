"""SCD as the public code has it, for comparison: its two sides do not speak of the same place.

The teacher's rows are every second *token* instead of every second frame, and they are paired
with the decoder's rows in [visible; masked] order instead of raster order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.image_branch import ImageBranch
from discovr_monai.networks.masking import boolean_mask
from discovr_monai.networks.video_branch import VideoBranch


class MisalignedImageBranch(ImageBranch):
    """Its target are all frames' tokens, of which every ``every``-th is taken."""

    every: int

    def forward(self, clip: Tensor, masks: Tensor | None = None) -> DiscovrOutput:
        """As the parent's."""
        out = super().forward(clip, masks)
        assert out.target_tokens is not None
        out.target_tokens = out.target_tokens[:, :: self.every]  # (B, N, d)
        return out

    def target_tokens(self, clip: Tensor) -> Tensor:
        """As the parent's."""
        return super().target_tokens(clip)[:, :: self.every]


class MisalignedVideoBranch(VideoBranch):
    """Pairs the target's rows with the decoder's in [visible; masked] order."""

    def forward(
        self,
        clip: Tensor,
        masks: Tensor,
        teacher_mask: Tensor | None = None,
        target_tokens: Tensor | None = None,
    ) -> DiscovrOutput:
        """As the parent's."""
        assert target_tokens is not None
        hidden = boolean_mask(masks[-1], self.student.num_tokens)
        order = torch.argsort(hidden.to(torch.uint8), dim=1, stable=True)  # (B, N)
        place = order[..., None].expand_as(target_tokens)
        paired = torch.empty_like(target_tokens).scatter_(1, place, target_tokens)
        return super().forward(clip, masks, teacher_mask, paired)


class MisalignedDiscovr(Discovr):
    """:class:`Discovr` with the slip of the public code."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        assert self.image is not None
        student = self.video.student
        self.video.__class__ = MisalignedVideoBranch
        self.image.__class__ = MisalignedImageBranch
        self.image.every = student.tubelet_size  # type: ignore[assignment]
        self.image.target_frames = list(range(student.clip_shape[1]))
