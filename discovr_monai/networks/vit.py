"""One vision transformer for both branches: the image branch is a tubelet of one frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from discovr_monai.networks.masking import visible_indices

SHORT = 256  # tokens; the paper's masked views have 6 and 161


def sincos_positions(length: int, dim: int) -> Tensor:
    """The 1-D sin-cos table: sin on even columns, cos on odd ones.

    The angle of column j at position n is n / 10000^(2 floor(j / 2) / dim).

    Returns:
        (length, dim) float32, computed in float64.

    >>> sincos_positions(2, 2)
    tensor([[0.0000, 1.0000],
            [0.8415, 0.5403]])
    """
    column = torch.arange(dim, dtype=torch.float64)
    position = torch.arange(length, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (2 * (column // 2) / dim)  # (length, dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on torch's fused kernel; (B, heads, n, d / heads) each.

    In short sequences that train, torch's bf16 kernel for CPUs takes longer than the formula
    written out, which docs/performance.md has figures of.
    """
    short = q.requires_grad and k.shape[-2] <= SHORT
    if short and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, n, n)
        return weights.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention; the key has no bias.

    Args:
        dim: width.
        num_heads: heads; must divide ``dim``.
        qv_bias: whether queries and values have one (the released video encoders do).
    """

    def __init__(self, dim: int, num_heads: int, *, qv_bias: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by the number of heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qv_bias else None
        self.proj = nn.Linear(dim, dim)

    @property
    def qkv_bias(self) -> Tensor | None:
        """(3 d), zero for the keys."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """(B, n, d) -> (B, n, d), or with ``cls_only`` (B, 1, d): what CLS gathers."""
        batch, n, dim = x.shape
        if cls_only:
            return self._cls(x)
        qkv = F.linear(x, self.qkv.weight, self.qkv_bias)  # (B, n, 3 d)
        qkv = qkv.view(batch, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (B, heads, n, d / heads)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, n, dim))

    def _cls(self, x: Tensor) -> Tensor:
        dim, bias, weight = x.shape[-1], self.qkv_bias, self.qkv.weight
        q_bias, kv_bias = (None, None) if bias is None else bias.split((dim, 2 * dim))
        q = F.linear(x[:, :1], weight[:dim], q_bias)  # (B, 1, d)
        kv = F.linear(x, weight[dim:], kv_bias)  # (B, n, 2 d)
        q = q.unflatten(-1, (1, self.num_heads, -1)).permute(2, 0, 3, 1, 4)[0]
        k, v = kv.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block.

    Attributes:
        recompute: in training, save only the block's input and run it again in backward: less
            memory, the same result. Hooks inside the block then fire twice.
    """

    recompute = False

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, *, qv_bias: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qv_bias=qv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """One layer.

        Args:
            x: (B, n, d), CLS first.
            cls_only: compute CLS's row only; for the last block, where nothing else is read.

        Returns:
            (B, n, d), or (B, 1, d).
        """
        if self.recompute and torch.is_grad_enabled():  # nothing in it is random
            return checkpoint(self._run, x, cls_only, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, cls_only)

    def _run(self, x: Tensor, cls_only: bool) -> Tensor:
        x = (x[:, :1] if cls_only else x) + self.attn(self.norm1(x), cls_only)
        return x + self.mlp(self.norm2(x))


def init_weights(module: nn.Module) -> None:
    """Truncated normal (0.02) linear weights, zero biases; apply with ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class VisionTransformer(nn.Module):
    """ViT over tubelets of a clip, with a CLS token and fixed positions (sin-cos, unless loaded).

    Masked mode embeds and processes the visible tokens only (paper section 3.1).

    Args:
        image_size: frame height and width in pixels, divisible by ``patch_size``.
        num_frames: frames of a clip, divisible by ``tubelet_size``; 1 for the image branch.
        patch_size: p, pixels.
        tubelet_size: frames per token; 1 for the image branch.
        embed_dim, depth, num_heads, mlp_ratio: the transformer's shape.
        qv_bias: bias on queries and values.
        norm_eps: LayerNorm's epsilon (released models: video 1e-6, image 1e-5).
        cls_token: False for encoders that have none (VideoMAE, SIGMA): no CLS takes part in
            attention, the positions have no slot for it, and the output's first row is the mean
            of the final tokens instead.

    Raises:
        ValueError: if a size does not divide, with the value and the nearest that does.
    """

    def __init__(
        self,
        *,
        image_size: int = 112,
        num_frames: int = 64,
        patch_size: int = 16,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qv_bias: bool = True,
        norm_eps: float = 1e-6,
        cls_token: bool = True,
    ) -> None:
        super().__init__()
        _check_divides("image_size", image_size, "patch_size", patch_size)
        _check_divides("num_frames", num_frames, "tubelet_size", tubelet_size)
        side = image_size // patch_size
        self.grid = (num_frames // tubelet_size, side, side)
        self.clip_shape = (3, num_frames, image_size, image_size)
        self.patch_size, self.tubelet_size, self.embed_dim = patch_size, tubelet_size, embed_dim
        self.settings = {  # what builds this encoder again; checkpoints carry it
            "image_size": image_size,
            "num_frames": num_frames,
            "patch_size": patch_size,
            "tubelet_size": tubelet_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qv_bias": qv_bias,
            "norm_eps": norm_eps,
            "cls_token": cls_token,
        }
        tokens = self.grid[0] * side * side
        self.patch_embed = nn.Linear(3 * tubelet_size * patch_size**2, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if cls_token else None
        positions = sincos_positions(tokens, embed_dim)
        if cls_token:
            positions = torch.cat((torch.zeros(1, embed_dim), positions))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", positions[None])  # (1, 1 + N, d), CLS slot zero
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qv_bias=qv_bias, norm_eps=norm_eps)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.apply(init_weights)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    @property
    def num_tokens(self) -> int:
        """N, without CLS."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def patchify(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, N, 3 * tubelet * p * p), tokens raster (t, h, w)."""
        if tuple(clip.shape[1:]) != self.clip_shape:
            raise ValueError(
                f"the encoder was built for clips (B, {', '.join(map(str, self.clip_shape))}) but "
                f"got {tuple(clip.shape)}: set image_size and num_frames to the data's, or resize"
            )
        (t, h, w), u, p = self.grid, self.tubelet_size, self.patch_size
        x = clip.reshape(-1, 3, t, u, h, p, w, p)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(clip.shape[0], t * h * w, -1)

    def forward(self, clip: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encodes a clip, or masked views of it.

        Args:
            clip: (B, 3, T, H, W), normalised.
            mask: (..., B, N) bool, True = masked, every row hiding equally many tokens; or the
                positions of the visible tokens (see :func:`visible_indices`). Leading dimensions
                are views, which all go through in one batch.

        Returns:
            (B, 1 + N, d) without a mask, else (..., B, 1 + n_visible, d): CLS first (without
            one, the mean of the rest), then the visible tokens in raster order, after the
            final norm.
        """
        x, views = self._embed(clip, mask)
        for block in self.blocks:
            x = block(x)
        return self._with_cls(self.norm(x)).unflatten(0, views)

    def encode(
        self, clip: Tensor, mask: Tensor | None = None, whole: int = 0
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, where only some views need more than their CLS.

        For the other views, the last block computes CLS alone: a quarter of an encoder of four
        layers is its last block.

        Args:
            clip, mask: as in forward.
            whole: number of trailing views (without a mask: clips) whose tokens are returned.

        Returns:
            CLS (..., B, d) of all views, and (whole, ..., 1 + n, d); the values are forward's.

        Raises:
            ValueError: if there are fewer views than ``whole``.
        """
        number = len(clip if mask is None else mask)
        if not 0 <= whole <= number:
            raise ValueError(f"whole {whole} must lie in [0, {number}], the number of views")
        derived = type(self).forward is not VisionTransformer.forward  # somebody's own is to run
        if whole == number or derived or self.cls_token is None or not len(self.blocks):
            x = self(clip, mask)  # without a CLS token, a mean needs all tokens
            return x[..., 0, :], x[number - whole :]
        x, views = self._embed(clip, mask)
        for block in self.blocks[:-1]:
            x = block(x)
        x = x.unflatten(0, views)  # (views, ..., 1 + n, d)
        cls_only, full = x[: number - whole].flatten(0, -3), x[number - whole :].flatten(0, -3)
        cls = self.norm(self.blocks[-1](cls_only, cls_only=True))[:, 0]  # (rows, d)
        if not whole:
            return cls.unflatten(0, views), x[number:]
        tokens = self.norm(self.blocks[-1](full))  # (rows, 1 + n, d)
        cls = torch.cat((cls, tokens[:, 0])).unflatten(0, views)
        return cls, tokens.unflatten(0, (whole, *views[1:]))

    def _embed(self, clip: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
        """Tokens before the first block, (views * B, 1 + n, d), and the shape (views, B)."""
        patches = self.patchify(clip)  # (B, N, P)
        positions = self.pos_embed[:, -self.num_tokens :]  # (1, N, d)
        views: tuple[int, ...] = patches.shape[:1]
        if mask is not None:
            fits = mask.shape[-2] == len(patches)
            if not fits or (mask.dtype == torch.bool and mask.shape[-1] != patches.shape[1]):
                raise ValueError(
                    f"mask {tuple(mask.shape)} does not fit {tuple(patches.shape[:2])} "
                    "(clips, tokens)"
                )
            keep = visible_indices(mask)  # (..., B, n)
            views = tuple(keep.shape[:-1])
            row = torch.arange(len(patches), device=clip.device)[:, None]
            patches = patches[row, keep].flatten(0, -3)  # (views * B, n, P)
            positions = positions[0, keep].flatten(0, -3)  # (views * B, n, d)
        x = self.patch_embed(patches) + positions
        if self.cls_token is not None:
            cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat((cls, x), dim=1)  # (views * B, 1 + n, d)
        return x, views

    def _with_cls(self, x: Tensor) -> Tensor:
        """(rows, n, d) -> (rows, 1 + n, d): the mean in front where there is no CLS token."""
        if self.cls_token is None:
            x = torch.cat((x.mean(1, keepdim=True), x), dim=1)
        return x


def _check_divides(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value < 1 or divisor < 1:
        raise ValueError(f"{name} {value} and {divisor_name} {divisor} must be at least 1")
    if value % divisor:
        nearest = max(divisor, round(value / divisor) * divisor)
        raise ValueError(
            f"{name} {value} is not divisible by {divisor_name} {divisor}: "
            f"use {name} {nearest} or another {divisor_name}"
        )
