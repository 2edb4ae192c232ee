"""Networks of inference as files for other runtimes, each checked against the one it came from.

All take clips (B, 3, T, H, W) float32 of any batch size, normalised as the file's own metadata
("mean", "std") say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.base.files import save_atomic
from discovr_monai.base.notice import NOTICE
from discovr_monai.data.clips.normalise import PrepareClip
from discovr_monai.evaluation.features.encoders import pool_tokens
from discovr_monai.evaluation.heads.saved import Familiarity, familiar_features
from discovr_monai.inference.formats import FORMATS, Run, encode, need_packages, open_exported
from discovr_monai.inference.model import EchoModel, load_model, pooled
from discovr_monai.phantom.cine import simulate_cine

UNFAMILIAR = "(B,); above 1 the clip is unlike the head's training cines: do not use its result"
PARTS = {  # part -> its outputs, and what they are
    "embedding": {"embedding": "(B, D)"},
    "ef": {
        "ef": "(B,) percent; average over a cine's clips, then clamp to 0..100",
        "unfamiliarity": UNFAMILIAR,
    },
    "segmentation": {
        "logits": "(B, T, classes, h, w); resize to the frame (bilinear), then argmax",
        "unfamiliarity": UNFAMILIAR,
    },
}
BATCHES = (1, 3)  # that every file is checked at
TOLERANCE = {"onnx": 1e-4, "program": 1e-4, "torchscript": 1e-4, "int8": 0.25}  # of the scale
REPORT = "Report it, with your versions of torch and onnxruntime"
Pairs = Sequence[tuple[Tensor, tuple[Tensor, ...]]]  # clips, what a network makes of them


class ExportError(ValueError):
    """A file that does not compute what the network does."""


@dataclass
class Exported:
    """One written file.

    Attributes:
        file: where.
        deviation: output -> the largest difference from the network on the checked clips,
            absolute and as a share of the output's largest value.
    """

    file: Path
    deviation: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for people."""
        deviations = (
            f"{name} off by up to {absolute:.2g} ({100 * share:.2g} % of its scale)"
            for name, (absolute, share) in self.deviation.items()
        )
        return f"{self.file.name}: {self.file.stat().st_size / 1e6:.1f} MB; {', '.join(deviations)}"


class Distance(nn.Module):
    """:class:`Familiarity` in float32, for few runtimes know float64.

    The inverse of the covariance is split into a root and its transpose: nothing cancels.
    """

    def __init__(self, like: Familiarity) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(like.precision.double())
        root = vectors * (values.clamp_min(0) / len(like.mean)).sqrt() / like.limit.double()
        self.mean: Tensor
        self.root: Tensor
        self.register_buffer("mean", like.mean.clone())
        self.register_buffer("root", root.float().contiguous())  # (D, D)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B,)."""
        return ((features - self.mean) @ self.root).square().sum(1).sqrt()


class Part(nn.Module):
    """What one file computes: encoder, pooling and head.

    Args:
        model: whose.
        kind: a key of PARTS.
    """

    def __init__(self, model: EchoModel, kind: str) -> None:
        super().__init__()
        about = model.heads.get(kind, {})
        self.kind = kind
        self.encoder = model.encoders[about.get("branch", model.branch)]
        self.pooling = about.get("pooling", model.pooling)
        if kind != "embedding":
            self.head = getattr(model, kind)
            self.familiarity = Distance(getattr(model, f"{kind}_familiarity"))
        self.requires_grad_(False).eval()

    def forward(self, clip: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) normalised -> the outputs of PARTS, in their order."""
        tokens = self.encoder(clip)  # (B, g, 1 + n, d)
        grid = self.encoder.grid
        seen = pool_tokens(tokens, grid)
        if self.kind == "embedding":
            return pooled(seen, self.pooling)
        far = self.familiarity(familiar_features(seen["mean"], seen["motion"]))
        if self.kind == "ef":
            return self.head(pooled(seen, self.pooling)), far
        patches = tokens[:, :, 1:].reshape(-1, *grid[1:], tokens.shape[-1])  # (B t, h, w, d)
        maps = self.head(patches)  # (B t, u, C, h', w')
        return maps.unflatten(0, (clip.shape[0], grid[0])).flatten(1, 2), far


def export_model(
    ckpt: str | Path,
    folder: str | Path,
    formats: Sequence[str] = ("onnx", "program"),
    parts: Sequence[str] | None = None,
    branch: str = "video_teacher",
    pooling: str = "cls",
    tell: Callable[[Exported], object] = lambda written: None,
) -> list[Exported]:
    """Writes a model's networks as FOLDER/PART.FORMAT, and checks each.

    Args:
        ckpt: models/model.pt, a training's checkpoint or a converted file.
        folder: made if missing.
        formats: keys of FORMATS.
        parts: keys of PARTS; None: all that the model has.
        branch, pooling: of the embedding.
        tell: called with each file as soon as it is written.

    Raises:
        ExportError: if a file computes something else; it is removed.
        ValueError: an unknown format or part, a head that the model lacks, missing packages.
    """
    _check_names("format", formats, FORMATS)
    _check_names("part", parts or (), PARTS)
    need_packages(formats)
    model = load_model(ckpt, branch, pooling)
    chosen = dict.fromkeys(parts or ("embedding", *model.heads))
    for kind in chosen:
        if kind != "embedding" and kind not in model.heads:
            raise ValueError(
                f"{Path(ckpt).name} has no {kind} head: make one (--save_head of an evaluation), "
                "then a model with it (discovr-monai model)"
            )
    clips = check_clips(model)
    done = []
    for kind in chosen:
        pairs = [(clips[:size], expected(model, kind, clips[:size])) for size in BATCHES]
        network, about = Part(model, kind), describe_part(model, kind)
        names = list(dict.fromkeys(formats))
        for name, content in encode(network, model.clip_shape, list(PARTS[kind]), about, names):
            file = Path(folder) / f"{kind}{FORMATS[name]}"
            done.append(_write(file, name, content, kind, pairs))
            tell(done[-1])
    return done


def check_clips(model: EchoModel) -> Tensor:
    """(3, 3, T, H, W): simulated hearts, prepared as the model's clips are."""
    _, frames, height, width = model.clip_shape
    cines = [
        simulate_cine(seed, num_frames=max(16, frames), size=max(32, height)).frames[:frames]
        for seed in range(max(BATCHES))
    ]
    images = torch.from_numpy(np.stack(cines))[:, None]  # (3, 1, T, s, s)
    images = F.interpolate(images.float(), (frames, height, width)).byte()
    clip = model.about["clip"]
    return PrepareClip(clip["mean"], clip["std"])({"image": images})


def expected(model: EchoModel, kind: str, clip: Tensor) -> tuple[Tensor, ...]:
    """A part's outputs, as inference computes them."""
    looks = model.look(clip)
    if kind == "embedding":
        return (looks["embedding"],)
    far = model.unfamiliarity(kind, looks[f"{kind}_seen"])
    if kind == "ef":
        return model.ef(looks["ef_features"]), far
    return model.segmenter().every_frame(clip), far


def describe_part(model: EchoModel, kind: str) -> dict[str, Any]:
    """What a file says of itself."""
    head, clip = model.heads.get(kind, {}), model.about["clip"]
    about: dict[str, Any] = {
        "notice": NOTICE,
        "model": model.sha256,
        "part": kind,
        "branch": head.get("branch", model.branch),
        "input": "clip (B, 3, T, H, W) float32: (intensity / 255 - mean) / std, grey repeated",
        "clip_shape": list(model.clip_shape),
        **{key: clip[key] for key in ("mean", "std", "stride", "duration")},
        "outputs": PARTS[kind],
        "licence": (model.about.get("source") or {}).get("licence"),
        "views": head.get("views"),
    }
    if kind != "segmentation":
        about["pooling"] = head.get("pooling", model.pooling)
    else:
        about["classes"] = ["background", *model.structures]
    if kind == "ef":
        about |= {"interval": float(model.ef.radius), "coverage": head["coverage"]}
    return {key: value for key, value in about.items() if value is not None}


def deviations(
    run: Run, pairs: Pairs, names: Sequence[str] | Mapping[str, Any]
) -> dict[str, tuple[float, float]]:
    """How far a function is from what it should give.

    Returns:
        Output -> the largest difference, and that as a share of the largest value; NaN where an
        output has another shape or is not finite.
    """
    results = [run(clips) for clips, _ in pairs]
    worst = {}
    for place, name in enumerate(names):
        both = [(got[place], right[place]) for got, (_, right) in zip(results, pairs, strict=True)]
        scale = max(float(b.abs().max()) for _, b in both)
        alike = all(a.shape == b.shape and bool(a.isfinite().all()) for a, b in both)
        largest = max(float((a - b).abs().max()) for a, b in both) if alike else float("nan")
        worst[name] = (largest, largest / scale if scale else largest)
    return worst


def _write(file: Path, name: str, content: bytes, kind: str, pairs: Pairs) -> Exported:
    """Writes and checks; a file of before stays as it was if the new one is wrong."""
    done = Exported(file)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)
        try:
            done.deviation = deviations(open_exported(temporary, name), pairs, PARTS[kind])
        except Exception as error:  # each runtime has its own
            raise ExportError(
                f"{file.name} was removed: it cannot be run ({type(error).__name__}). {REPORT}"
            ) from error
        for output, (_, share) in done.deviation.items():
            if share <= TOLERANCE[name]:
                continue  # NaN does not come here
            off = f"{output} is off by {100 * share:.2g} % of its scale"
            allowed = f"{100 * TOLERANCE[name]:g} % is allowed"
            if name == "int8":
                why = f"eight bits are too few for it ({off}, {allowed}). Export it as onnx only"
            else:
                why = f"it is not what the network computes ({off}, {allowed}). {REPORT}"
            raise ExportError(f"{file.name} was removed: {why}")

    save_atomic(write, file)
    return done


def _check_names(what: str, names: Sequence[str], allowed: Mapping[str, Any]) -> None:
    for name in names:
        if name not in allowed:
            raise ValueError(f"{what} {name!r} must be one of {', '.join(allowed)}")
