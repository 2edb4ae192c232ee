"""Sinkhorn-Knopp: scores to balanced assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from discovr_monai.base.distributed import all_reduce_max, all_reduce_sum


@torch.no_grad()
def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 10) -> Tensor:
    """Balanced soft assignments over the global batch (SwAV; DISCOVR eq. 5).

    Alternates between giving every prototype the same total mass and every token a mass of
    one. It works on two scaling vectors, so ranks exchange K numbers an iteration and no rank ever
    holds another's scores. Each row is shifted by its maximum, so nothing overflows.

    Args:
        scores: (M, K) any float type, this rank's rows; M may be smaller than K. No gradient.
        eps: temperature, > 0.
        iterations: at least 1.

    Returns:
        (M, K) float32 (float64 for float64). Rows sum to 1; columns, over all rows of all ranks,
        to about (global M) / K.

    Raises:
        ValueError: for eps <= 0, iterations < 1 or scores that are not a matrix.

    >>> sinkhorn(torch.tensor([[1.0, 0.0], [0.9, 0.0]]), eps=0.05)
    tensor([[0.7311, 0.2689],
            [0.2689, 0.7311]])
    """
    if eps <= 0 or iterations < 1 or scores.dim() != 2:
        raise ValueError(
            "sinkhorn needs (M, K) scores, eps > 0 and iterations >= 1; "
            f"got {tuple(scores.shape)}, {eps}, {iterations}"
        )
    dtype = torch.promote_types(scores.dtype, torch.float32)
    tiny = torch.finfo(dtype).tiny ** 0.8  # leaves room for its reciprocal
    row_max = scores.amax(dim=1, keepdim=True).to(dtype) / eps  # (M, 1)
    kernel = (scores.to(dtype) / eps).sub_(row_max).exp_()  # (M, K), every row's maximum is 1
    rows = (row_max - all_reduce_max(row_max.amax())).exp_()  # (M, 1), undoes the shift
    tokens = all_reduce_sum(rows.new_full((1, 1), len(scores)))  # of all ranks
    share = tokens / scores.shape[1]  # a prototype's mass: keeps the scale from drifting
    for _ in range(iterations):
        columns = share / all_reduce_sum(kernel.T @ rows).clamp_min(tiny)  # (K, 1)
        rows = (kernel @ columns).clamp_min(tiny).reciprocal()  # (M, 1)
    return kernel.mul_(rows).mul_(columns.T)
