"""Self-distillation with no labels: teacher of the whole, students of masked views."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from discovr_monai.base.schedules import Schedule
from discovr_monai.base.types import DiscovrOutput
from discovr_monai.losses.cross_entropy import soft_cross_entropy
from discovr_monai.losses.sinkhorn import sinkhorn


class SelfDistillation(nn.Module):
    """L_vid or L_img: mean over views of H(P_teacher, P_student) on CLS tokens (paper eq. 1).

        P_teacher = softmax((z_t - c) / tau_t),  P_student = softmax(z_s / tau_s)

    Args:
        branch: "video" or "image".
        student_temperature: tau_s.
        teacher_temperature: tau_t, a number or a schedule of the optimiser step.
        centring: "centre" subtracts the EMA centre of the logits (the paper, DINO);
            "sinkhorn" balances the teacher over the global batch instead (SwAV, DINOv2),
            which cannot collapse to one output nor to the uniform distribution.
    """

    def __init__(
        self,
        branch: str,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float | Schedule = 0.04,
        centring: str = "centre",
    ) -> None:
        super().__init__()
        if branch not in ("video", "image"):
            raise ValueError(f"branch {branch!r} must be 'video' or 'image'")
        if centring not in ("centre", "sinkhorn"):
            raise ValueError(f"centring {centring!r} must be 'centre' or 'sinkhorn'")
        self.branch, self.centring = branch, centring
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.needs = (f"{branch}_logits", f"{branch}_teacher_logits", f"{branch}_centre")

    def temperature(self, step: int) -> float:
        """tau_t at an optimiser step."""
        tau = self.teacher_temperature
        return float(tau(step)) if callable(tau) else float(tau)

    @torch.no_grad()
    def teacher_probabilities(self, output: DiscovrOutput, step: int) -> Tensor:
        """P_teacher, (B, K)."""
        logits = getattr(output, f"{self.branch}_teacher_logits").detach()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tau = self.temperature(step)
        if self.centring == "sinkhorn":
            return sinkhorn(logits, eps=tau, iterations=3)
        return ((logits - getattr(output, f"{self.branch}_centre")) / tau).softmax(-1)

    def forward(self, output: DiscovrOutput, step: int = 0) -> Tensor:
        """Scalar loss; gradient reaches the student's logits only."""
        logits = getattr(output, f"{self.branch}_logits")  # (V, B, K)
        target = self.teacher_probabilities(output, step)  # (B, K)
        return soft_cross_entropy(logits, target, self.student_temperature)
