"""Sinkhorn-Knopp: scores to balanced assignments."""

from __future__ import annotations

import torch
from torch import Tensor

from discovr_monai.base.distributed import all_reduce_max, all_reduce_sum


class Assignments:
    """Balanced soft assignments over the global batch (SwAV; DISCOVR eq. 5), rows on demand.

    Alternates between giving every prototype the same total mass and every token a mass of
    one. Works on two scaling vectors, so ranks exchange K numbers an iteration and no rank ever
    holds another's scores. Shifted by each row's maximum: no overflow at any scale.

    Args:
        scores: (M, K) any float type, this rank's rows; M may be smaller than K. No gradient.
        eps: temperature, > 0.
        iterations: at least 1.
        chunk: None keeps the exponentials of all scores, (M, K) in float32. A number makes them
            anew for so many rows at a time, in every iteration: the same assignments, and
            nothing of the size of the scores beside them.

    Raises:
        ValueError: for eps <= 0, iterations < 1, chunk < 1 or scores that are not a matrix.
    """

    @torch.no_grad()
    def __init__(
        self, scores: Tensor, eps: float = 0.05, iterations: int = 10, chunk: int | None = None
    ) -> None:
        if eps <= 0 or iterations < 1 or scores.dim() != 2 or (chunk is not None and chunk < 1):
            raise ValueError(
                "sinkhorn needs (M, K) scores, eps > 0, iterations >= 1 and chunk >= 1; "
                f"got {tuple(scores.shape)}, {eps}, {iterations}, {chunk}"
            )
        self.eps, self.scores = eps, scores.detach()
        self.dtype = torch.promote_types(scores.dtype, torch.float32)
        count, prototypes = scores.shape
        tiny = torch.finfo(self.dtype).tiny ** 0.8  # leaves room for its reciprocal
        self.row_max = self.scores.amax(dim=1, keepdim=True).to(self.dtype) / eps  # (M, 1)
        self._kernel: Tensor | None = None
        if chunk is None or chunk >= count:
            self._kernel, chunk = self._part(slice(None)), count
        parts = [slice(first, first + chunk) for first in range(0, count, chunk)]
        # (M, 1): undoes the shift by each row's own maximum
        self.rows = (self.row_max - all_reduce_max(self.row_max.amax())).exp_()
        tokens = all_reduce_sum(self.rows.new_full((1, 1), count))  # of all ranks
        share = tokens / prototypes  # a prototype's mass: keeps the scale from drifting
        mass = torch.stack([self._part(p).T @ self.rows[p] for p in parts]).sum(0)  # (K, 1)
        for iteration in range(iterations):
            self.columns = share / all_reduce_sum(mass).clamp_min(tiny)  # (K, 1)
            mass = torch.zeros_like(mass)
            for p in parts:
                kernel = self._part(p)
                self.rows[p] = (kernel @ self.columns).clamp_min(tiny).reciprocal()
                if iteration + 1 < iterations:
                    mass += kernel.T @ self.rows[p]

    def _part(self, rows: slice) -> Tensor:
        """exp of these rows' scores, (m, K), every row's maximum is 1."""
        if self._kernel is not None:
            return self._kernel[rows]
        return (self.scores[rows].to(self.dtype) / self.eps).sub_(self.row_max[rows]).exp_()

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Tensor:
        """These rows' assignments, (m, K) in float32 (float64 for float64 scores).

        Rows sum to 1; columns, over all rows of all ranks, to about (global M) / K.
        """
        return (self._part(rows) * self.rows[rows]).mul_(self.columns.T)


def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 10) -> Tensor:
    """All rows of :class:`Assignments`, (M, K)."""
    return Assignments(scores, eps, iterations)[:]
