"""Which tokens an encoder sees: tubes are hidden from students, single tokens from a teacher.

A mask is given as booleans (True = masked), or as the positions of the visible tokens in raster
order. Training draws positions: they are what encoders need, and a GPU is never waited for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def visible_tubes(noise: Tensor, grid: tuple[int, int, int], ratio: float) -> Tensor:
    """Tokens that a random tube mask leaves visible (VideoMAE's; DISCOVR section 3.2).

    Args:
        noise: (..., h * w), a random number for each place; the lowest are masked.
        grid: (t, h, w) tokens; t = 1 gives the image branch's masks.
        ratio: share of the h * w places that is masked, in [0, 1); ``int(ratio * h * w)`` are.

    Returns:
        (..., t * visible places) int64, positions in raster order (t, h, w).

    >>> visible_tubes(torch.tensor([0.9, 0.1, 0.5, 0.2]), (2, 2, 2), 0.5)
    tensor([0, 2, 4, 6])
    """
    t, h, w = grid
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1): at least one token stays visible")
    places = noise.argsort(dim=-1)[..., int(ratio * h * w) :].sort(dim=-1).values
    starts = torch.arange(0, t * h * w, h * w, device=noise.device)  # of each frame's tokens
    return (starts[:, None] + places[..., None, :]).flatten(-2)


def visible_tokens(noise: Tensor, kept: int) -> Tensor:
    """Single tokens that stay visible, whatever their place and time.

    Args:
        noise: (..., N), a random number for each token; the lowest stay visible.
        kept: how many.

    Returns:
        (..., kept) int64, positions in raster order.
    """
    return noise.argsort(dim=-1)[..., :kept].sort(dim=-1).values


def visible_indices(mask: Tensor) -> Tensor:
    """Positions of the visible tokens in raster order.

    Args:
        mask: (..., N) bool, True = masked, every row hides equally many; or (..., n_visible)
            int64, positions already, which are returned as they are.

    Returns:
        (..., n_visible) int64.

    Raises:
        ValueError: if rows hide different numbers of tokens.
    """
    if mask.dtype != torch.bool:
        return mask
    low, high = torch.stack(mask.logical_not().sum(-1).aminmax()).tolist()
    if low != high:
        raise ValueError(f"masks must leave equally many tokens visible, got {low} to {high}")
    return mask.to(torch.uint8).argsort(dim=-1, stable=True)[..., :low]


def boolean_mask(mask: Tensor, tokens: int) -> Tensor:
    """(..., N) bool, True = masked: the inverse of :func:`visible_indices`.

    >>> boolean_mask(torch.tensor([0, 2]), 4)
    tensor([False,  True, False,  True])
    """
    if mask.dtype == torch.bool:
        return mask
    hidden = torch.ones(*mask.shape[:-1], tokens, dtype=torch.bool, device=mask.device)
    return hidden.scatter_(-1, mask, False)


class StepMasks(NamedTuple):
    """What a step's encoders see: positions of visible tokens, int64, in raster order.

    Attributes:
        video: (V + 1, B, n_v); the last view is the decoder's global view.
        image: (V, B * F, n_i), each frame with its own; None without an image branch.
        teacher: (B, n_t) for the video teacher; None where it sees the whole clip.
    """

    video: Tensor
    image: Tensor | None = None
    teacher: Tensor | None = None


class TubeMasking:
    """Draws the masks of a training step, the same whatever the ranks and the device.

    Each clip's masks come from (seed, step, its row in the global batch) alone, by a generator that
    counts instead of remembering (Philox). So n ranks see the masks that one rank would see, and
    each rank draws its own rows only.

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

    def _noise(
        self, kind: int, step: int, rows: range, shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """(rows, *shape) uniform numbers in [0, 1)."""
        drawn = [
            np.random.Generator(
                np.random.Philox(key=[self.seed, step], counter=[0, 0, kind, row])
            ).random(shape, np.float32)
            for row in rows
        ]
        noise = torch.from_numpy(np.stack(drawn))
        if device.type == "cuda":  # from pinned memory, a copy does not wait for the GPU
            noise = noise.pin_memory()
        return noise.to(device, non_blocking=True)

    def __call__(
        self,
        step: int,
        rows: range,
        *,
        video_grid: tuple[int, int, int],
        image_grid: tuple[int, int, int] | None = None,
        frames: int = 0,
        device: torch.device | str = "cpu",
    ) -> StepMasks:
        """Masks for the rows ``rows`` of a step's global batch.

        Args:
            step: optimiser step.
            rows: of the global batch.
            video_grid, image_grid: (t, h, w) tokens; no image grid, no image masks.
            frames: F, frames of a clip that the image students see.
            device: where the masks are wanted.
        """
        device, views, (t, h, w) = torch.device(device), self.num_views, video_grid
        noise = self._noise(0, step, rows, (views + 1, h * w), device)  # (B, V + 1, h * w)
        video = visible_tubes(noise, video_grid, self.ratio).transpose(0, 1)  # (V + 1, B, n_v)
        image = teacher = None
        if image_grid is not None:
            shape = (views, frames, image_grid[1] * image_grid[2])
            noise = self._noise(1, step, rows, shape, device)  # (B, V, F, h * w)
            image = visible_tubes(noise, image_grid, self.ratio).transpose(0, 1).flatten(1, 2)
        if self.teacher_keep < 1:
            noise = self._noise(2, step, rows, (t * h * w,), device)  # (B, N)
            teacher = visible_tokens(noise, self.teacher_tokens(t * h * w))
        return StepMasks(video, image, teacher)
