"""The whole method in one network: two students, two teachers, decoder and prototypes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.base.distributed import all_reduce_mean
from discovr_monai.base.types import DiscovrOutput
from discovr_monai.networks.early import early_backward
from discovr_monai.networks.ema import ema_update, make_teacher
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.vit import VisionTransformer


class Discovr(nn.Module):
    """DISCOVR (arXiv 2506.11777, section 3). A branch that is None is not built.

    Args:
        video: the video student; its EMA teacher is what evaluation uses.
        video_head: projection head of the video branch, None without video distillation.
        image: the image student (tubelet 1), None without an image branch.
        image_head: likewise; None leaves the image branch as it is (a frozen target).
        decoder: completes the global view, None without clustering or reconstruction.
        num_prototypes: K; 0 without clustering.
        target: what the decoder's output is clustered with: "image" (the image teacher's
            patch tokens: DISCOVR's SCD) or "pixels" (a learned projection of each tubelet's
            pixels: SIGMA).
        reconstruct: adds a linear layer from the decoder's output to a tubelet's pixels.
        image_frame_step: the image students see every n-th frame (1 in the paper).
        centre_momentum: EMA momentum of the centres of the teachers' logits.
    """

    def __init__(
        self,
        *,
        video: VisionTransformer,
        video_head: ProjectionHead | None = None,
        image: VisionTransformer | None = None,
        image_head: ProjectionHead | None = None,
        decoder: Decoder | None = None,
        num_prototypes: int = 0,
        target: str = "image",
        reconstruct: bool = False,
        image_frame_step: int = 1,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        _check_parts(video, image, decoder, num_prototypes, target, reconstruct, image_frame_step)
        self.target, self.image_frame_step = target, image_frame_step
        self.centre_momentum = centre_momentum
        self.video_student, self.video_head = video, video_head
        self.video_teacher = make_teacher(video)
        self.image_student, self.image_head = image, image_head
        self.image_teacher = None if image is None else make_teacher(image)
        self.video_teacher_head = None if video_head is None else make_teacher(video_head)
        self.image_teacher_head = None if image_head is None else make_teacher(image_head)
        self.video_centre: Tensor | None
        self.image_centre: Tensor | None
        for name, head in (("video_centre", video_head), ("image_centre", image_head)):
            outputs = 0 if head is None else head.last_layer.weight_v.shape[0]
            self.register_buffer(name, torch.zeros(1, outputs) if outputs else None)
        if image is not None and image_head is None:
            image.requires_grad_(False)
        if video_head is None and decoder is None:
            video.requires_grad_(False)
        self.decoder = decoder
        self.prototypes: nn.Parameter | None = None
        self.pixel_projection: nn.Module | None = None
        self.pixel_head: nn.Module | None = None
        tubelet_pixels = video.patch_embed.in_features
        if decoder is not None and num_prototypes:
            width = decoder.head.out_features
            self.prototypes = nn.Parameter(F.normalize(torch.randn(num_prototypes, width), dim=-1))
            if target == "pixels":
                self.pixel_projection = nn.Sequential(
                    nn.Linear(tubelet_pixels, width), nn.GELU(), nn.Linear(width, width)
                )
        if decoder is not None and reconstruct:
            self.pixel_head = nn.Linear(decoder.head.out_features, tubelet_pixels)

    def train(self, mode: bool = True) -> Discovr:
        """Students follow ``mode``; teachers stay in evaluation."""
        super().train(mode)
        for teacher in (self.video_teacher, self.image_teacher):
            if teacher is not None:
                teacher.eval()
        return self

    @property
    def trained(self) -> dict[str, str]:
        """Field of the output that takes a gradient back -> the config key of its part."""
        parts = {
            "video_logits": ("video_head_def", self.video_head),
            "image_logits": ("image_head_def", self.image_head),
            "video_scores": ("network_def#num_prototypes", self.prototypes),
            "pixels": ("network_def#reconstruct", self.pixel_head),
        }
        return {field: key for field, (key, part) in parts.items() if part is not None}

    @property
    def student_frames(self) -> list[int]:
        """Frames of a clip that the image students see."""
        frames = self.video_student.clip_shape[1]
        return list(range(0, frames, self.image_frame_step)) if self.image_head else []

    @property
    def target_frames(self) -> list[int]:
        """Frames whose tokens are SCD's target: the first of each tubelet."""
        if self.prototypes is None or self.target != "image":
            return []
        return list(range(0, self.video_student.clip_shape[1], self.video_student.tubelet_size))

    @property
    def teacher_frames(self) -> list[int]:
        """Frames that the image teacher sees: the students' and SCD's."""
        return sorted({*self.student_frames, *self.target_frames})

    def forward(
        self,
        clip: Tensor,
        video_masks: Tensor,
        image_masks: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        image_loss: Callable[[DiscovrOutput], Tensor] | None = None,
    ) -> DiscovrOutput:
        """One training pass: every term's inputs, nothing updated.

        Args:
            clip: (B, 3, T, H, W), normalised.
            video_masks: (V + 1, B, N) bool, True = masked; the last is the global view.
            image_masks: (V, B * F, n) bool for the F frames of ``student_frames``.
            teacher_mask: (B, N) bool, True = not shown to the video teacher; None shows it all.
            image_loss: the one thing that the image students are trained by, a scalar of the
                output's image fields. The image branch then has its backward here, before the
                video branch begins, and most of the memory of the larger of the two is enough.

        Returns:
            See :class:`DiscovrOutput`.
        """
        out = DiscovrOutput(global_mask=video_masks[-1])
        target, early = self._image(clip, image_masks, image_loss, out)
        view = self._video(clip, video_masks, teacher_mask, out)  # (B, 1 + n, d)
        if self.decoder is not None and view is not None:
            z_v = self.decoder(view, video_masks[-1])  # (B, N, d)
            if self.prototypes is not None:
                z_i = self._cluster_target(clip, target)  # (B, N, d)
                prototypes = F.normalize(self.prototypes, dim=-1)  # (K, d)
                out.video_scores = F.normalize(z_v, dim=-1) @ prototypes.T  # (B, N, K)
                out.target_scores = F.normalize(z_i, dim=-1) @ prototypes.T
            if self.pixel_head is not None:
                out.pixels = self.pixel_head(z_v)  # (B, N, P)
                out.pixel_targets = self.video_student.patchify(clip)
        if early is not None:
            out.image_loss = early()  # here, so that in backward it comes first
        return out

    def _video(
        self, clip: Tensor, masks: Tensor, teacher_mask: Tensor | None, out: DiscovrOutput
    ) -> Tensor | None:
        """Video branch; returns the global view's tokens (B, 1 + n, d) for the decoder."""
        if self.video_head is None and self.decoder is None:
            return None  # the image branch alone trains
        first = 0 if self.video_head is not None else len(masks) - 1
        whole = 1 if self.decoder is not None else 0
        views = masks[first : len(masks) - 1 + whole]
        cls, tokens = self.video_student.encode(clip, views, whole)
        if self.video_head is not None and self.video_teacher_head is not None:
            with torch.no_grad():
                teacher_cls, _ = self.video_teacher.encode(clip, teacher_mask)  # (B, d)
                out.video_teacher_logits = self.video_teacher_head(teacher_cls)
            student_cls = cls[: len(masks) - 1]  # (V, B, d)
            out.video_logits = self.video_head(student_cls)
            out.video_cls = torch.cat((student_cls, teacher_cls[None]))
            out.video_centre = self.video_centre
        return tokens[-1] if whole else None

    def _image(
        self,
        clip: Tensor,
        masks: Tensor | None,
        loss: Callable[[DiscovrOutput], Tensor] | None,
        out: DiscovrOutput,
    ) -> tuple[Tensor | None, Callable[[], Tensor] | None]:
        """Image branch.

        Returns:
            The teacher's tokens of ``target_frames``, (B, t, 1 + n, d); and what gives the
            loss whose backward is done.
        """
        frames, early = self.teacher_frames, None
        if self.image_student is None or self.image_teacher is None or not frames:
            return None, None
        target = self.target_frames
        order = [f for f in frames if f not in target] + target  # those that stay whole last
        images = clip[:, :, order].movedim(2, 0).flatten(0, 1).unsqueeze(2)  # (F_t * B, 3, 1, H, W)
        with torch.no_grad():
            teacher_cls, tokens = self.image_teacher.encode(images, whole=len(target) * len(clip))
        if self.image_head is not None and self.image_teacher_head is not None:
            if masks is None:
                raise ValueError("the image branch is on, but no image_masks were given")
            rows = [order.index(f) for f in self.student_frames]
            with torch.no_grad():
                teacher_cls = teacher_cls.unflatten(0, (len(order), len(clip)))[rows]  # (F, B, d)
                teacher_cls = teacher_cls.transpose(0, 1).flatten(0, 1)  # (B * F, d)
                out.image_teacher_logits = self.image_teacher_head(teacher_cls)
            out.image_centre = self.image_centre
            early = self._image_students(clip, masks, loss, teacher_cls, out)
        return tokens.unflatten(0, (len(target), len(clip))).transpose(0, 1), early

    def _image_students(
        self,
        clip: Tensor,
        masks: Tensor,
        loss: Callable[[DiscovrOutput], Tensor] | None,
        teacher_cls: Tensor,
        out: DiscovrOutput,
    ) -> Callable[[], Tensor] | None:
        student, head = self.image_student, self.image_head
        assert student is not None and head is not None

        def run() -> None:
            cls, _ = student.encode(_frames(clip, self.student_frames), masks)  # (V, B * F, d)
            out.image_logits = head(cls)
            out.image_cls = torch.cat((cls, teacher_cls[None]))

        parameters = (*student.parameters(), *head.parameters())
        hooked = any(p._backward_hooks for p in parameters)
        if loss is None or hooked or not torch.is_grad_enabled():
            run()
            return None

        def run_to_loss() -> Tensor:
            run()
            with torch.autocast(clip.device.type, enabled=False):  # as the other terms
                return loss(out)

        early = early_backward(run_to_loss, parameters)
        assert out.image_logits is not None and out.image_cls is not None
        out.image_logits, out.image_cls = out.image_logits.detach(), out.image_cls.detach()
        return early

    def _cluster_target(self, clip: Tensor, tokens: Tensor | None) -> Tensor:
        if self.pixel_projection is not None:
            return self.pixel_projection(_standardise(self.video_student.patchify(clip), -1))
        assert tokens is not None
        return _standardise(tokens[:, :, 1:], -2).flatten(1, 2)  # (B, N, d), raster (t, h, w)

    @torch.no_grad()
    def update_teachers(
        self,
        momentum: float,
        video_logits: Tensor | None = None,
        image_logits: Tensor | None = None,
    ) -> None:
        """EMA of the teachers and of the centres; call it after the optimiser's step.

        Args:
            momentum: teacher <- momentum * teacher + (1 - momentum) * student.
            video_logits, image_logits: (rows, K_h) teacher logits of this rank's batch; the
                centres take their mean over all ranks (logits, not probabilities: eq. 2).
        """
        ema_update(self.video_teacher, self.video_student, momentum)
        if self.video_head is not None and self.video_teacher_head is not None:
            ema_update(self.video_teacher_head, self.video_head, momentum)
        if self.image_student is not None and self.image_teacher is not None:
            ema_update(self.image_teacher, self.image_student, momentum)
        if self.image_head is not None and self.image_teacher_head is not None:
            ema_update(self.image_teacher_head, self.image_head, momentum)
        for centre, logits in (
            (self.video_centre, video_logits),
            (self.image_centre, image_logits),
        ):
            if centre is not None and logits is not None:
                mean = all_reduce_mean(logits.to(centre.dtype).mean(0, keepdim=True))  # (1, K)
                centre.lerp_(mean, 1 - self.centre_momentum)


def _frames(clip: Tensor, frames: list[int]) -> Tensor:
    """(B, 3, T, H, W) -> (B * F, 3, 1, H, W), frames flattened (b, t)."""
    return clip[:, :, frames].transpose(1, 2).flatten(0, 1).unsqueeze(2)


def _standardise(x: Tensor, dim: int) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-6)


def _check_parts(
    video: VisionTransformer,
    image: VisionTransformer | None,
    decoder: Decoder | None,
    num_prototypes: int,
    target: str,
    reconstruct: bool,
    step: int,
) -> None:
    if target not in ("image", "pixels"):
        raise ValueError(f"target {target!r} must be 'image' or 'pixels'")
    if (num_prototypes or reconstruct) and decoder is None:
        raise ValueError("prototypes and reconstruction need a decoder: configure one")
    if num_prototypes and decoder is not None and target == "image":
        if image is None:
            raise ValueError(
                "semantic cluster distillation needs an image branch, or target: pixels"
            )
        if decoder.head.out_features != image.embed_dim:
            raise ValueError(
                f"the decoder's out_dim {decoder.head.out_features} must be the image branch's "
                f"width {image.embed_dim}"
            )
    if image is None:
        return
    if image.tubelet_size != 1 or image.clip_shape[1] != 1:
        raise ValueError("the image branch needs tubelet_size 1 and num_frames 1")
    if image.grid[1:] != video.grid[1:]:
        raise ValueError(f"token grids differ: video {video.grid[1:]}, image {image.grid[1:]}")
    if not 1 <= step <= video.clip_shape[1]:
        raise ValueError(f"image_frame_step {step} must lie in [1, {video.clip_shape[1]}]")
