"""Weights in files: safe reading and writing, and released checkpoints to our names."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from discovr_monai.base.files import save_atomic
from discovr_monai.base.types import CheckpointError
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.parallel import load_whole
from discovr_monai.networks.vit import Block, VisionTransformer
from discovr_monai.weights.checkpoint_folder import find_sharded, read_state, read_whole

FORMAT = 1
DESCRIPTION = "description"
HEADER = "discovr_monai"  # our one entry in a safetensors header: JSON of "format" and "about"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint (a file, or a sharded folder) or a converted file of ours.

    No pickled code is run.

    Returns:
        "format", "about", "network" (tensors under our names); of a training also what it
        resumes from.

    Raises:
        CheckpointError: missing, empty, truncated, of another format, or holding pickled code.
    """
    path = Path(path)
    if (folder := find_sharded(path)) is not None:
        return read_state(folder) | {"network": read_whole(folder, "network.")}
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path.name} does not exist: train first, or check --ckpt"
        )
    if not path.stat().st_size:
        raise CheckpointError(f"checkpoint {path.name} is empty: copy or convert it again")
    if is_safetensors(path):
        header, network = read_safetensors(path)
        state: Any = _own_header(header)
        if state is not None:
            state["network"] = network
    else:
        state = _read_pickled(path)
        if isinstance(state, dict) and isinstance(state.get(DESCRIPTION), Tensor):
            state = _read_flat(state)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path.name} is not a training checkpoint of discovr-monai nor converted for it: "
            "run discovr-monai convert on it first"
        )
    return state


def description_tensor(about: Mapping[str, Any]) -> Tensor:
    """What a flat state dict carries under "description": JSON as (n,) uint8.

    So that models/model.pt is a plain state dict, as MONAI's tools want it, and still says how its
    networks are built.
    """
    text = json.dumps({"format": FORMAT, "about": about}, sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _read_flat(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(bytes(state[DESCRIPTION].tolist()))
    except ValueError:
        return None
    return {**content, "network": {k: v for k, v in state.items() if k != DESCRIPTION}}


def is_safetensors(path: Path) -> bool:
    """By the name or by the content: a length of 8 bytes, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header entries and tensors.

    Raises:
        CheckpointError: if the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {}), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is damaged (cut short?): copy, download or convert it again"
        ) from error


def _own_header(header: Mapping[str, str]) -> Any:
    try:
        return json.loads(header.get(HEADER, "null"))
    except json.JSONDecodeError:
        return None


def _read_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path.name} is damaged or holds pickled code, which is never run: "
            "use last.pt or best.pt of a training, or convert it"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(
            f"checkpoint {path.name} is damaged (cut short?): resume from best.pt or start anew"
        ) from error


def write_weights(
    path: str | Path, network: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Writes a converted file (safetensors), which every ``--ckpt`` and ``init`` takes.

    Args:
        path: atomically replaced; equal input gives equal bytes.
        network: tensors under the names of :class:`Discovr`, any of its parts.
        about: as of :func:`describe_encoders`, with "source".
    """
    seen: set[int] = set()
    tensors = {}
    for name, value in network.items():
        place = value.untyped_storage().data_ptr()
        value = value.detach().cpu().contiguous()
        tensors[name] = value.clone() if place in seen else value  # safetensors shares nothing
        seen.add(place)
    header = {HEADER: json.dumps({"format": FORMAT, "about": about})}
    save_atomic(lambda temporary: save_file(tensors, temporary, header), Path(path))


def describe_encoders(network: Discovr, clip: Mapping[str, Any]) -> dict[str, Any]:
    """What builds a network's encoders again, and how their clips are made."""
    image = None if network.image is None else network.image.student
    decoder = network.video.decoder
    blocks = [] if decoder is None else [b for b in decoder.blocks if isinstance(b, Block)]
    return {
        "video": dict(network.video.student.settings),
        "image": None if image is None else dict(image.settings),
        "decoder_num_heads": blocks[0].attn.num_heads if blocks else None,
        "clip": dict(clip),
    }


PARTS = {  # released name -> ours
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
SINGLES = {
    "mask_token": "decoder.mask_token",
    "prototypes": "prototypes",
    "video_center": "video_centre",
    "image_center": "image_centre",
}


def strip_prefixes(key: str) -> str:
    """Without what wrappers put in front (DataParallel's ``module.``, ...)."""
    return re.sub(r"^((module|backbone|_orig_mod)\.)+", "", key)


def released_name(name: str) -> str | None:
    """Our name of a released tensor (without prefixes), None where it has no place."""
    if name in SINGLES:
        return SINGLES[name]
    part, _, rest = name.partition(".")
    if part not in PARTS or not rest:
        return None
    return f"{PARTS[part]}.{rest.replace('patch_embed.proj.', 'patch_embed.')}"


def rename_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names and shapes to those of :class:`Discovr`.

    ``module.`` and ``backbone.`` prefixes are dropped, patch convolutions are flattened to
    linear weights.

    Raises:
        ValueError: naming every key that has no place.
    """
    names = {key: released_name(strip_prefixes(key)) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise ValueError(f"{len(unknown)} keys of the checkpoint have no place: {unknown[:8]}")
    return {
        # (d, 3, t, p, p) -> (d, 3 t p p)
        name: state[key].flatten(1) if name.endswith("patch_embed.weight") else state[key]
        for key, name in names.items()
        if name is not None
    }


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
    head = {part: head_like(names, part) for part in ("video_head", "image_head")}
    decoder = decoder_like(names, video.grid, decoder_num_heads)
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
    if wrong := differences(network.state_dict(), state):
        raise ValueError(
            f"checkpoint {source or 'state'} does not fit the network: {wrong}. "
            "Use the config that it was trained with"
        )
    load_whole(network, dict(state))


def differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """How names and shapes of a state differ from a network's, "" where they do not."""
    missing = sorted(set(expected) - set(state))
    unknown = sorted(set(state) - set(expected))
    shapes = [
        f"{k} is {tuple(state[k].shape)}, the network has {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    counts = [
        *(f"{len(shapes)} of another shape ({shapes[0]})" for _ in shapes[:1]),
        *(f"{len(missing)} missing ({missing[0]})" for _ in missing[:1]),
        *(f"{len(unknown)} unknown ({unknown[0]})" for _ in unknown[:1]),
    ]
    return ", ".join(counts)


def depth_of(names: Mapping[str, Tensor], part: str) -> int:
    """Blocks of a part, by their highest number."""
    numbers = [int(m[1]) for k in names if (m := re.match(rf"{part}blocks\.(\d+)\.", k))]
    return 1 + max(numbers, default=-1)


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
        depth=depth_of(names, f"{part}."),
        num_heads=num_heads or dim // 64,
        mlp_ratio=names[f"{part}.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        qv_bias=f"{part}.blocks.0.attn.q_bias" in names,
        norm_eps=1e-5 if image_grid is None else 1e-6,
    )


def head_like(names: Mapping[str, Tensor], part: str) -> ProjectionHead:
    """The projection head whose tensors these are (on the default device)."""
    out_dim, bottleneck = names[f"{part}.last_layer.weight_v"].shape
    hidden, in_dim = names[f"{part}.mlp.0.weight"].shape
    return ProjectionHead(in_dim, out_dim, hidden, bottleneck)


def decoder_like(
    names: Mapping[str, Tensor], grid: tuple[int, int, int], num_heads: int | None
) -> Decoder:
    """The decoder whose tensors these are; heads default to widths of 64."""
    width, in_dim = names["decoder.embed.weight"].shape
    return Decoder(
        in_dim=in_dim,
        out_dim=names["decoder.head.weight"].shape[0],
        grid=grid,
        embed_dim=width,
        depth=depth_of(names, "decoder."),
        num_heads=num_heads or width // 64,
        mlp_ratio=names["decoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
        qv_bias="decoder.blocks.0.attn.q_bias" in names,
    )
