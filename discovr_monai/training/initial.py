"""Weights that a pretraining begins with: a converted file, or a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.parallel import load_whole
from discovr_monai.weights.files import (
    CheckpointError,
    depth_of,
    describe_encoders,
    differences,
    read_checkpoint,
)

TWINS = {
    "video_teacher": "video_student",
    "video_teacher_head": "video_head",
    "image_teacher": "image_student",
    "image_teacher_head": "image_head",
}
USER_KEYS = {"image_size", "num_frames", "patch_size", "tubelet_size", "embed_dim", "depth",
             "num_heads"}  # fmt: skip
Part = Mapping[str, Tensor]


def start_from(network: Discovr, path: str | Path) -> tuple[dict[str, Any], str]:
    """Loads the parts of ``network`` that a file has; the others stay as they are.

    A student whose teacher the file lacks lends it its weights, and the other way round.

    Returns:
        The file's "about", and a line for people on what began from it.

    Raises:
        CheckpointError: for a part of another shape, naming a tensor and the keys to change.
    """
    state, name = read_checkpoint(path), Path(path).name
    about = state.get("about")
    if not about:
        raise CheckpointError(f"init {name} does not say how its encoders are built: convert it")
    weights, built = network.state_dict(), describe_encoders(network, {})
    ours, theirs = _parts(weights), _parts(state["network"])
    shared = [part for part in ours if part in theirs]
    if not any(_is_encoder(part) for part in shared):
        raise CheckpointError(f"init {name} has no encoder that this network has")
    for part in shared:
        _check(f"init {name}", part, (ours[part], built), (theirs[part], about))
    began = {key: value for part in shared for key, value in theirs[part].items()}
    copied = []
    for teacher, student in TWINS.items():
        for missing, lender in ((teacher, student), (student, teacher)):
            if missing in ours and missing not in theirs and lender in shared:
                began |= {missing + k.removeprefix(lender): v for k, v in theirs[lender].items()}
                copied.append(missing)
    load_whole(network, weights | began)
    report = [f"Beginning from {name}: {', '.join(shared)}"]
    for title, parts in (
        ("copied from the twin", copied),
        ("anew", [part for part in ours if part not in (*shared, *copied)]),
        ("not used", [part for part in theirs if part not in ours]),
    ):
        report += [f"{title}: {', '.join(parts)}"] if parts else []
    return about, "; ".join(report)


def _parts(state: Part) -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors under their whole names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        parts.setdefault(name.split(".")[0], {})[name] = value
    modules_first = sorted(parts, key=lambda part: (not _is_encoder(part), part in state))
    return {part: parts[part] for part in modules_first}


def _is_encoder(part: str) -> bool:
    return part in ("video_student", "video_teacher", "image_student", "image_teacher")


def _check(
    source: str,
    part: str,
    mine: tuple[Part, Mapping[str, Any]],
    theirs: tuple[Part, Mapping[str, Any]],
) -> None:
    """Names, shapes, and what shapes do not show (heads, epsilon) of a part that both have."""
    wrong = differences(mine[0], theirs[0])
    have, want = _sizes(part, *mine), _sizes(part, *theirs)
    keys = [key for key in have if key in want and have[key] != want[key]]
    if not wrong and not keys:
        return
    branch = part.split("_")[0]
    change = ", ".join(
        f"{k if k in USER_KEYS or not _is_encoder(part) else f'{branch}_def#{k}'} {want[k]} "
        f"(now {have[k]})"
        for k in keys
    )
    hint = f". Set {change}" if change else ". Convert the file again, or leave init null"
    if {"image_size", "num_frames"} & set(keys):
        hint += ", or convert the file with --image-size and --num-frames"
    raise CheckpointError(f"{source}: {part} is built otherwise{wrong and f': {wrong}'}{hint}")


def _sizes(part: str, tensors: Part, about: Mapping[str, Any]) -> dict[str, Any]:
    """Config key -> the value that builds a part like this; keys that nothing tells are absent."""

    def shape(name: str) -> tuple[int, ...]:
        return tuple(tensors[f"{part}.{name}"].shape) if f"{part}.{name}" in tensors else (0, 0)

    if _is_encoder(part):
        return {"cls_token": True, **(about[part.split("_")[0]] or {})}
    if part.endswith("_head"):
        outputs, bottleneck = shape("last_layer.weight_v")[:2]
        hidden, width = shape("mlp.0.weight")[:2]
        return {"video_head_def#out_dim": outputs, "video_head_def#hidden_dim": hidden,
                "video_head_def#bottleneck_dim": bottleneck, "embed_dim": width}  # fmt: skip
    if part == "decoder":
        width, taken = shape("embed.weight")[:2]
        heads = about.get("decoder_num_heads")
        return {
            "decoder_def#embed_dim": width,
            "decoder_def#depth": depth_of(tensors, "decoder."),
            "embed_dim": taken,
            **({} if heads is None else {"decoder_def#num_heads": heads}),
        }
    if part == "prototypes":
        count, width = tensors[part].shape
        return {"num_prototypes": count, "embed_dim": width}
    if part.endswith("_centre"):
        return {"video_head_def#out_dim": tensors[part].shape[-1]}
    return {}
