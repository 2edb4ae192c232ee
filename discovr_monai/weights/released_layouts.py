"""Tensors of DISCOVR, VideoMAE, SIGMA and image transformers to those of our networks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from discovr_monai.weights.files import PARTS, depth_of, released_name
from discovr_monai.weights.foreign_names import Ledger, sift
from discovr_monai.weights.positions import (
    Size,
    Wanted,
    image_side,
    image_size,
    position_table,
    video_size,
)

TWINS = {"video_student": "video_teacher", "image_student": "image_teacher"}
TUBELET = 2  # of a video encoder made from an image one
STRIDE = {"discovr": 3, "videomae": 4, "vit": 3}  # frames between samples, as they were trained
EPSILON = {"video": 1e-6, "image": 1e-5}  # of DISCOVR's norms; all others have the first
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the usual widths
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
BLIND = "no effect, softmax does not see what all scores have in common"

_PLAIN = re.compile(
    r"cls_token|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|blocks\.\d+\."
    r"(((norm[12]|attn\.proj|mlp\.fc[12])\.(weight|bias))|attn\.(q_bias|v_bias|qkv\.weight))"
)
_SCALE = re.compile(r"(blocks\.\d+\.)(?:ls|gamma_)([12])(?:\.gamma)?")


@dataclass
class Converted:
    """Tensors under our names, and what builds the encoders and reads the decoder."""

    network: dict[str, Tensor] = field(default_factory=dict)
    video: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] | None = None
    decoder_num_heads: int | None = None


def convert_state(
    layout: str, state: Mapping[str, Tensor], wanted: Wanted, ledger: Ledger
) -> Converted:
    """Canonical names of one layout to ours.

    Raises:
        ValueError: for tensors that our networks have no place for, or sizes that do not fit.
    """
    convert = {"discovr": _discovr, "videomae": _videomae, "vit": _vit}[layout]
    return convert(sift(layout, state, ledger), wanted, ledger)


def _discovr(state: dict[str, Tensor], wanted: Wanted, ledger: Ledger) -> Converted:
    if "patch_embed.proj.weight" in state:  # an encoder by itself
        for name in list(ledger.origins):
            ledger.rename(name, f"encoder.{name}")
        state = {f"encoder.{name}": value for name, value in state.items()}
    out = Converted()
    encoders: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        ours = released_name(name)
        if PARTS.get(part) in {*TWINS, *TWINS.values()}:
            encoders.setdefault(part, {})[rest] = value
        elif ours is not None:
            out.network[ours] = value
            ledger.use(name, ours)
    if not {"encoder", "video_teacher"} & set(encoders):
        raise ValueError("the file holds no video encoder (encoder.* or video_teacher.*)")
    images = [p for p in ("image_student", "image_teacher") if p in encoders]
    side = image_side(encoders[images[0]], f"{images[0]}.") if images else None
    for part, local in encoders.items():
        prefix, branch = f"{part}.", "image" if part in images else "video"
        kernel = _kernel(local, prefix, branch)
        if branch == "image":
            size = image_size(local, prefix, wanted)
        else:
            size = video_size(local, prefix, side, wanted, None)
        settings = _settings(local, prefix, kernel, size, EPSILON[branch], wanted, ledger)
        tensors = _weights(local, prefix, [PARTS[part]], ledger)
        tensors["pos_embed"] = position_table(local, prefix, settings, size.grid, ledger)
        tensors["patch_embed.weight"] = kernel.flatten(1)  # (d, 3 t p p)
        out.network |= {f"{PARTS[part]}.{k}": v for k, v in tensors.items()}
        if branch == "image":
            out.image = settings
        else:
            out.video = settings
    _complete_twins(out, ledger)
    if "decoder.embed.weight" in out.network:
        width = len(out.network["decoder.embed.weight"])
        out.decoder_num_heads = _heads(width, wanted.decoder_num_heads, DECODER_HEADS, ledger)
    return out


def _complete_twins(out: Converted, ledger: Ledger) -> None:
    """Students and teachers stand in for each other where a file has but one."""
    for student, teacher in TWINS.items():
        for present, missing in ((student, teacher), (teacher, student)):
            tensors = {k: v for k, v in out.network.items() if k.startswith(f"{present}.")}
            if tensors and not any(k.startswith(f"{missing}.") for k in out.network):
                ledger.note(f"{missing} is a copy of {present}: the file has no other")
                out.network |= {missing + k.removeprefix(present): v for k, v in tensors.items()}


def _videomae(state: dict[str, Tensor], wanted: Wanted, ledger: Ledger) -> Converted:
    local, prefix = _one_encoder(state, ledger)
    if "cls_token" in local:
        raise ValueError(f"{prefix}cls_token: the videomae layout has none, try --layout discovr")
    kernel = _kernel(local, prefix, "video")
    size = video_size(local, prefix, None, wanted, (224, 16))
    settings = _settings(local, prefix, kernel, size, EPSILON["video"], wanted, ledger)
    parts = ["video_student", "video_teacher"]
    tensors = _weights(local, prefix, parts, ledger)
    tensors["pos_embed"] = position_table(local, prefix, settings, size.grid, ledger)
    tensors["patch_embed.weight"] = kernel.flatten(1)
    ledger.note("no CLS token: the mean of the final tokens takes its place")
    return Converted({f"{p}.{k}": v for p in parts for k, v in tensors.items()}, settings)


def _vit(state: dict[str, Tensor], wanted: Wanted, ledger: Ledger) -> Converted:
    """The image branch as it is, the video branch inflated from it."""
    local, prefix = _one_encoder(state, ledger)
    kernel = _kernel(local, prefix, "image")  # (d, 3, 1, p, p)
    size = image_size(local, prefix, wanted)
    image = _settings(local, prefix, kernel, size, EPSILON["video"], wanted, ledger)
    frames = wanted.num_frames or 16
    video = image | {"num_frames": frames, "tubelet_size": TUBELET}
    parts = [*TWINS, *TWINS.values()]
    tensors = _weights(local, prefix, parts, ledger)
    still = position_table(local, prefix, image, size.grid, ledger)  # (1, [1 +] n, d)
    places = (image["image_size"] // image["patch_size"]) ** 2
    slot, rows = still[:, :-places], still[:, -places:]
    moving = torch.cat((slot, rows.repeat(1, frames // TUBELET, 1)), 1)
    ledger.note(
        f"the video branch is inflated to {frames} frames (--num-frames): patch kernel / {TUBELET} "
        f"on each of a tubelet's {TUBELET}, positions repeated over time"
    )
    tube = (kernel / TUBELET).expand(-1, -1, TUBELET, -1, -1)
    out = Converted(video=video, image=image)
    for part in parts:
        is_image = part.startswith("image")
        own = {
            "pos_embed": still if is_image else moving,
            "patch_embed.weight": (kernel if is_image else tube).flatten(1),
        }
        out.network |= {f"{part}.{k}": v for k, v in (tensors | own).items()}
    return out


def _one_encoder(state: dict[str, Tensor], ledger: Ledger) -> tuple[dict[str, Tensor], str]:
    """A file's only encoder and its prefix; ``fc_norm`` takes the place of a lacking norm."""
    prefix = "encoder." if "encoder.patch_embed.proj.weight" in state else ""
    for kind in ("weight", "bias"):
        norm, pooled = f"{prefix}norm.{kind}", f"{prefix}fc_norm.{kind}"
        if pooled in state and norm in state:
            ledger.leave(pooled, "norm of a pooled feature, the final norm is used")
        elif pooled in state:
            state[norm] = state.pop(pooled)
            ledger.rename(pooled, norm)
            ledger.note(
                "fc_norm becomes the final norm of every token; the fine-tuned network itself "
                "takes the mean of the tokens first, so its pooled feature is another"
            )
    local = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {k: v for k, v in local.items() if not k.startswith("fc_norm.")}, prefix


def _kernel(local: Mapping[str, Tensor], prefix: str, branch: str) -> Tensor:
    """(d, 3, t, p, p), t = 1 in an image branch.

    Raises:
        ValueError: if it belongs to the other branch, or is not square.
    """
    name = "patch_embed.proj.weight"
    kernel = _need(local, prefix, name)
    if kernel.dim() == 4:
        kernel = kernel[:, :, None]
    if kernel.dim() != 5 or kernel.shape[1] != 3 or kernel.shape[3] != kernel.shape[4]:
        raise ValueError(
            f"{prefix}{name} is {tuple(kernel.shape)}: only 3 channels and square patches fit"
        )
    if (kernel.shape[2] == 1) != (branch == "image"):
        usual = "an image branch's covers one" if branch == "image" else "a video branch's two"
        raise ValueError(
            f"{prefix}{name} covers {kernel.shape[2]} frame(s), but {usual}: are the branches "
            "mixed up, or is it another --layout?"
        )
    return kernel


def _weights(
    local: Mapping[str, Tensor], prefix: str, parts: Sequence[str], ledger: Ledger
) -> dict[str, Tensor]:
    """All of an encoder but its positions, the patch kernel unflattened; layer scales folded."""
    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, value in local.items():
        targets = []
        if name.endswith(".attn.qkv.bias"):
            query, _, values = value.chunk(3)
            block = name.removesuffix("qkv.bias")
            weights |= {f"{block}q_bias": query, f"{block}v_bias": values}
            targets = [f"{block}q_bias", f"{block}v_bias"]
            ledger.leave(f"{prefix}{name} (its key third)", BLIND)
        elif scale := _SCALE.fullmatch(name):
            layer = scale[1] + ("attn.proj" if scale[2] == "1" else "mlp.fc2")
            scales[layer] = value
            targets = [f"{layer} (folded into it)"]
        elif name == "pos_embed":
            targets = [name]
        elif _PLAIN.fullmatch(name):
            targets = [name.replace("patch_embed.proj.", "patch_embed.")]
            weights[targets[0]] = value
        for target in targets:
            for part in parts:
                ledger.use(prefix + name, f"{part}.{target}")
    for layer, gamma in scales.items():  # gamma (W x + b) = (gamma W) x + gamma b
        for kind in ("weight", "bias"):
            value = _need(weights, prefix, f"{layer}.{kind}").double()
            gain = gamma.double().view(-1, *[1] * (value.dim() - 1))
            weights[f"{layer}.{kind}"] = (gain * value).float()
    return weights


def _settings(
    local: Mapping[str, Tensor],
    prefix: str,
    kernel: Tensor,
    size: Size,
    eps: float,
    wanted: Wanted,
    ledger: Ledger,
) -> dict[str, Any]:
    """What builds the encoder again: see :class:`VisionTransformer`."""
    dim, _, tubelet, patch, _ = kernel.shape
    hidden = len(_need(local, prefix, "blocks.0.mlp.fc1.weight"))
    ledger.note(f"norms of epsilon {eps:g}, as in the published code: tensors do not tell it")
    return {
        "image_size": size.image_size,
        "num_frames": size.num_frames,
        "patch_size": patch,
        "tubelet_size": tubelet,
        "embed_dim": dim,
        "depth": depth_of(local, ""),
        "num_heads": _heads(dim, wanted.num_heads, HEADS, ledger),
        "mlp_ratio": hidden / dim,
        "qv_bias": any(k in local for k in ("blocks.0.attn.q_bias", "blocks.0.attn.qkv.bias")),
        "norm_eps": eps,
        "cls_token": "cls_token" in local,
    }


def _heads(width: int, given: int | None, usual: Mapping[int, int], ledger: Ledger) -> int:
    flag = "--num-heads" if usual is HEADS else "--decoder-num-heads"
    if given is not None:
        return given
    if width not in usual:
        raise ValueError(f"width {width} does not tell the number of heads: give {flag}")
    ledger.note(f"{usual[width]} heads, as is usual at width {width} ({flag} for another number)")
    return usual[width]


def _need(local: Mapping[str, Tensor], prefix: str, name: str) -> Tensor:
    if name not in local:
        raise ValueError(f"{prefix}{name} is missing: the file holds no whole encoder")
    return local[name]
