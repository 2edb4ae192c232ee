"""Tube masking: one spatial mask repeated over time. True = masked."""

from __future__ import annotations

import torch
from torch import Tensor


def tube_masks(
    batch: int,
    grid: tuple[int, int, int],
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draws random tube masks (VideoMAE's; DISCOVR section 3.2).

    Args:
        batch: number of masks.
        grid: (t, h, w) tokens; t = 1 gives the image branch's masks.
        ratio: share of the h * w places that is masked, in [0, 1); ``int(ratio * h * w)`` are.
        generator: a generator that lives on ``device``.
        device: where to draw.

    Returns:
        (batch, t * h * w) bool, raster order (t, h, w), True where masked.
    """
    t, h, w = grid
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1): at least one token stays visible")
    masked = int(ratio * h * w)
    noise = torch.rand(batch, h * w, generator=generator, device=device)
    mask = torch.zeros(batch, h * w, dtype=torch.bool, device=device)
    mask.scatter_(1, noise.argsort(dim=1)[:, :masked], True)
    return mask[:, None].expand(batch, t, h * w).reshape(batch, t * h * w)


def visible_indices(mask: Tensor) -> Tensor:
    """Positions of the visible tokens in raster order.

    Args:
        mask: (..., N) bool, True = masked; every row hides equally many.

    Returns:
        (..., n_visible) int64.

    Raises:
        ValueError: if rows hide different numbers of tokens.
    """
    visible = mask.logical_not()
    low, high = torch.stack(visible.sum(-1).aminmax()).tolist()
    if low != high:
        raise ValueError(f"masks must leave equally many tokens visible, got {low} to {high}")
    return mask.to(torch.uint8).argsort(dim=-1, stable=True)[..., :low]


class TubeMasking:
    """Draws the masks of a training step from (seed, step), whatever the ranks.

    The masks of the whole global batch are drawn on every rank and each takes its own rows,
    so that n ranks see the masks that one would.

    Args:
        num_views: V, masked views for self-distillation.
        ratio: masked share of the places, 0.9 in the paper.
        seed: any non-negative integer.
    """

    def __init__(self, num_views: int = 4, ratio: float = 0.9, seed: int = 0) -> None:
        if num_views < 1:
            raise ValueError(f"num_views {num_views} must be at least 1")
        self.num_views, self.ratio, self.seed = num_views, ratio, seed

    def __call__(
        self,
        step: int,
        rows: slice,
        total: int,
        *,
        video_grid: tuple[int, int, int],
        image_grid: tuple[int, int, int] | None = None,
        frames: int = 0,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor | None]:
        """Masks for the rows ``rows`` of a global batch of ``total`` clips.

        Returns:
            video masks (V + 1, B, N), the last one for the decoder's global view, and image
            masks (V, B * frames, n), each frame with its own, or None without an image grid.
        """
        generator = torch.Generator(device=device)
        generator.manual_seed((self.seed * 1_000_003 + step) % 2**63)
        views = self.num_views
        video = tube_masks(
            (views + 1) * total, video_grid, self.ratio, generator=generator, device=device
        )
        video = video.view(views + 1, total, -1)[:, rows]  # (V + 1, B, N)
        if image_grid is None:
            return video, None
        image = tube_masks(
            views * total * frames, image_grid, self.ratio, generator=generator, device=device
        )
        image = image.view(views, total, frames, -1)[:, rows]  # (V, B, F, n)
        return video, image.flatten(1, 2)
