"""The whole method in one network: an image branch and a video branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.image_branch import ImageBranch
from discovr_monai.networks.video_branch import VideoBranch
from discovr_monai.networks.vit import VisionTransformer

# Names of the parts in files, in their order there: checkpoints keep the names and the order of
# parameters that they had before the branches became modules.
PARTS = {
    "prototypes": "video.prototypes",
    "video_centre": "video.centre.mean",
    "image_centre": "image.centre.mean",
    "video_student": "video.student",
    "video_head": "video.head",
    "video_teacher": "video.teacher",
    "image_student": "image.student",
    "image_head": "image.head",
    "image_teacher": "image.teacher",
    "video_teacher_head": "video.teacher_head",
    "image_teacher_head": "image.teacher_head",
    "decoder": "video.decoder",
    "pixel_projection": "video.pixel_projection",
    "pixel_head": "video.pixel_head",
}


class Discovr(nn.Module):
    """DISCOVR (arXiv 2506.11777, section 3). A part that is None is not built.

    A training step calls the branches one after the other, each with its own backward; calling the
    network calls both. Names in the state dict are those of PARTS.

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

    Attributes:
        video, image: the branches; image is None without one.
        branches: the same by name, as they are to be called: DistributedDataParallel puts itself
            around them here (see :func:`~discovr_monai.networks.parallel.parallel`).

    Raises:
        ValueError: for parts that do not fit together.
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
        is_target = decoder is not None and num_prototypes > 0 and target == "image"
        self.video = VideoBranch(
            video,
            video_head,
            decoder,
            num_prototypes=num_prototypes,
            target=target,
            reconstruct=reconstruct,
            centre_momentum=centre_momentum,
        )
        self.image: ImageBranch | None = None
        if image is not None:
            self.image = ImageBranch(
                image,
                image_head,
                num_frames=video.clip_shape[1],
                frame_step=image_frame_step,
                target_step=video.tubelet_size if is_target else 0,
                centre_momentum=centre_momentum,
            )
        self.branches: dict[str, nn.Module] = {"video": self.video}
        if self.image is not None and self.image.teacher_frames:
            self.branches["image"] = self.image
        self.register_state_dict_post_hook(_to_file_names)
        self.register_load_state_dict_pre_hook(_from_file_names)

    def train(self, mode: bool = True) -> Discovr:
        """Students follow ``mode``; teachers stay in evaluation."""
        super().train(mode)
        for branch in (self.video, self.image):
            if branch is not None:
                branch.teacher.eval()
        return self

    @property
    def trained_fields(self) -> list[str]:
        """Fields of the output that some part of this network can only learn from."""
        parts = {
            "video_logits": self.video.head,
            "image_logits": None if self.image is None else self.image.head,
            "video_scores": self.video.prototypes,
            "pixels": self.video.pixel_head,
        }
        return [name for name, part in parts.items() if part is not None]

    def forward(
        self,
        clip: Tensor,
        video_masks: Tensor,
        image_masks: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> DiscovrOutput:
        """Both branches: every term's inputs, nothing updated.

        Args:
            clip: (B, 3, T, H, W), normalised.
            video_masks: (V + 1, B, N) bool, True = masked, or visible positions (see
                :func:`~discovr_monai.networks.masking.visible_indices`); the last is the global
                view.
            image_masks: (V, B * F, n) likewise, for the F frames of ``image.student_frames``.
            teacher_mask: (B, N) likewise, for the video teacher; None shows it everything.
        """
        image = DiscovrOutput()
        if "image" in self.branches:
            image = self.branches["image"](clip, image_masks)
        video = self.branches["video"](clip, video_masks, teacher_mask, image.target_tokens)
        return image.joined(video)

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
        self.video.update_teacher(momentum, video_logits)
        if self.image is not None:
            self.image.update_teacher(momentum, image_logits)


def _file_name(name: str) -> str:
    """Name of a tensor in files: "image.student.norm.bias" -> "image_student.norm.bias"."""
    for part, inner in PARTS.items():
        if name == inner or name.startswith(f"{inner}."):
            return part + name.removeprefix(inner)
    return name


def _to_file_names(
    network: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    order = list(PARTS)
    names = {_file_name(n.removeprefix(prefix)): n for n in list(state) if n.startswith(prefix)}
    for name in sorted(names, key=lambda n: order.index(n.partition(".")[0])):
        state[prefix + name] = state.pop(names[name])


def _from_file_names(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [n for n in state if n.startswith(prefix)]:
        part, dot, rest = name.removeprefix(prefix).partition(".")
        if part in PARTS:
            state[f"{prefix}{PARTS[part]}{dot}{rest}"] = state.pop(name)


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
