"""Which tokens are hidden from whom: tubes from students, single ones from a teacher.

True = masked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def tube_masks(noise: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """Random tube masks (VideoMAE's; DISCOVR section 3.2).

    Args:
        noise: (..., h * w), a random number for each place; the lowest are masked.
        grid: (t, h, w) tokens; t = 1 gives the image branch's masks.
        ratio: share of the h * w places that is masked, in [0, 1); ``int(ratio * h * w)`` are.

    Returns:
        (..., t * h * w) bool, raster order (t, h, w), True where masked.
    """
    t, h, w = grid
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1): at least one token stays visible")
    order = noise.argsort(dim=-1)[..., : int(ratio * h * w)]
    mask = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, order, True)
    return mask[..., None, :].expand(*noise.shape[:-1], t, h * w).flatten(-2)


def token_masks(noise: Tensor, kept: int) -> Tensor:
    """Hides single tokens at random, whatever their place and time.

    Args:
        noise: (..., N), a random number for each token; the lowest stay visible.
        kept: how many.

    Returns:
        (..., N) bool, True where masked.
    """
    mask = torch.ones_like(noise, dtype=torch.bool)
    return mask.scatter_(-1, noise.argsort(dim=-1)[..., :kept], False)


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
    """Draws the masks of a training step, whatever the ranks and the device.

    Each clip's come from (seed, step, its row in the global batch) alone, by a generator that
    counts instead of remembering (Philox): n ranks see the masks that one would, and draw no
    more than their own.

    Args:
        num_views: V, masked views for self-distillation.
        ratio: masked share of the places, 0.9 in the paper.
        seed: any non-negative integer.
        teacher_keep: share of a clip's tokens that the video teacher sees, in (0, 1]. The rest
            are dropped one by one, not in tubes: nothing is reconstructed from them, so nothing
            leaks, and the teacher still sees every place at some times. Such masks did better
            than tubes in masked video pretraining (arXiv 2205.09113), and an encoder that was
            trained on half of its tokens works on all of them (FLIP, arXiv 2212.00794).

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        num_views: int = 4,
        ratio: float = 0.9,
        seed: int = 0,
        teacher_keep: float = 1.0,
    ) -> None:
        if num_views < 1:
            raise ValueError(f"num_views {num_views} must be at least 1")
        if not 0 < teacher_keep <= 1:
            raise ValueError(
                f"teacher_keep {teacher_keep} must lie in (0, 1]: 1 shows the teacher all tokens"
            )
        self.num_views, self.ratio, self.seed = num_views, ratio, seed
        self.teacher_keep = teacher_keep

    def teacher_tokens(self, tokens: int) -> int:
        """How many of a clip's tokens the video teacher sees, at least one."""
        return max(1, round(self.teacher_keep * tokens))

    def _noise(self, kind: int, step: int, rows: range, shape: tuple[int, ...]) -> Tensor:
        """(rows, *shape) uniform numbers in [0, 1)."""
        drawn = [
            np.random.Generator(
                np.random.Philox(key=[self.seed, step], counter=[0, 0, kind, row])
            ).random(shape, np.float32)
            for row in rows
        ]
        return torch.from_numpy(np.stack(drawn))

    def __call__(
        self,
        step: int,
        rows: range,
        *,
        video_grid: tuple[int, int, int],
        image_grid: tuple[int, int, int] | None = None,
        frames: int = 0,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Masks for the rows ``rows`` of a step's global batch.

        Returns:
            Video masks (V + 1, B, N), the last one for the decoder's global view; image masks
            (V, B * frames, n), each frame with its own, or None without an image grid; and the
            video teacher's mask (B, N), or None where it sees the whole clip.
        """
        views = self.num_views
        t, h, w = video_grid
        noise = self._noise(0, step, rows, (views + 1, h * w)).to(device)  # (B, V + 1, h * w)
        video = tube_masks(noise, video_grid, self.ratio).transpose(0, 1)  # (V + 1, B, N)
        image = teacher = None
        if image_grid is not None:
            shape = (views, frames, image_grid[1] * image_grid[2])
            noise = self._noise(1, step, rows, shape).to(device)  # (B, V, frames, n)
            image = tube_masks(noise, image_grid, self.ratio).transpose(0, 1).flatten(1, 2)
        if self.teacher_keep < 1:
            noise = self._noise(2, step, rows, (t * h * w,)).to(device)  # (B, N)
            teacher = token_masks(noise, self.teacher_tokens(t * h * w))
        return video, image, teacher
