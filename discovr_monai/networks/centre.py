"""The running mean of a teacher's logits, which keeps one output from winning everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from discovr_monai.base.distributed import all_reduce_mean


class Centre(nn.Module):
    """c <- momentum * c + (1 - momentum) * mean of the teacher's logits (DINO; paper eq. 2).

    Of logits, not of probabilities, over the batches of all ranks. Losses subtract it from the
    teacher's logits.

    Args:
        outputs: K_h, outputs of the head.
        momentum: 0.9 in the paper.
    """

    def __init__(self, outputs: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(1, outputs))

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Takes in this rank's teacher logits, (rows, K_h); every rank must call it."""
        batch = logits.to(self.mean.dtype).mean(0, keepdim=True)  # (1, K_h)
        self.mean.lerp_(all_reduce_mean(batch), 1 - self.momentum)
