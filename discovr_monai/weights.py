"""Weights in files: safe reading and writing, and released checkpoints to our names."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.vit import VisionTransformer

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save_atomic(write: Callable[[Path], None], path: Path) -> None:
    """Writes through ``write(temporary path)``, flushes to disk, then renames to ``path``.

    Raises:
        OSError: when the disk is full or the folder cannot be written; ``path`` is as before
            and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of ours without running pickled code.

    Raises:
        CheckpointError: missing, truncated, of another format, or holding pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path.name} does not exist: train first, or check --ckpt"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path.name} is damaged or holds pickled code, which is never run: "
            "use last.pt or best.pt of a training, or convert it"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path.name} is damaged (cut short?): resume from best.pt or start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path.name} is not a training checkpoint of discovr-monai")
    return state


def describe_encoders(network: Discovr, clip: Mapping[str, Any]) -> dict[str, Any]:
    """What builds a network's encoders again, and how their clips are made."""
    image = network.image_student
    return {
        "video": dict(network.video_student.settings),
        "image": None if image is None else dict(image.settings),
        "clip": dict(clip),
    }


_PARTS = {
    "encoder": "video_student",
    "video_teacher": "video_teacher",
    "image_student": "image_student",
    "image_teacher": "image_teacher",
    "decoder": "decoder",
    "encoder_to_decoder": "decoder.embed",
    "video_dino_head": "video_head",
    "video_teacher_head": "video_teacher_head",
    "image_dino_head": "image_head",
    "image_teacher_head": "image_teacher_head",
}
_SINGLES = {
    "mask_token": "decoder.mask_token",
    "prototypes": "prototypes",
    "video_center": "video_centre",
    "image_center": "image_centre",
}


def rename_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names and shapes to those of :class:`Discovr`.

    ``module.`` and ``backbone.`` prefixes are dropped, patch convolutions are flattened to
    linear weights.

    Raises:
        ValueError: naming every key that has no place.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        name = re.sub(r"^((module|backbone)\.)+", "", key)
        part, _, rest = name.partition(".")
        if name in _SINGLES:
            renamed[_SINGLES[name]] = value
        elif part in _PARTS and rest:
            rest = rest.replace("patch_embed.proj.", "patch_embed.")
            if rest == "patch_embed.weight":
                value = value.flatten(1)  # (d, 3, t, p, p) -> (d, 3 t p p)
            renamed[f"{_PARTS[part]}.{rest}"] = value
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} keys of the checkpoint have no place: {unknown[:8]}")
    return renamed


def build_from_released(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    **options: Any,
) -> Discovr:
    """The network that a released state dict describes, with its weights.

    Sizes are read from the tensors' shapes; heads default to widths of 64.

    Raises:
        ValueError: if a tensor is missing, has no place or another shape.
    """
    names = rename_released(state)
    convolution = {  # shapes of the patch convolutions tell patch and tubelet
        part: next(v for k, v in state.items() if k.endswith(f"{part}.patch_embed.proj.weight"))
        for part in ("encoder", "image_student")
    }
    image = _encoder(names, "image_student", convolution["image_student"], num_heads, None)
    video = _encoder(names, "video_student", convolution["encoder"], num_heads, image.grid)
    head = {part: _head(names, part) for part in ("video_head", "image_head")}
    width = names["decoder.embed.weight"].shape[0]
    decoder = Decoder(
        in_dim=video.embed_dim,
        out_dim=names["decoder.head.weight"].shape[0],
        grid=video.grid,
        embed_dim=width,
        depth=_depth(names, "decoder"),
        num_heads=decoder_num_heads or width // 64,
        mlp_ratio=names["decoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
        qv_bias="decoder.blocks.0.attn.q_bias" in names,
    )
    network = Discovr(
        video=video,
        video_head=head["video_head"],
        image=image,
        image_head=head["image_head"],
        decoder=decoder,
        num_prototypes=names["prototypes"].shape[0],
        **options,
    )
    load_strict(network, names)
    return network


def load_strict(network: torch.nn.Module, state: Mapping[str, Tensor], source: str = "") -> None:
    """Loads a state dict, naming what differs.

    Raises:
        ValueError: with the first missing, unknown and misshapen keys, and what to do.
    """
    own = network.state_dict()
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    shapes = [
        f"{k} is {tuple(state[k].shape)}, the network has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unknown or shapes:
        found = [
            *(f"{len(shapes)} of another shape ({shapes[0]})" for _ in shapes[:1]),
            *(f"{len(missing)} missing ({missing[0]})" for _ in missing[:1]),
            *(f"{len(unknown)} unknown ({unknown[0]})" for _ in unknown[:1]),
        ]
        raise ValueError(
            f"checkpoint {source or 'state'} does not fit the network: {', '.join(found)}. "
            "Use the config that it was trained with"
        )
    network.load_state_dict(dict(state))


def _depth(names: Mapping[str, Tensor], part: str) -> int:
    found = {int(m[1]) for k in names if (m := re.match(rf"{part}\.blocks\.(\d+)\.", k))}
    return len(found)


def _encoder(
    names: Mapping[str, Tensor],
    part: str,
    convolution: Tensor,
    num_heads: int | None,
    image_grid: tuple[int, int, int] | None,
) -> VisionTransformer:
    """``image_grid`` None marks the image branch itself."""
    dim, _, tubelet, patch, _ = convolution.shape
    tokens = names[f"{part}.pos_embed"].shape[1] - 1
    side = math.isqrt(tokens) if image_grid is None else image_grid[1]
    return VisionTransformer(
        image_size=side * patch,
        num_frames=tokens // side**2 * tubelet,
        patch_size=patch,
        tubelet_size=tubelet,
        embed_dim=dim,
        depth=_depth(names, part),
        num_heads=num_heads or dim // 64,
        mlp_ratio=names[f"{part}.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        qv_bias=f"{part}.blocks.0.attn.q_bias" in names,
        norm_eps=1e-5 if image_grid is None else 1e-6,
    )


def _head(names: Mapping[str, Tensor], part: str) -> ProjectionHead:
    out_dim, bottleneck = names[f"{part}.last_layer.weight_v"].shape
    hidden, in_dim = names[f"{part}.mlp.0.weight"].shape
    return ProjectionHead(in_dim, out_dim, hidden, bottleneck)


def export_teacher(checkpoint: str | Path, output: str | Path) -> None:
    """Writes a training's video teacher as the state dict of :class:`networks.vit.Embedder`.

    Raises:
        ValueError: if the file is not a checkpoint of ours.
    """
    state = read_checkpoint(checkpoint)["network"]
    prefix = "video_teacher."
    found = {f"encoder.{k[len(prefix) :]}": v for k, v in state.items() if k.startswith(prefix)}
    save_atomic(lambda temporary: torch.save(found, temporary), Path(output))
