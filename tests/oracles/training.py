"""What a training preset is made of, and five steps of it in float64: figures that must stay."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from discovr_monai import DiscovrTrainer

CONFIGS = Path(__file__).parents[2] / "bundles" / "discovr" / "configs"
PRESETS = ("", "small", "paper", "tiny", *(f"baselines/{f.stem}" for f in sorted(
    (CONFIGS / "baselines").glob("*.yaml"))))  # fmt: skip
SMALL = {  # every part of a preset, at a size of seconds
    "image_size": 32, "num_frames": 4, "patch_size": 8, "embed_dim": 24, "depth": 2,
    "num_heads": 3, "decoder_def#embed_dim": 12, "decoder_def#depth": 1,
    "decoder_def#num_heads": 2,
    "video_head_def#out_dim": 40, "video_head_def#hidden_dim": 32,
    "video_head_def#bottleneck_dim": 16, "num_prototypes": 20,
    "mask_ratio": 0.75, "batch_size": 3, "steps_per_epoch": 2,
}  # fmt: skip


def parsed(preset: str, **settings: Any) -> ConfigParser:
    """The config of a preset, on a CPU."""
    parser = ConfigParser()
    names = ["train.yaml", *([f"{preset}.yaml"] if preset else [])]
    parser.read_config([str(CONFIGS / name) for name in names])
    for key, value in settings.items():
        parser[key] = value
    parser["device"] = torch.device("cpu")
    return parser


def shapes_of(preset: str) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a preset's state dict; no memory is filled."""
    with torch.device("meta"):
        network = parsed(preset).get_parsed_content("network_def")
    return {name: list(tensor.shape) for name, tensor in sorted(network.state_dict().items())}


def digest(shapes: dict[str, list[int]]) -> str:
    """One word for all names and shapes."""
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
    return f"{len(shapes)} tensors, {hashlib.sha256(lines.encode()).hexdigest()[:16]}"


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on a name only, the same on every machine."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return torch.from_numpy(generator.standard_normal(shape))


def figures(name: str, tensor: Tensor) -> list[float]:
    """Three numbers that no change of a tensor leaves alone: sums, and a product at random."""
    x = tensor.detach().double()
    direction = drawn(f"direction {name}", tuple(x.shape))
    return [float(x.sum()), float(x.abs().sum()), float((x * direction).sum())]


def five_steps(preset: str) -> dict[str, Any]:
    """Losses of five optimiser steps; gradients of the last; teachers and centres after it.

    Weights and clips are drawn by name with numpy, so that nothing depends on torch's generators.
    """
    parser = parsed(preset, **SMALL)
    network = parser.get_parsed_content("network_def").double()
    for name, tensor in network.state_dict().items():
        if name.endswith(("pos_embed", "weight_g")):
            continue
        around = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else 0.0
        tensor.copy_(around + 0.1 * drawn(name, tuple(tensor.shape)))
    parser["network"] = network
    shape = (SMALL["batch_size"], 1, SMALL["num_frames"], SMALL["image_size"], SMALL["image_size"])
    clips = [np.random.default_rng(i).integers(0, 256, shape, np.uint8) for i in range(5)]
    batches = [{"image": torch.from_numpy(c), "id": ["a", "b", "c"]} for c in clips]
    prepare = parser.get_parsed_content("prepare_batch")
    trainer = DiscovrTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=batches,
        network=network,
        optimizer=parser.get_parsed_content("optimizer"),
        objective=parser.get_parsed_content("loss"),
        masking=parser.get_parsed_content("masking"),
        prepare_batch=lambda *arguments: prepare(*arguments).double(),
        lr=parser.get_parsed_content("train#trainer#lr"),
        teacher_momentum=parser.get_parsed_content("train#trainer#teacher_momentum"),
        gradient_clip=parser["train#trainer#gradient_clip"],
        diagnose_every=0,
    )
    losses: list[dict[str, float]] = []
    from ignite.engine import Events

    def note(engine: Any) -> None:
        names = ("loss", *engine.loss_function.terms, "grad_norm")
        losses.append({name: engine.state.output[0][name] for name in names})

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    state = network.state_dict(keep_vars=True)
    return {
        "losses": losses,
        "gradients": {n: figures(n, t.grad) for n, t in state.items() if t.grad is not None},
        "state": {n: figures(n, t) for n, t in state.items() if not n.endswith("pos_embed")},
    }
