"""Cross-entropy with soft targets, in pieces that stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = {"cpu": 2**18, "cuda": 2**27}  # numbers worked on at a time


def soft_cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over rows of H(target, softmax(logits / temperature)).

    The gradient is known with the loss, so it is made with it, a piece of rows at a time, and
    is all that is kept: one array of the logits' own type. Float32 inside (float64 for float64).

    Args:
        logits: (..., M, K); what leads shares the targets.
        target: (M, K), without gradient.
        temperature: > 0.
    """
    gradient = logits.requires_grad and torch.is_grad_enabled()
    return _SoftCrossEntropy.apply(logits, target, temperature, gradient)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, temperature: float, grad: bool) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows, outputs = logits.shape[-2:]
        total = logits.new_zeros((), dtype=wide)
        gradient = torch.empty_like(logits) if grad else None
        share = outputs / logits.numel()  # one row's
        limit = PIECE.get(logits.device.type, PIECE["cuda"])
        size = max(1, limit * rows // logits.numel())
        for first in range(0, rows, size):
            piece = slice(first, first + size)
            p = target[piece]  # (m, K)
            z = (logits[..., piece, :].to(wide) / temperature).log_softmax(-1)  # (..., m, K)
            total -= (z * p).sum()
            if gradient is not None:
                gradient[..., piece, :] = z.exp_().sub_(p)
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.factor = share / temperature
        return total * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (above * ctx.factor), None, None, None
