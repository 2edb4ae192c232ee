"""Masked pixel reconstruction: VideoMAE's loss, as a baseline or an extra term."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from discovr_monai.base.types import DiscovrOutput


class PixelReconstruction(nn.Module):
    """Mean squared error on the masked tubelets' pixels (VideoMAE, NeurIPS 2022).

    Args:
        normalise: each tubelet's pixels to zero mean and unit variance first.
    """

    needs = ("pixels", "pixel_targets", "global_mask")

    def __init__(self, *, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, output: DiscovrOutput, step: int = 0) -> Tensor:
        """Scalar loss over (B, N, P) where masked."""
        assert output.pixels is not None and output.pixel_targets is not None
        assert output.global_mask is not None
        target = output.pixel_targets.detach()
        if self.normalise:
            std = (target.var(-1, keepdim=True) + 1e-6).sqrt()
            target = (target - target.mean(-1, keepdim=True)) / std
        pixels = output.pixels.to(torch.promote_types(output.pixels.dtype, torch.float32))
        error = (pixels - target).square().mean(-1)  # (B, N)
        # not error[mask]: counting what a mask selects would make the host wait for a GPU
        return error.where(output.global_mask, 0).sum() / output.global_mask.sum()
