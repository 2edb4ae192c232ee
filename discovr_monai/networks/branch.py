"""What both branches have: a student, its EMA teacher, a head for each, and a centre."""

from __future__ import annotations

from torch import Tensor, nn

from discovr_monai.networks.centre import Centre
from discovr_monai.networks.ema import ema_update, make_teacher
from discovr_monai.networks.heads import ProjectionHead
from discovr_monai.networks.vit import VisionTransformer


class Branch(nn.Module):
    """Student, teacher and, where the branch distils, heads and centre.

    Args:
        student: the encoder that learns; its teacher begins as a copy.
        head: projection head of the student, None without distillation.
        centre_momentum: of the centre of the teacher's logits.
    """

    def __init__(
        self, student: VisionTransformer, head: ProjectionHead | None, centre_momentum: float
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, make_teacher(student)
        self.head = head
        self.teacher_head = None if head is None else make_teacher(head)
        self.centre = None if head is None else Centre(head.num_outputs, centre_momentum)

    def update_teacher(self, momentum: float, teacher_logits: Tensor | None) -> None:
        """EMA of teacher and centre; see :meth:`Discovr.update_teachers`."""
        ema_update(self.teacher, self.student, momentum)
        if self.head is not None and self.teacher_head is not None:
            ema_update(self.teacher_head, self.head, momentum)
        if self.centre is not None and teacher_logits is not None:
            self.centre.update(teacher_logits)
