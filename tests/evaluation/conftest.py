"""Tiny checkpoints and labelled phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.vit import VisionTransformer
from discovr_monai.weights.files import FORMAT, describe_encoders

CLIP = {
    "stride": 3, "duration": None, "pad_mode": "loop", "default_fps": None,
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip
SIZES = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def write_checkpoint(path: Path, seed: int = 0, **sizes) -> Path:
    """An untrained network with an image branch."""
    torch.manual_seed(seed)
    network = Discovr(
        video=VisionTransformer(num_frames=4, tubelet_size=2, **(SIZES | sizes)),
        image=VisionTransformer(num_frames=1, tubelet_size=1, qv_bias=False, **(SIZES | sizes)),
    )
    about = describe_encoders(network, CLIP)
    torch.save({"format": FORMAT, "about": about, "network": network.state_dict()}, path)
    return path


def deal(rows: list[dict]) -> dict[str, list[dict]]:
    """Patients of each class dealt in turn to three sections."""
    patients = sorted({(r["label"], r["patient"]) for r in rows})
    sections: dict[str, list[dict]] = {"training": [], "validation": [], "test": []}
    for place, (_, patient) in enumerate(patients):
        name = list(sections)[place % 3]
        sections[name] += [r for r in rows if r["patient"] == patient]
    return sections


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """A phantom folder whose datalist has both classes in every section."""
    from discovr_monai.phantom.dataset import write_phantom_dataset

    folder = tmp_path_factory.mktemp("labelled") / "phantom"
    write_phantom_dataset(
        folder,
        num_clips=30,
        num_frames=20,
        size=64,
        seed=3,
        workers=1,
        progress=False,
        population="adult",
    )
    found = json.loads((folder / "datalist.json").read_text())
    rows = [r for s in ("training", "validation", "test") for r in found[s]]
    (folder / "datalist.json").write_text(json.dumps(deal(rows)))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "last.pt")
