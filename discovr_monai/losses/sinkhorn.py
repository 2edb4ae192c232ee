"""Sinkhorn-Knopp: scores to balanced assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from discovr_monai.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 10) -> Tensor:
    """Balanced soft assignments over the global batch (SwAV; DISCOVR eq. 5).

    Alternates between giving every prototype the same total mass and every token a mass of
    one. Works on two scaling vectors, so the exponentials are computed once and ranks
    exchange K numbers an iteration. Shifted by each row's maximum: no overflow at any scale.

    Args:
        scores: (M, K) any float type, this rank's rows; M may be smaller than K.
        eps: temperature, > 0.
        iterations: at least 1.

    Returns:
        (M, K) in float32 (float64 for float64 scores); rows sum to 1, columns to about
        (global M) / K.

    Raises:
        ValueError: for eps <= 0, iterations < 1 or scores that are not a matrix.
    """
    if eps <= 0 or iterations < 1 or scores.dim() != 2:
        raise ValueError(
            f"sinkhorn needs (M, K) scores, eps > 0 and iterations >= 1; "
            f"got {tuple(scores.shape)}, {eps}, {iterations}"
        )
    scaled = scores.to(torch.promote_types(scores.dtype, torch.float32)) / eps  # (M, K)
    tiny = torch.finfo(scaled.dtype).tiny ** 0.8  # leaves room for its reciprocal
    row_max = scaled.amax(dim=1, keepdim=True)  # (M, 1)
    kernel = scaled.sub_(row_max).exp_()  # (M, K), every row's maximum is 1
    rows = (row_max - all_reduce_max(row_max.amax())).exp_()  # (M, 1), undoes the shift
    tokens = all_reduce_sum(torch.full_like(rows[:1], len(rows)))  # (1, 1), of all ranks
    share = tokens / scores.shape[1]  # a prototype's mass: keeps the scale from drifting
    for _ in range(iterations):
        mass = all_reduce_sum(kernel.T @ rows)  # (K, 1)
        columns = share / mass.clamp_min(tiny)
        rows = (kernel @ columns).clamp_min(tiny).reciprocal()  # (M, 1)
    return kernel.mul_(rows).mul_(columns.T)
