"""Other people's files to ours and back, with an account of every tensor."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from discovr_monai.base.files import save_atomic
from discovr_monai.networks.vit import VisionTransformer
from discovr_monai.weights.download import licence_beside, sha256_of
from discovr_monai.weights.files import (
    FORMAT,
    HEADER,
    PARTS,
    SINGLES,
    CheckpointError,
    decoder_like,
    differences,
    head_like,
    is_safetensors,
    read_checkpoint,
    read_safetensors,
    write_weights,
)
from discovr_monai.weights.foreign_names import LAYOUTS, Ledger, canonical, detect
from discovr_monai.weights.positions import Wanted
from discovr_monai.weights.released_layouts import EPSILON, STRIDE, Converted, convert_state

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean, std of intensities in 0..1
WRAPPERS = ("model", "state_dict", "model_state_dict", "teacher", "module", "network", "student")
_BOOKKEEPING = re.compile(r"(^|_)(optim|sched|lr_|scaler|amp|rng|random|loss|callbacks)")
_NUMPY = np.float64(0).__reduce__()[0]  # what makes a scalar
_SAME_WIDTH = {
    "prototypes": "decoder.head.weight",
    "video_centre": "video_head.last_layer.weight_v",
    "image_centre": "image_head.last_layer.weight_v",
}
# what a training script leaves beside the weights and is no code
_ALLOWED: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    *((_NUMPY, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


@dataclass
class Foreign:
    """A file's tensors, what lies beside them and why it is not taken, and recorded heads."""

    tensors: dict[str, Tensor]
    aside: dict[str, str] = field(default_factory=dict)
    num_heads: int | None = None
    decoder_num_heads: int | None = None


def convert(
    source: str | Path,
    output: str | Path,
    *,
    layout: str = "auto",
    wanted: Wanted | None = None,
    stride: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    licence: str | None = None,
) -> list[str]:
    """A released file to one that every ``--ckpt`` and ``init`` takes.

    Args:
        source: .pth, .pt, .bin (nothing in them is executed), .safetensors or .npz.
        output: .safetensors.
        layout: "auto", "discovr", "videomae" (SIGMA too) or "vit".
        wanted: sizes and heads, where they are to differ or the file lacks them.
        stride, mean, std: of the clips; the layout's own by default.
        licence: of the weights; None takes what was written beside a downloaded file.

    Returns:
        The account, line by line.

    Raises:
        CheckpointError: if the file cannot be read, or something in it has no place.
    """
    source, output = Path(source), Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"{output.name} must end in .safetensors")
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout {layout!r} must be auto or one of {', '.join(LAYOUTS)}")
    foreign = read_foreign(source)
    try:
        layout, converted, ledger = _converted(foreign, layout, wanted or Wanted())
    except ValueError as error:
        raise CheckpointError(f"{source.name}: {error}") from error
    for name, reason in foreign.aside.items():
        ledger.leave(name, reason)
    clip = _clip(STRIDE[layout] if stride is None else stride, mean, std)
    origin = {
        "layout": layout,
        "sha256": sha256_of(source),
        "licence": licence or licence_beside(source),
        "notes": [*ledger.notes, *(f"left out: {line.strip()}" for line in ledger.left_out())],
    }
    about = {
        "video": converted.video,
        "image": converted.image,
        "decoder_num_heads": converted.decoder_num_heads,
        "clip": clip,
        "source": origin,
    }
    write_weights(output, converted.network, about)
    return _account(source.name, output.name, about, ledger)


def _clip(stride: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
    centre, spread = list(mean or IMAGENET[0]), list(std or IMAGENET[1])
    if stride < 1 or len(centre) != 3 or len(spread) != 3 or min(spread) <= 0:
        raise ValueError(
            f"stride {stride} must be at least 1, mean and std need three values each, std above 0"
        )
    return {
        "stride": stride,
        "duration": None,
        "pad_mode": "loop",
        "default_fps": None,
        "mean": centre,
        "std": spread,
    }


def _account(source: str, output: str, about: Mapping[str, Any], ledger: Ledger) -> list[str]:
    origin, clip, video = about["source"], about["clip"], about["video"]
    return [
        f"{source}: layout {origin['layout']}, SHA-256 {origin['sha256']}",
        *ledger.lines(),
        "notes",
        *(f"      {note}" for note in ledger.notes),
        f"clips: {video['num_frames']} frames of stride {clip['stride']}, {video['image_size']} x "
        f"{video['image_size']} pixels, mean {clip['mean']}, std {clip['std']}",
        f"licence: {origin['licence'] or 'not told (--licence records it)'}",
        f"written: {output}, for --ckpt of every evaluation and --init of a training",
    ]


def _converted(foreign: Foreign, layout: str, wanted: Wanted) -> tuple[str, Converted, Ledger]:
    state, origins = canonical(foreign.tensors)
    ledger = Ledger(origins)
    if foreign.num_heads:
        ledger.note(f"{foreign.num_heads} and {foreign.decoder_num_heads} heads, says the file")
    layout = detect(state) if layout == "auto" else layout
    wanted = replace(
        wanted,
        num_heads=wanted.num_heads or foreign.num_heads,
        decoder_num_heads=wanted.decoder_num_heads or foreign.decoder_num_heads,
    )
    converted = convert_state(layout, state, wanted, ledger)
    ledger.check()
    check_parts(converted)
    return layout, converted, ledger


def check_parts(converted: Converted) -> None:
    """Builds every part on the meta device and compares names and shapes.

    Raises:
        ValueError: naming the part and what differs.
    """
    network, modules = converted.network, dict[str, nn.Module]()
    parts = {name.split(".")[0] for name in network}
    try:
        with torch.device("meta"):
            video = VisionTransformer(**converted.video)
            for part in parts:
                if part in ("video_student", "video_teacher"):
                    modules[part] = video
                elif part in ("image_student", "image_teacher"):
                    modules[part] = VisionTransformer(**(converted.image or {}))
                elif part.endswith("_head"):
                    modules[part] = head_like(network, part)
                elif part == "decoder":
                    heads = converted.decoder_num_heads
                    modules[part] = decoder_like(network, video.grid, heads)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} (of ours) is missing: the part is not whole") from error
    for part, module in modules.items():
        prefix = f"{part}."
        tensors = {n.removeprefix(prefix): t for n, t in network.items() if n.startswith(prefix)}
        if wrong := differences(module.state_dict(), tensors):
            raise ValueError(f"our {part} is built otherwise: {wrong}")
    for single, other in _SAME_WIDTH.items():
        if single in parts and other in network:
            weight, rows = network[single], network[other]
            if weight.shape[-1] != len(rows):
                raise ValueError(
                    f"our {single} is {tuple(weight.shape)} where {other} has {len(rows)} rows"
                )


def read_foreign(path: Path) -> Foreign:
    """Tensors of a file by its content, whatever its name.

    Raises:
        CheckpointError: missing, empty, damaged, ours already, or wanting code to be run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name} does not exist: check the name, or download it")
    if not path.stat().st_size:
        raise CheckpointError(f"{path.name} is empty: download or copy it again")
    if is_safetensors(path):
        header, tensors = read_safetensors(path)
        if HEADER in header:
            raise CheckpointError(f"{path.name} is converted already: use it as it is")
        return Foreign(tensors)
    if _is_npz(path):
        return _read_npz(path)
    content = _read_pickled(path)
    if isinstance(content, dict) and content.get("format") == FORMAT and "network" in content:
        raise CheckpointError(
            f"{path.name} is a training checkpoint of discovr-monai already: use it as it is"
        )
    return _unwrap(content, path.name)


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_pickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            mapped = zipfile.is_zipfile(path)  # an optimizer's gigabytes are never read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = _unsafe(path) or sorted(set(re.findall(r"GLOBAL (\S+)", str(error))))
        if wanted:
            raise CheckpointError(
                f"{path.name} wants {', '.join(wanted)}, which is code: a file may hold tensors, "
                "numbers, texts and argparse.Namespace only, and nothing in it is executed"
            ) from error
        raise CheckpointError(f"{path.name} is no checkpoint, or a damaged one") from error
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(
            f"{path.name} is no checkpoint, or a damaged one (cut short?): download it again"
        ) from error


def _unsafe(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a format before torch 1.6, or damaged
        return []


def _read_npz(path: Path) -> Foreign:
    """Plain names, or parity data: ``state.*``, and heads under ``meta.*``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.array(file[key]) for key in file.files}
    except Exception as error:  # a damaged archive raises anything
        raise CheckpointError(f"{path.name} is damaged or holds pickled objects") from error
    prefix = "state." if any(key.startswith("state.") for key in arrays) else ""
    foreign = Foreign({})
    for key, value in arrays.items():
        if key.startswith(prefix):
            foreign.tensors[key.removeprefix(prefix)] = torch.from_numpy(value)
        elif key in ("meta.num_heads", "meta.decoder_num_heads"):
            setattr(foreign, key.removeprefix("meta."), int(value))
        else:
            foreign.aside[f"{key.partition('.')[0]}.*"] = "beside the state, not weights"
    return foreign


def _unwrap(content: Any, source: str) -> Foreign:
    """The innermost mapping of names to tensors; the rest is put aside with a reason."""
    foreign = Foreign({})
    while True:
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{source} holds a {type(content).__name__}, no named tensors")
        inner = next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        for key, value in content.items():
            if inner is None and isinstance(value, Tensor):
                foreign.tensors[str(key)] = value
            elif key != inner:
                word = str(key) if str(key).isprintable() else repr(key)
                foreign.aside[word] = _why_aside(word, value, inner, source)
        if inner is None:
            break
        content = content[inner]
    if not foreign.tensors:
        raise CheckpointError(f"{source} holds no named tensors: it is no checkpoint")
    return foreign


def _why_aside(key: str, value: Any, inner: str | None, source: str) -> str:
    count = _tensors_in(value)
    size = f"{count} tensors, " if count else ""
    if key in WRAPPERS and inner is not None:
        return f"{size}{inner} is taken instead"
    if re.search(r"(^|_)ema(_|$)", key) and inner is not None:
        return f"{size}a running mean of {inner}, which is taken itself"
    if not count or _BOOKKEEPING.search(key):
        return f"{size}of that training, no weights"
    raise CheckpointError(
        f"{source} holds {count} tensors under {key!r}, which convert does not know: save the part "
        "that you want by itself"
    )


def _tensors_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, Mapping):
        return sum(map(_tensors_in, value.values()))
    return sum(map(_tensors_in, value)) if isinstance(value, (list, tuple)) else 0


def to_released(source: str | Path, output: str | Path) -> list[str]:
    """A file of ours under the released names and shapes, for the public code.

    Args:
        source: a training checkpoint or a converted file.
        output: .npz or .safetensors.

    Returns:
        The account.

    Raises:
        CheckpointError: if ``source`` is not ours.
        ValueError: for another suffix.
    """
    source, output = Path(source), Path(output)
    if output.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{output.name} must end in .npz or .safetensors")
    state = read_checkpoint(source)
    about, network = state.get("about") or {}, state["network"]
    ledger = Ledger({name: [name] for name in network})
    names = {ours: released for released, ours in (SINGLES | PARTS).items()}
    tensors = {}
    for name, value in network.items():
        part = next((p for p in ("decoder.embed", name, name.split(".")[0])
                     if p in names and (name == p or name.startswith(f"{p}."))), None)  # fmt: skip
        if part is None:
            ledger.leave(name, "the released layout has no such part")
            continue
        released = names[part] + name.removeprefix(part)
        if ".patch_embed." in name:
            released = released.replace(".patch_embed.", ".patch_embed.proj.")
        if name.endswith(".patch_embed.weight"):  # (d, 3 t p p) -> (d, 3, t, p, p)
            settings = about[part.split("_")[0]]
            patch = settings["patch_size"]
            value = value.view(len(value), 3, settings["tubelet_size"], patch, patch)
        tensors[released] = value.contiguous()
        ledger.use(name, released)
    ledger.check()
    save_atomic(lambda temporary: _write_released(temporary, output.suffix, tensors), output)
    return [
        f"{source.name} to the released layout",
        *ledger.lines(),
        "what tensors do not tell",
        *(
            f"      {branch}: {settings['num_heads']} heads, epsilon {settings['norm_eps']} "
            f"(released models: {EPSILON[branch]})"
            for branch in EPSILON
            if (settings := about.get(branch))
        ),
        f"      decoder: {about.get('decoder_num_heads')} heads",
        f"written: {output.name}",
    ]


def _write_released(path: Path, suffix: str, tensors: Mapping[str, Tensor]) -> None:
    if suffix == ".safetensors":
        save_file(dict(tensors), path, {"format": "pt"})
        return
    with path.open("wb") as file:
        np.savez(file, **{name: value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]
