"""Projection head of the self-distillation, and the decoder of the global view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.base.distributed import sum_over_ranks, world_size
from discovr_monai.networks.masking import visible_indices
from discovr_monai.networks.vit import Block, init_weights, sincos_positions


def standardise(x: Tensor, dim: int) -> Tensor:
    """Zero mean and unit spread along ``dim``, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x - x.mean(dim, keepdim=True)) / (x.std(dim, keepdim=True) + 1e-6)


class BatchStandardise(nn.Module):
    """Zero mean and unit variance per feature over the global batch, without parameters.

    Always uses the batch at hand (all ranks), so student and teacher agree on what it does. The
    variance is the mean of squared differences from the mean: E[x^2] - E[x]^2 would lose a small
    spread around a large mean to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), float32 (float64 for float64)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rows, ranks = x.flatten(0, -2), world_size()  # (rows, d)
        mean = sum_over_ranks(rows.mean(0) / ranks)  # (d)
        variance = sum_over_ranks((rows - mean).square().mean(0) / ranks)
        return (x - mean) * (variance + 1e-6).rsqrt()


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have the untrained length ``weight_g``.

    Args:
        in_features, out_features: shape; ``weight_g`` (out, 1) starts at 1.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g: Tensor
        self.register_buffer("weight_g", torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        length = self.weight_v.norm(dim=1, keepdim=True).clamp_min(1e-12)  # (out, 1)
        return F.linear(x, self.weight_v * (self.weight_g / length))  # one pass, not two


class ProjectionHead(nn.Module):
    """DINO's head: MLP d-h-h-b with GELU, L2 norm, weight-normed linear to K outputs.

    Args:
        in_dim: width of the CLS token.
        out_dim: K, 16384 in the paper.
        hidden_dim, bottleneck_dim: 2048 and 256 in the paper.
        norm: "none" (the paper) or "batch": a batch norm without affine in front, which keeps
            near-equal CLS tokens of a fresh network apart (see docs/collapse.md).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 16384,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm: str = "none",
    ) -> None:
        super().__init__()
        if norm not in ("none", "batch"):
            raise ValueError(f"head norm {norm!r} must be 'none' or 'batch'")
        self.norm = BatchStandardise() if norm == "batch" else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.mlp.apply(init_weights)

    @property
    def num_outputs(self) -> int:
        """K."""
        return self.last_layer.weight_v.shape[0]

    def forward(self, cls: Tensor) -> Tensor:
        """(..., d) -> (..., K) logits (cosines scaled by ``weight_g``)."""
        x = self.mlp(self.norm(cls))
        return self.last_layer(F.normalize(x, dim=-1))


class Decoder(nn.Module):
    """Completes the masked global view: one output per tubelet token, in raster order.

    Args:
        in_dim: width of the video encoder.
        out_dim: width of the output (image-encoder width, or a tubelet's pixels).
        grid: (t, h, w) tokens.
        embed_dim, depth, num_heads: 384, 4 and 6 for ViT-B.
        mlp_ratio, qv_bias, norm_eps: as in the encoder.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        grid: tuple[int, int, int],
        embed_dim: int = 384,
        depth: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qv_bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        tokens = grid[0] * grid[1] * grid[2]
        self.embed = nn.Linear(in_dim, embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed: Tensor
        self.register_buffer(
            "pos_embed", sincos_positions(1 + tokens, embed_dim)[None, 1:], persistent=False
        )  # (1, N, d): the table over 1 + N positions without its CLS row
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qv_bias=qv_bias, norm_eps=norm_eps)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = nn.Linear(embed_dim, out_dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Decodes the visible tokens of one masked view.

        Args:
            tokens: (B, 1 + n_visible, d_v), CLS first (it is not decoded).
            mask: (B, N) bool, True = masked, or the visible positions (B, n_visible).

        Returns:
            (B, N, out_dim) in raster order (t, h, w).
        """
        visible = self.embed(tokens[:, 1:])  # (B, n, d)
        x = self.mask_token.to(visible.dtype).expand(len(mask), self.pos_embed.shape[1], -1)
        keep = visible_indices(mask)[..., None].expand_as(visible)
        x = x.scatter(1, keep, visible) + self.pos_embed  # (B, N, d)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
