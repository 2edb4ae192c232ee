"""The pretraining step written plainly: what benchmarks/speed/train_step.py compares ours with.

It differs from :class:`Discovr` and its trainer in these points only:

1. attention is softmax(q k^T / sqrt(d)) v with the whole matrix of weights, not torch's fused one;
2. each masked view is a call of the encoder by itself, not all views in one batch;
3. the encoder embeds every token, then keeps the visible ones;
4. the image teacher runs twice: once for its own loss, once for the cluster distillation;
5. teachers are averaged and parameters optimised one tensor at a time (foreach and fused off);
6. the last block of an encoder computes every token, also where nothing but CLS is read;
7. both branches run forward before one backward pass takes all gradients.

Norms, MLPs, GELU, heads, decoder's order, losses, Sinkhorn, masks, precision and the rest of the
trainer are the very same operations and parameters, so both must give the same loss and the same
gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, standardise
from discovr_monai.networks.image_branch import frames_of
from discovr_monai.networks.masking import boolean_mask, visible_indices
from discovr_monai.networks.vit import Attention, Block, VisionTransformer
from discovr_monai.training.trainer import DiscovrTrainer


def plain_attention(attention: Attention, x: Tensor) -> Tensor:
    """(B, n, d) -> (B, n, d), every weight of the softmax in memory."""
    batch, n, dim = x.shape
    qkv = F.linear(x, attention.qkv.weight, attention.qkv_bias)  # (B, n, 3 d)
    qkv = qkv.view(batch, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # each (B, heads, n, d / heads)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, n, n)
    x = weights.softmax(-1) @ v
    return attention.proj(x.transpose(1, 2).reshape(batch, n, dim))


def plain_block(block: Block, x: Tensor) -> Tensor:
    """(B, n, d) -> (B, n, d)."""
    x = x + plain_attention(block.attn, block.norm1(x))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def plain_encoder(encoder: VisionTransformer, clip: Tensor, mask: Tensor | None = None) -> Tensor:
    """One clip each, or one masked view of it.

    Args:
        clip: (B, 3, T, H, W).
        mask: (B, n), positions of its visible tokens.

    Returns:
        (B, 1 + n, d): CLS and the visible tokens (all without a mask).
    """
    assert encoder.cls_token is not None  # the paper's encoders have one
    x = encoder.patch_embed(encoder.patchify(clip)) + encoder.pos_embed[:, 1:]  # (B, N, d)
    if mask is not None:
        keep = visible_indices(mask)  # (B, n)
        x = x[torch.arange(len(x), device=x.device)[:, None], keep]  # (B, n, d)
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).to(x.dtype).expand(len(x), -1, -1)
    x = torch.cat((cls, x), dim=1)  # (B, 1 + n, d)
    for block in encoder.blocks:
        x = plain_block(block, x)
    return encoder.norm(x)


def plain_decoder(decoder: Decoder, tokens: Tensor, mask: Tensor) -> Tensor:
    """(B, 1 + n, d_v) and the visible tokens' positions (B, n) -> (B, N, out), raster order."""
    visible = decoder.embed(tokens[:, 1:])  # (B, n, d)
    x = decoder.mask_token.to(visible.dtype).expand(len(mask), decoder.pos_embed.shape[1], -1)
    keep = visible_indices(mask)[..., None].expand_as(visible)
    x = x.scatter(1, keep, visible) + decoder.pos_embed  # (B, N, d)
    for block in decoder.blocks:
        x = plain_block(block, x)
    return decoder.head(decoder.norm(x))


class PlainDiscovr(Discovr):
    """The whole method (all three terms), plainly; parameters and names are Discovr's."""

    def forward(
        self,
        clip: Tensor,
        video_masks: Tensor,
        image_masks: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> DiscovrOutput:
        """As :meth:`Discovr.forward`."""
        assert image_masks is not None
        image = self._plain_image(clip, image_masks)
        return image.joined(self._plain_video(clip, video_masks, teacher_mask, image.target_tokens))

    def _plain_image(self, clip: Tensor, masks: Tensor) -> DiscovrOutput:
        branch, out = self.image, DiscovrOutput()
        assert branch is not None and branch.centre is not None
        assert branch.head is not None and branch.teacher_head is not None
        frames = frames_of(clip, branch.student_frames)  # (B * F, 3, 1, H, W)
        with torch.no_grad():
            teacher_cls = plain_encoder(branch.teacher, frames)[:, 0]  # (B * F, d)
            out.image_teacher_logits = branch.teacher_head(teacher_cls)
            again = plain_encoder(branch.teacher, frames_of(clip, branch.teacher_frames))
            tokens = again.unflatten(0, (len(clip), -1))  # (B, F_t, 1 + n, d)
            rows = [branch.teacher_frames.index(f) for f in branch.target_frames]
            out.target_tokens = standardise(tokens[:, rows, 1:], -2).flatten(1, 2)  # (B, N, d)
        views = [plain_encoder(branch.student, frames, mask) for mask in masks]
        student_cls = torch.stack([view[:, 0] for view in views])  # (V, B * F, d)
        out.image_logits = branch.head(student_cls)
        out.image_cls = torch.cat((student_cls, teacher_cls[None]))
        out.image_centre = branch.centre.mean
        return out

    def _plain_video(
        self, clip: Tensor, masks: Tensor, teacher_mask: Tensor | None, z_i: Tensor | None
    ) -> DiscovrOutput:
        branch, out = self.video, DiscovrOutput()
        assert branch.centre is not None and branch.decoder is not None and z_i is not None
        assert branch.head is not None and branch.teacher_head is not None
        assert branch.prototypes is not None
        with torch.no_grad():
            teacher_cls = plain_encoder(branch.teacher, clip, teacher_mask)[:, 0]  # (B, d)
            out.video_teacher_logits = branch.teacher_head(teacher_cls)
        views = [plain_encoder(branch.student, clip, mask) for mask in masks]
        student_cls = torch.stack([view[:, 0] for view in views[:-1]])  # (V, B, d)
        out.video_logits = branch.head(student_cls)
        out.video_cls = torch.cat((student_cls, teacher_cls[None]))
        out.video_centre = branch.centre.mean
        out.global_mask = boolean_mask(masks[-1], branch.student.num_tokens)
        z_v = plain_decoder(branch.decoder, views[-1], masks[-1])  # (B, N, d)
        prototypes = F.normalize(branch.prototypes, dim=-1)  # (K, d)
        out.video_scores = F.normalize(z_v, dim=-1) @ prototypes.T  # (B, N, K)
        out.target_scores = F.normalize(z_i, dim=-1) @ prototypes.T
        return out

    @torch.no_grad()
    def update_teachers(
        self,
        momentum: float,
        video_logits: Tensor | None = None,
        image_logits: Tensor | None = None,
    ) -> None:
        """As :meth:`Discovr.update_teachers`, one tensor at a time."""
        for branch, logits in ((self.video, video_logits), (self.image, image_logits)):
            assert branch is not None and branch.centre is not None and logits is not None
            for teacher, student in (
                (branch.teacher, branch.student),
                (branch.teacher_head, branch.head),
            ):
                assert isinstance(teacher, nn.Module) and isinstance(student, nn.Module)
                for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                    t.lerp_(s, 1.0 - momentum)
            branch.centre.update(logits)


class PlainTrainer(DiscovrTrainer):
    """Waits with the image branch until the video branch's turn, then takes one backward."""

    def _forward(self, branch: str, clip: Tensor, *inputs: Tensor | None) -> DiscovrOutput:
        if branch == "image":
            (self._image_masks,) = inputs
            return DiscovrOutput()
        video_masks, teacher_mask, _ = inputs
        with self._autocast(clip):
            return self.network(clip, video_masks, self._image_masks, teacher_mask)

    def _backward(
        self, output: DiscovrOutput, step: int, group: int, branch: str | None
    ) -> dict[str, Tensor]:
        return {} if branch == "image" else super()._backward(output, step, group, None)  # type: ignore[arg-type]


def unfuse(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimiser step one tensor at a time."""
    for group in optimizer.param_groups:
        group["foreach"] = group["fused"] = False
