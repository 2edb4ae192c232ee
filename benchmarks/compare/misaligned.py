"""SCD as the public code has it, for comparison: its two sides do not speak of the same place.

The teacher's rows are every second *token* instead of every second frame, and they are paired
with the decoder's rows in [visible; masked] order instead of raster order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from discovr_monai.networks.discovr import Discovr, _standardise


class MisalignedDiscovr(Discovr):
    """:class:`Discovr` with the slip of the public code."""

    @property
    def target_frames(self) -> list[int]:
        """All frames: every second token is taken later."""
        return list(range(self.video_student.clip_shape[1]))

    def forward(self, clip: Tensor, video_masks: Tensor, *masks: Any, **others: Any) -> Any:
        """As the parent's; remembers the order of the decoder's rows."""
        self._order = torch.argsort(video_masks[-1].to(torch.uint8), dim=1, stable=True)  # (B, N)
        return super().forward(clip, video_masks, *masks, **others)

    def _cluster_target(self, clip: Tensor, tokens: Tensor | None) -> Tensor:
        assert tokens is not None
        rows = _standardise(tokens[:, :, 1:], -2).flatten(1, 2)  # (B, T n, d)
        rows = rows[:, :: self.video_student.tubelet_size]  # (B, N, d)
        place = self._order[..., None].expand_as(rows)
        return torch.empty_like(rows).scatter_(1, place, rows)
