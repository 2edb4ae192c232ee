"""Sizes and position tables: verified against their formulas, recomputed or interpolated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from discovr_monai.networks.vit import sincos_positions
from discovr_monai.weights.foreign_names import Ledger

Grid = tuple[int, int, int]  # (t, h, w)
CLOSE = 1e-4  # MAE computed its table in float32
CLOSE_HALF = 4e-3  # of a table that was stored in half precision


@dataclass(frozen=True)
class Wanted:
    """What shapes do not tell, or is to differ from the file; None takes the file's.

    Raises:
        ValueError: for a number below 1.
    """

    image_size: int | None = None
    num_frames: int | None = None
    num_heads: int | None = None
    decoder_num_heads: int | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")


@dataclass(frozen=True)
class Size:
    """Of the clips of a converted encoder, and the file's own token grid where it is known."""

    image_size: int
    num_frames: int
    grid: Grid | None


def sincos_2d(side: int, dim: int) -> Tensor:
    """MAE's table: the first half of the columns tells the column of a patch, the second its row.

    Returns:
        (side * side, dim) float32, raster order, computed in float64.
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, dim / 4)
    line = torch.cat((angle.sin(), angle.cos()), 1)  # (side, dim / 2)
    column = line[None].expand(side, -1, -1)
    row = line[:, None].expand(-1, side, -1)
    return torch.cat((column, row), 2).flatten(0, 1).float()


def image_side(local: Mapping[str, Tensor], prefix: str) -> int:
    """Patches per side of an image encoder.

    Raises:
        ValueError: if there is no table, or no square one.
    """
    if "pos_embed" not in local or local["pos_embed"].dim() != 3:
        raise ValueError(f"{prefix}pos_embed (1, tokens, width) is missing: positions are needed")
    tokens = local["pos_embed"].shape[1]
    for slots in (1, 0):  # timm has models whose table lacks the CLS token's slot
        if math.isqrt(tokens - slots) ** 2 == tokens - slots:
            return math.isqrt(tokens - slots)
    raise ValueError(f"{prefix}pos_embed has {tokens} positions: no square of patches")


def image_size(local: Mapping[str, Tensor], prefix: str, wanted: Wanted) -> Size:
    """Of an image encoder: one frame."""
    side = image_side(local, prefix)
    pixels = side * local["patch_embed.proj.weight"].shape[-1]
    return Size(wanted.image_size or pixels, 1, (1, side, side))


def video_size(
    local: Mapping[str, Tensor],
    prefix: str,
    side: int | None,
    wanted: Wanted,
    default: tuple[int, int] | None,
) -> Size:
    """Of a video encoder, whose token count alone does not tell frame size from frames.

    Args:
        side: patches per side of the image branch, where the file has one.
        default: (image_size, num_frames) of the layout's published files.

    Raises:
        ValueError: if the file does not determine it, naming the options that do.
    """
    _, _, tubelet, patch, _ = local["patch_embed.proj.weight"].shape
    table = local.get("pos_embed")
    file_size, tokens = default, "no"
    if table is not None:
        count = table.shape[1] - int("cls_token" in local)
        file_size, tokens = _file_size(count, patch, tubelet, side, wanted, default), str(count)
    image_size, num_frames = file_size or (None, None)
    image_size, num_frames = wanted.image_size or image_size, wanted.num_frames or num_frames
    if image_size is None or num_frames is None:
        raise ValueError(
            f"{prefix}pos_embed has {tokens} tokens, which does not tell the frame size from the "
            "number of frames: give --image-size and --num-frames"
        )
    if file_size is None or table is None:
        return Size(image_size, num_frames, None)
    side = file_size[0] // patch
    return Size(image_size, num_frames, (file_size[1] // tubelet, side, side))


def _file_size(
    tokens: int,
    patch: int,
    tubelet: int,
    side: int | None,
    wanted: Wanted,
    default: tuple[int, int] | None,
) -> tuple[int, int] | None:
    """(image_size, num_frames) of the file itself, None where it cannot be derived."""
    if side is not None:
        if tokens % side**2:
            raise ValueError(
                f"{tokens} video tokens are no multiple of the image branch's {side} x {side}: are "
                "the branches mixed up?"
            )
        return side * patch, tokens // side**2 * tubelet
    for size, frames in ((wanted.image_size, wanted.num_frames), default or (None, None)):
        if size and frames and (size // patch) ** 2 * (frames // tubelet) == tokens:
            return size, frames
    if wanted.image_size and not wanted.num_frames:
        per_frame = (wanted.image_size // patch) ** 2
        if per_frame and not tokens % per_frame:
            return wanted.image_size, tokens // per_frame * tubelet
    if wanted.num_frames and not wanted.image_size:
        per_frame = tokens * tubelet // wanted.num_frames
        if math.isqrt(per_frame) ** 2 * (wanted.num_frames // tubelet) == tokens:
            return math.isqrt(per_frame) * patch, wanted.num_frames
    return None


def position_table(
    local: Mapping[str, Tensor],
    prefix: str,
    settings: Mapping[str, Any],
    old: Grid | None,
    ledger: Ledger,
) -> Tensor:
    """(1, [1 +] N, d) for an encoder of these settings; the CLS token's slot as in the file.

    Raises:
        ValueError: for a learned table on an unknown grid.
    """
    side = settings["image_size"] // settings["patch_size"]
    new = (settings["num_frames"] // settings["tubelet_size"], side, side)
    tokens, dim = math.prod(new), settings["embed_dim"]
    if "pos_embed" not in local:
        rows, slot = sincos_positions(tokens, dim), torch.zeros(int(settings["cls_token"]), dim)
        ledger.note(f"{prefix}pos_embed is not in the file: the sin-cos table of {tokens} tokens")
        return torch.cat((slot, rows))[None]
    table = local["pos_embed"]
    if table.dim() != 3 or table.shape[0] != 1 or table.shape[2] != dim:
        raise ValueError(f"{prefix}pos_embed is {tuple(table.shape)}, not (1, tokens, {dim})")
    count = table.shape[1] if old is None else math.prod(old)
    if old is None and settings["cls_token"]:
        count -= 1
    slot, rows = table[0, : table.shape[1] - count], table[0, table.shape[1] - count :]
    if settings["cls_token"] and not len(slot):
        slot = torch.zeros(1, dim)
    return torch.cat((slot, _resized(rows, f"{prefix}pos_embed", old, new, ledger)))[None]


def _resized(rows: Tensor, name: str, old: Grid | None, new: Grid, ledger: Ledger) -> Tensor:
    """(n, d) rows of one grid to those of another."""
    halves = any("float16 tensors" in note for note in ledger.notes)
    kind, formula = _formula(rows, old, CLOSE_HALF if halves else CLOSE)
    if old in (None, new) and len(rows) == math.prod(new):
        ledger.note(f"{name}: {kind} table, kept as it is")
        return rows
    change = f"{old or len(rows)} to {new} tokens (t, h, w)"
    if formula is not None:
        ledger.note(f"{name}: {kind} table, recomputed from {change}")
        return formula(new)
    if old is None:
        raise ValueError(
            f"{name} is a learned table of {len(rows)} tokens on an unknown grid: give the file's "
            "own --image-size and --num-frames"
        )
    ledger.note(f"{name}: {kind} table, interpolated from {change}")
    return interpolate(rows, old, new)


def _formula(rows: Tensor, old: Grid | None, close: float) -> tuple[str, Any]:
    n, dim = rows.shape
    if bool((rows - sincos_positions(n, dim)).abs().max() < close):
        return "1-D sin-cos (verified)", lambda new: sincos_positions(math.prod(new), dim)
    square = old is not None and old[0] == 1 and not dim % 4
    if old and square and bool((rows - sincos_2d(old[1], dim)).abs().max() < close):
        return "2-D sin-cos (verified)", lambda new: sincos_2d(new[1], dim)
    return "learned (no sin-cos formula gives it)", None


def interpolate(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bicubic in space, then linear in time.

    Args:
        rows: (t h w, d) on the grid ``old``.

    Returns:
        (t' h' w', d) on the grid ``new``, float32, computed in float64.
    """
    x = rows.double().view(*old, -1).permute(0, 3, 1, 2)  # (t, d, h, w)
    x = F.interpolate(x, new[1:], mode="bicubic", align_corners=False)
    x = x.permute(2, 3, 1, 0).flatten(0, 1)  # (h' w', d, t)
    x = F.interpolate(x, new[0], mode="linear", align_corners=False)
    return x.permute(2, 0, 1).flatten(0, 1).float()
