"""Semantic cluster distillation: the bridge from the image to the video branch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.losses.cross_entropy import soft_cross_entropy
from discovr_monai.losses.sinkhorn import sinkhorn


class ClusterDistillation(nn.Module):
    """L_SCD = CE(s_v / tau, q_i) + CE(s_i / tau, q_v) (paper section 3.3).

    s are cosines of the two sides' tokens with the prototypes, row k of both of the same place
    and time; q = Sinkhorn(s), without gradient. The terms never reach the image branch.

    Args:
        temperature: tau, 0.1.
        eps, iterations: Sinkhorn's (:func:`~discovr_monai.losses.sinkhorn.sinkhorn`).
        assignments: "soft" (the paper) or "hard" (argmax, the public code).

    Raises:
        ValueError: for other assignments.
    """

    needs = ("video_scores", "target_scores")

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        eps: float = 0.05,
        iterations: int = 10,
        assignments: str = "soft",
    ) -> None:
        super().__init__()
        if assignments not in ("soft", "hard"):
            raise ValueError(f"assignments {assignments!r} must be 'soft' or 'hard'")
        self.temperature, self.eps, self.iterations = temperature, eps, iterations
        self.assignments = assignments

    def assign(self, scores: Tensor) -> Tensor:
        """(M, K) scores -> (M, K) assignments, which sum to 1 in each row."""
        q = sinkhorn(scores, self.eps, self.iterations)
        if self.assignments == "hard":
            q = F.one_hot(q.argmax(-1), q.shape[-1]).to(q.dtype)
        return q

    def forward(self, output: DiscovrOutput, step: int = 0) -> Tensor:
        """Scalar loss, summed over the two directions."""
        assert output.video_scores is not None and output.target_scores is not None
        s_v = output.video_scores.flatten(0, 1)  # (B * N, K)
        s_i = output.target_scores.flatten(0, 1)
        video = soft_cross_entropy(s_v, self.assign(s_i), self.temperature)
        return video + soft_cross_entropy(s_i, self.assign(s_v), self.temperature)
