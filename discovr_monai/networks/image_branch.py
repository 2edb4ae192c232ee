"""The image branch: a transformer that learns each frame from its EMA teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.networks.branch import Branch
from discovr_monai.networks.heads import ProjectionHead, standardise
from discovr_monai.networks.vit import VisionTransformer


class ImageBranch(Branch):
    """Student and teacher of single frames (paper section 3.2).

    Args:
        student: an encoder of one frame (tubelet 1).
        head: projection head; without one the branch does not learn and only gives targets.
        num_frames: T, frames of a clip.
        frame_step: the students see every n-th frame (1 in the paper).
        target_step: frames from one to the next whose patch tokens are the target of cluster
            distillation, the tubelet's size; 0 where nothing is clustered with them.
        centre_momentum: of the centre of the teacher's logits.
    """

    def __init__(
        self,
        student: VisionTransformer,
        head: ProjectionHead | None,
        *,
        num_frames: int,
        frame_step: int,
        target_step: int,
        centre_momentum: float,
    ) -> None:
        super().__init__(student, head, centre_momentum)
        if head is None:
            student.requires_grad_(False)
        self.student_frames = list(range(0, num_frames, frame_step)) if head else []
        self.target_frames = list(range(0, num_frames, target_step)) if target_step else []

    @property
    def teacher_frames(self) -> list[int]:
        """Frames that the teacher sees, in the order it sees them: those of the target last."""
        target = self.target_frames
        return [f for f in self.student_frames if f not in target] + target

    def forward(self, clip: Tensor, masks: Tensor | None = None) -> DiscovrOutput:
        """The image fields of an output; nothing is updated.

        Args:
            clip: (B, 3, T, H, W), normalised.
            masks: (V, B * F, n) of the F student frames, as :func:`visible_indices` takes them.

        Raises:
            ValueError: if there are students, but no masks.
        """
        out = DiscovrOutput()
        teacher_cls, out.target_tokens = self._teach(clip)
        if self.head is None or self.teacher_head is None or self.centre is None:
            return out
        if masks is None:
            raise ValueError("the image branch is on, but no image_masks were given")
        frames = frames_of(clip, self.student_frames)  # (B * F, 3, 1, H, W)
        student_cls, _ = self.student.encode(frames, masks)  # (V, B * F, d)
        out.image_logits = self.head(student_cls)  # (V, B * F, K_h)
        with torch.no_grad():
            out.image_teacher_logits = self.teacher_head(teacher_cls)  # (B * F, K_h)
        out.image_centre = self.centre.mean
        out.image_cls = torch.cat((student_cls, teacher_cls[None]))
        return out

    @torch.no_grad()
    def _teach(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        """CLS tokens of the student frames (B * F, d), and the target tokens (B, N, d)."""
        order, batch = self.teacher_frames, len(clip)
        images = clip[:, :, order].movedim(2, 0).flatten(0, 1).unsqueeze(2)  # (F_t * B, 3, 1, H, W)
        cls, tokens = self.teacher.encode(images, whole=len(self.target_frames) * batch)
        rows = [order.index(f) for f in self.student_frames]
        cls = cls.unflatten(0, (len(order), batch))[rows].transpose(0, 1).flatten(0, 1)
        if not self.target_frames:
            return cls, None
        tokens = tokens[:, 1:].unflatten(0, (len(self.target_frames), batch))  # (t, B, n, d)
        return cls, standardise(tokens.transpose(0, 1), -2).flatten(1, 2)

    @torch.no_grad()
    def target_tokens(self, clip: Tensor) -> Tensor:
        """The target of cluster distillation alone: (B, 3, T, H, W) -> (B, N, d)."""
        frames = frames_of(clip, self.target_frames)
        tokens = self.teacher(frames)[:, 1:].unflatten(0, (len(clip), -1))  # (B, t, n, d)
        return standardise(tokens, -2).flatten(1, 2)


def frames_of(clip: Tensor, frames: list[int]) -> Tensor:
    """(B, 3, T, H, W) -> (B * F, 3, 1, H, W), frames flattened (b, t)."""
    return clip[:, :, frames].transpose(1, 2).flatten(0, 1).unsqueeze(2)
