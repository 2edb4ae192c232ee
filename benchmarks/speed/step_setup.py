"""A trainer of the paper's step from the bundle's own configs, and a step of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from discovr_monai.configuration import MOVED
from discovr_monai.training.trainer import DiscovrTrainer

CONFIGS = Path(__file__).parents[2] / "bundles" / "discovr" / "configs"
SIZES = {"S": "small", "B": "paper"}  # the config of each
QUICK = {  # has the same parts, but takes seconds instead of minutes
    "image_size": 32,
    "num_frames": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_def#embed_dim": 24,
    "decoder_def#depth": 1,
    "decoder_def#num_heads": 3,
    "video_head_def#out_dim": 128,
    "video_head_def#hidden_dim": 64,
    "video_head_def#bottleneck_dim": 32,
    "num_prototypes": 40,
    "mask_ratio": 0.75,
}
Batch = dict[str, Any]


def build(
    size: str,
    *,
    batch: int = 2,
    plain: bool = False,
    quick: bool = False,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    **settings: Any,
) -> tuple[DiscovrTrainer, Batch]:
    """A trainer whose weights depend only on the size, and the batch that it is fed.

    Args:
        size: a key of SIZES.
        batch: clips of noise, (batch, 1, T, H, W) uint8.
        plain: builds the plain formulation (plain_step.py) instead of ours.
        quick: tiny sizes.
        device, precision: as in the config.
        settings: other keys of the config.
    """
    from plain_step import PlainDiscovr, PlainTrainer, unfuse

    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.yaml"), str(CONFIGS / f"{SIZES[size]}.yaml")])
    changed = (QUICK if quick else {}) | settings | {"batch_size": batch, "steps_per_epoch": 1000}
    for key, value in changed.items():
        parser[MOVED.get(key, key)] = value
    parser["device"] = torch.device(device)
    if plain:
        parser["network_def#_target_"] = f"{PlainDiscovr.__module__}.{PlainDiscovr.__name__}"
    frames, side = parser["num_frames"], parser["image_size"]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1, frames, side, side)
    clip = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if torch.device(device).type == "cuda":
        clip = clip.pin_memory()  # as the loader does: the step brings it to the GPU
    data = {"image": clip, "id": [str(i) for i in range(batch)]}
    torch.manual_seed(0)
    network = parser.get_parsed_content("network")
    optimizer = parser.get_parsed_content("optimizer")
    if plain:
        unfuse(optimizer)
    trainer = (PlainTrainer if plain else DiscovrTrainer)(
        device=torch.device(device),
        max_epochs=1,
        train_data_loader=[data],
        network=network,
        optimizer=optimizer,
        objective=parser.get_parsed_content("loss"),
        masking=parser.get_parsed_content("masking"),
        prepare_batch=parser.get_parsed_content("prepare_batch"),
        lr=parser.get_parsed_content("train#trainer#lr"),
        teacher_momentum=parser.get_parsed_content("train#trainer#teacher_momentum"),
        precision=precision,
        gradient_clip=parser["train#trainer#gradient_clip"],
        diagnose_every=0,  # an extra of every tenth step, the same in both formulations
    )
    return trainer, data


def step(trainer: DiscovrTrainer, batch: Batch) -> dict[str, float]:
    """The whole iteration of the trainer: from uint8 clips to the teachers' update."""
    trainer.state.iteration += 1
    return trainer._iteration(trainer, batch)[0]


def now(device: torch.device) -> float:
    """A clock in seconds, read once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def difference(trainer: DiscovrTrainer, other: DiscovrTrainer) -> dict[str, float]:
    """Parameter -> |difference of its gradients| / |the other's gradient|, Euclidean norms."""
    relative = {}
    ours = dict(trainer.network.named_parameters())
    for name, parameter in other.network.named_parameters():
        mine, theirs = ours[name].grad, parameter.grad
        if (mine is None) != (theirs is None):
            relative[name] = float("inf")
        elif mine is not None and theirs is not None:
            length = theirs.norm().clamp_min(torch.finfo(theirs.dtype).tiny)
            relative[name] = float((mine - theirs).norm() / length)
    return relative
