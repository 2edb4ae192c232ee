"""Random weights in other people's layouts, and what they mean restated in float64 numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from scipy.special import erf

Array = np.ndarray


def draw(seed: int, *shape: int, std: float = 0.05) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def positions_1d(count: int, dim: int) -> Array:
    table = np.zeros((count, dim))
    for column in range(dim):
        angle = np.arange(count) / 10000 ** (2 * (column // 2) / dim)
        table[:, column] = np.sin(angle) if column % 2 == 0 else np.cos(angle)
    return table


def positions_2d(side: int, dim: int) -> Array:
    """MAE's: first half sines and cosines of the column, then of the row."""
    table = np.zeros((side * side, dim))
    quarter = dim // 4
    for row in range(side):
        for column in range(side):
            for j in range(quarter):
                omega = 1 / 10000 ** (j / quarter)
                values = [f(v * omega) for v in (column, row) for f in (math.sin, math.cos)]
                table[row * side + column, j::quarter] = values
    return table


def encoder(
    dim: int,
    depth: int,
    kernel: tuple[int, ...],
    bias: str = "qv",
    table: Array | None = None,
    cls: bool = True,
    scale: bool = False,
    seed: int = 0,
    mlp_ratio: int = 4,
) -> dict[str, torch.Tensor]:
    """An encoder without prefix; ``bias`` qv (q_bias, v_bias), qkv (one of 3 d) or none."""
    numbers = iter(range(seed * 100_000, (seed + 1) * 100_000))

    def some(*shape: int, std: float = 0.05, mean: float = 0.0) -> torch.Tensor:
        return draw(next(numbers), *shape, std=std) + mean

    state = {
        "patch_embed.proj.weight": some(dim, 3, *kernel),
        "patch_embed.proj.bias": some(dim),
        "norm.weight": some(dim, mean=1),
        "norm.bias": some(dim),
    }
    if cls:
        state["cls_token"] = some(1, 1, dim, std=1)
    if table is not None:
        rows = np.concatenate((np.zeros((int(cls), dim)), table))
        state["pos_embed"] = torch.from_numpy(rows).float()[None]
    for i in range(depth):
        b = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            state |= {f"{b}{norm}.weight": some(dim, mean=1), f"{b}{norm}.bias": some(dim)}
        state[f"{b}attn.qkv.weight"] = some(3 * dim, dim, std=1.5 / math.sqrt(dim))
        if bias == "qv":
            state |= {f"{b}attn.q_bias": some(dim, std=0.5), f"{b}attn.v_bias": some(dim, std=0.5)}
        elif bias == "qkv":
            state[f"{b}attn.qkv.bias"] = some(3 * dim, std=0.5)
        state |= {f"{b}attn.proj.weight": some(dim, dim), f"{b}attn.proj.bias": some(dim)}
        hidden = mlp_ratio * dim
        state |= {f"{b}mlp.fc1.weight": some(hidden, dim), f"{b}mlp.fc1.bias": some(hidden)}
        state |= {f"{b}mlp.fc2.weight": some(dim, hidden), f"{b}mlp.fc2.bias": some(dim)}
        if scale:
            state |= {f"{b}ls{k}.gamma": some(dim, std=0.5, mean=0.5) for k in (1, 2)}
    return state


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def head(dim: int, seed: int, hidden: int = 16, bottleneck: int = 8, outputs: int = 32):
    sizes = [dim, hidden, hidden, bottleneck]
    state = {}
    for layer, (a, b) in enumerate(itertools.pairwise(sizes)):
        state[f"mlp.{2 * layer}.weight"] = draw(seed + layer, b, a)
        state[f"mlp.{2 * layer}.bias"] = draw(seed + 10 + layer, b)
    state["last_layer.weight_g"] = draw(seed + 20, outputs, 1) + 1
    state["last_layer.weight_v"] = draw(seed + 21, outputs, bottleneck)
    return state


def discovr(
    dim: int = 24,
    depth: int = 2,
    grid: tuple[int, int, int] = (2, 4, 4),
    patch: int = 8,
    bias: str = "qv",
    decoder: int = 24,
    prototypes: int = 16,
) -> dict[str, torch.Tensor]:
    """A whole released state."""
    frames, side, _ = grid
    video, image = positions_1d(frames * side**2, dim), positions_1d(side**2, dim)
    kernel = (patch, patch)
    state = {}
    for seed, part in enumerate(("encoder", "video_teacher"), 1):
        state |= prefixed(f"{part}.", encoder(dim, depth, (2, *kernel), bias, video, seed=seed))
    for seed, part in enumerate(("image_student", "image_teacher"), 3):
        state |= prefixed(f"{part}.", encoder(dim, depth, (1, *kernel), "none", image, seed=seed))
    body = encoder(decoder, 1, (1, 1, 1), bias, cls=False, seed=5)
    state |= prefixed("decoder.", {k: v for k, v in body.items() if "patch_embed" not in k})
    state |= {"decoder.head.weight": draw(1, dim, decoder), "decoder.head.bias": draw(2, dim)}
    state |= {
        "encoder_to_decoder.weight": draw(3, decoder, dim),
        "mask_token": draw(4, 1, 1, decoder),
        "prototypes": draw(5, prototypes, dim),
        "video_center": draw(6, 1, 32),
        "image_center": draw(7, 1, 32),
    }
    names = ("video_dino_head", "video_teacher_head", "image_dino_head", "image_teacher_head")
    for seed, name in enumerate(names):
        state |= prefixed(f"{name}.", head(dim, 50 * seed))
    return state


def videomae(dim: int = 24, depth: int = 2, patch: int = 8, **options) -> dict[str, torch.Tensor]:
    """A pretraining's state: no CLS token, no position table, a decoder."""
    own = encoder(dim, depth, (2, patch, patch), cls=False, **options)
    state = prefixed("encoder.", own)
    body = encoder(12, 1, (1, 1, 1), cls=False, seed=9)
    state |= prefixed("decoder.", {k: v for k, v in body.items() if "patch_embed" not in k})
    state |= {"decoder.head.weight": draw(1, 6 * patch**2, 12), "mask_token": draw(2, 1, 1, 12)}
    return state | {"encoder_to_decoder.weight": draw(3, 12, dim)}


def hugging_face(state: dict[str, torch.Tensor], prefix: str = "videomae.") -> dict:
    """VideoMAE's encoder under Hugging Face's names."""
    found = {}
    for name, value in state.items():
        if not name.startswith("encoder.") or name.startswith("encoder_to"):
            found[name] = value
            continue
        name = name.removeprefix("encoder.")
        if name.endswith("qkv.weight"):
            block = name.split(".")[1]
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{prefix}encoder.layer.{block}.attention.attention.{part}.weight"] = third
            continue
        for old, new in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("blocks.", "encoder.layer."),
            ("attn.proj", "attention.output.dense"),
            ("attn.", "attention.attention."),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
        ):
            name = name.replace(old, new)
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        found[prefix + name] = value
    return found


# ---- what the weights mean ------------------------------------------------------------------


def norm(x: Array, p: dict[str, Array], name: str, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred / spread * p[f"{name}.weight"] + p[f"{name}.bias"]


def attention(x: Array, p: dict[str, Array], name: str, heads: int) -> Array:
    n, dim = x.shape
    y = x @ p[f"{name}.qkv.weight"].T
    if f"{name}.qkv.bias" in p:
        y = y + p[f"{name}.qkv.bias"]
    if f"{name}.q_bias" in p:
        y[:, :dim] += p[f"{name}.q_bias"]
        y[:, 2 * dim :] += p[f"{name}.v_bias"]
    out, width = np.zeros((n, dim)), dim // heads
    for h in range(heads):
        at = h * width
        q, k, v = (y[:, i * dim + at : i * dim + at + width] for i in range(3))
        scores = q @ k.T / math.sqrt(width)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, at : at + width] = weights / weights.sum(1, keepdims=True) @ v
    return out @ p[f"{name}.proj.weight"].T + p[f"{name}.proj.bias"]


def mlp(x: Array, p: dict[str, Array], name: str) -> Array:
    hidden = x @ p[f"{name}.fc1.weight"].T + p[f"{name}.fc1.bias"]
    hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
    return hidden @ p[f"{name}.fc2.weight"].T + p[f"{name}.fc2.bias"]


def tokens(
    state: dict[str, torch.Tensor], clip: torch.Tensor, heads: int, eps: float, table: Array
) -> Array:
    """One clip (3, T, H, W) through an encoder of the released names, float64.

    Args:
        table: (n, d) positions, or (1 + n, d) with a slot for the CLS token.

    Returns:
        ([1 +] n, d) after the final norm.
    """
    p = {name: value.double().numpy() for name, value in state.items()}
    kernel = p["patch_embed.proj.weight"]
    kernel = kernel[:, :, None] if kernel.ndim == 4 else kernel
    _, _, u, s, _ = kernel.shape
    pixels = clip.double().numpy()
    _, frames, height, width = pixels.shape
    rows = [
        np.tensordot(kernel, pixels[:, t : t + u, y : y + s, x : x + s], 4)
        for t in range(0, frames, u)
        for y in range(0, height, s)
        for x in range(0, width, s)
    ]
    x = np.stack(rows) + p["patch_embed.proj.bias"]
    if "cls_token" in p:
        x = np.concatenate((p["cls_token"][0], x))
        if len(table) < len(x):
            table = np.concatenate((np.zeros((1, x.shape[1])), table))
    x = x + table
    for i in range(sum(name.endswith("norm1.weight") for name in p)):
        b = f"blocks.{i}"
        gains = [p.get(f"{b}.ls{k}.gamma", 1.0) for k in (1, 2)]
        x = x + gains[0] * attention(norm(x, p, f"{b}.norm1", eps), p, f"{b}.attn", heads)
        x = x + gains[1] * mlp(norm(x, p, f"{b}.norm2", eps), p, f"{b}.mlp")
    return norm(x, p, "norm", eps)
