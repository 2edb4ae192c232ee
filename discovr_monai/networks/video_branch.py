"""The video branch: a transformer that learns masked clips, and the decoder that completes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.networks.branch import Branch
from discovr_monai.networks.heads import Decoder, ProjectionHead, standardise
from discovr_monai.networks.masking import boolean_mask
from discovr_monai.networks.vit import VisionTransformer


class VideoBranch(Branch):
    """Student and teacher of clips, decoder and prototypes (paper sections 3.1 and 3.3).

    Args:
        student: the video encoder; its EMA teacher is what evaluation uses.
        head: projection head, None without video distillation.
        decoder: completes the global view, None without clustering or reconstruction.
        num_prototypes: K; 0 without clustering.
        target: what the decoder's output is clustered with: "image" (the image teacher's patch
            tokens, handed to forward) or "pixels" (a learned projection of each tubelet's pixels).
        reconstruct: adds a linear layer from the decoder's output to a tubelet's pixels.
        centre_momentum: of the centre of the teacher's logits.
    """

    def __init__(
        self,
        student: VisionTransformer,
        head: ProjectionHead | None,
        decoder: Decoder | None,
        *,
        num_prototypes: int,
        target: str,
        reconstruct: bool,
        centre_momentum: float,
    ) -> None:
        super().__init__(student, head, centre_momentum)
        self.decoder = decoder
        self.prototypes: nn.Parameter | None = None
        self.pixel_projection: nn.Module | None = None
        self.pixel_head: nn.Module | None = None
        if head is None and decoder is None:
            student.requires_grad_(False)
        if decoder is None:
            return
        width, pixels = decoder.head.out_features, student.patch_embed.in_features
        if num_prototypes:
            self.prototypes = nn.Parameter(F.normalize(torch.randn(num_prototypes, width), dim=-1))
            if target == "pixels":
                self.pixel_projection = nn.Sequential(
                    nn.Linear(pixels, width), nn.GELU(), nn.Linear(width, width)
                )
        if reconstruct:
            self.pixel_head = nn.Linear(width, pixels)

    def forward(
        self,
        clip: Tensor,
        masks: Tensor,
        teacher_mask: Tensor | None = None,
        target_tokens: Tensor | None = None,
    ) -> DiscovrOutput:
        """The video fields of an output; nothing is updated.

        Args:
            clip: (B, 3, T, H, W), normalised.
            masks: (V + 1, B, N) as :func:`visible_indices` takes them; the last is the global view.
            teacher_mask: (B, N) likewise; None shows the teacher everything.
            target_tokens: (B, N, d) of the image branch, which the prototypes are to explain.
        """
        out = DiscovrOutput()
        if self.head is None and self.decoder is None:
            return out  # the image branch alone trains
        first = 0 if self.head is not None else len(masks) - 1
        whole = 0 if self.decoder is None else 1  # views whose tokens the decoder wants
        cls, tokens = self.student.encode(clip, masks[first : len(masks) - 1 + whole], whole)
        if self.head is not None and self.teacher_head is not None and self.centre is not None:
            with torch.no_grad():
                teacher_cls, _ = self.teacher.encode(clip, teacher_mask)  # (B, d)
                out.video_teacher_logits = self.teacher_head(teacher_cls)  # (B, K_h)
            student_cls = cls[: len(masks) - 1]  # (V, B, d)
            out.video_logits = self.head(student_cls)  # (V, B, K_h)
            out.video_centre = self.centre.mean
            out.video_cls = torch.cat((student_cls, teacher_cls[None]))
        if self.decoder is not None:
            out.global_mask = boolean_mask(masks[-1], self.student.num_tokens)
            self._decode(clip, self.decoder(tokens[-1], masks[-1]), target_tokens, out)
        return out

    def _decode(
        self, clip: Tensor, z_v: Tensor, target_tokens: Tensor | None, out: DiscovrOutput
    ) -> None:
        """Prototype scores and pixels of the completed view z_v (B, N, d)."""
        if self.prototypes is not None:
            if self.pixel_projection is not None:
                pixels = standardise(self.student.patchify(clip), -1)
                target_tokens = self.pixel_projection(pixels)
            assert target_tokens is not None, "the image branch gave no target"
            prototypes = F.normalize(self.prototypes, dim=-1)  # (K, d)
            out.video_scores = F.normalize(z_v, dim=-1) @ prototypes.T  # (B, N, K)
            out.target_scores = F.normalize(target_tokens, dim=-1) @ prototypes.T
        if self.pixel_head is not None:
            out.pixels = self.pixel_head(z_v)  # (B, N, P)
            out.pixel_targets = self.student.patchify(clip)
