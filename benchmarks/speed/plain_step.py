"""The pretraining step written plainly: what benchmarks/speed/train_step.py compares ours with.

It differs from :class:`Discovr` and its trainer in these points only:

1. attention is softmax(q k^T / sqrt(d)) v with the whole matrix of weights, not torch's fused one;
2. each masked view is a call of the encoder by itself, not all views in one batch;
3. the encoder embeds every token, then keeps the visible ones;
4. the image teacher runs twice: once for its own loss, once for the cluster distillation;
5. teachers are averaged and parameters optimised one tensor at a time (foreach and fused off);
6. the last block of an encoder computes every token, also where nothing but CLS is read;
7. what backward needs is what autograd keeps, to the end of the forward;
8. biases and residuals are added as torch's own layers and sums do it.

Norms, MLPs, GELU, heads, decoder's order, losses, Sinkhorn, masks, precision and trainer are the
very same operations and parameters, so both must give the same loss and the same gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.base.types import DiscovrOutput
from discovr_monai.networks.discovr import Discovr, _frames
from discovr_monai.networks.heads import Decoder
from discovr_monai.networks.masking import visible_indices
from discovr_monai.networks.vit import Attention, Block, VisionTransformer


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
        mask: (B, N) bool, True = masked.

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
    """(B, 1 + n, d_v) and (B, N) -> (B, N, out), raster order."""
    visible = decoder.embed(tokens[:, 1:])  # (B, n, d)
    x = decoder.mask_token.to(visible.dtype).expand(*mask.shape, -1)
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
        image_loss: object = None,
    ) -> DiscovrOutput:
        """As :meth:`Discovr.forward`; the image branch's backward comes with all others."""
        image, image_teacher, decoder = self.image_student, self.image_teacher, self.decoder
        assert image is not None and image_teacher is not None and decoder is not None
        assert image_masks is not None and self.prototypes is not None
        assert self.video_head is not None and self.video_teacher_head is not None
        assert self.image_head is not None and self.image_teacher_head is not None
        out = DiscovrOutput(global_mask=video_masks[-1])
        frames = _frames(clip, self.student_frames)  # (B * F, 3, 1, H, W)

        with torch.no_grad():
            teacher_cls = plain_encoder(self.video_teacher, clip, teacher_mask)[:, 0]  # (B, d)
            out.video_teacher_logits = self.video_teacher_head(teacher_cls)
        views = [plain_encoder(self.video_student, clip, mask) for mask in video_masks]
        student_cls = torch.stack([view[:, 0] for view in views[:-1]])  # (V, B, d)
        out.video_logits = self.video_head(student_cls)
        out.video_cls = torch.cat((student_cls, teacher_cls[None]))
        out.video_centre = self.video_centre

        with torch.no_grad():
            teacher_cls = plain_encoder(image_teacher, frames)[:, 0]  # (B * F, d)
            out.image_teacher_logits = self.image_teacher_head(teacher_cls)
        image_views = [plain_encoder(image, frames, mask) for mask in image_masks]
        student_cls = torch.stack([view[:, 0] for view in image_views])  # (V, B * F, d)
        out.image_logits = self.image_head(student_cls)
        out.image_cls = torch.cat((student_cls, teacher_cls[None]))
        out.image_centre = self.image_centre

        with torch.no_grad():
            again = _frames(clip, self.teacher_frames)
            tokens = plain_encoder(image_teacher, again)  # (B * F_t, 1 + n, d)
            tokens = tokens.unflatten(0, (len(clip), len(self.teacher_frames)))
            tokens = tokens[:, [self.teacher_frames.index(f) for f in self.target_frames]]
        z_v = plain_decoder(decoder, views[-1], video_masks[-1])  # (B, N, d)
        z_i = self._cluster_target(clip, tokens)  # (B, N, d)
        prototypes = F.normalize(self.prototypes, dim=-1)  # (K, d)
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
        for teacher, student in (
            (self.video_teacher, self.video_student),
            (self.video_teacher_head, self.video_head),
            (self.image_teacher, self.image_student),
            (self.image_teacher_head, self.image_head),
        ):
            assert isinstance(teacher, nn.Module) and isinstance(student, nn.Module)
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.lerp_(s, 1.0 - momentum)
        for centre, logits in (
            (self.video_centre, video_logits),
            (self.image_centre, image_logits),
        ):
            assert centre is not None and logits is not None
            mean = logits.to(centre.dtype).mean(0, keepdim=True)  # (1, K)
            centre.lerp_(mean, 1 - self.centre_momentum)


def unfuse(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimiser step one tensor at a time."""
    for group in optimizer.param_groups:
        group["foreach"] = group["fused"] = False
