"""Small networks and outputs that many tests share."""

from __future__ import annotations

import os

import pytest
import torch

from discovr_monai.losses.clustering import ClusterDistillation
from discovr_monai.losses.distillation import SelfDistillation
from discovr_monai.losses.objective import Objective
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.vit import VisionTransformer

WIDTH, OUTPUTS, PROTOTYPES = 24, 20, 10


@pytest.fixture(scope="session", autouse=True)
def private_home(tmp_path_factory):
    """One salt for all tests of a process, never the user's own."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


def tiny_encoder(tubelet: int = 2, frames: int = 4, **options) -> VisionTransformer:
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 3}
    return VisionTransformer(num_frames=frames, tubelet_size=tubelet, **(sizes | options))


def tiny_network(**options) -> Discovr:
    """4 frames of 16 x 16: 2 x 4 x 4 video tokens, 16 image tokens."""
    video = tiny_encoder()
    parts = {
        "video": video,
        "video_head": ProjectionHead(WIDTH, OUTPUTS, 16, 8),
        "image": tiny_encoder(1, 1, qv_bias=False),
        "image_head": ProjectionHead(WIDTH, OUTPUTS, 16, 8),
        "decoder": Decoder(
            in_dim=WIDTH, out_dim=WIDTH, grid=video.grid, embed_dim=12, depth=1, num_heads=2
        ),
        "num_prototypes": PROTOTYPES,
    }
    return Discovr(**(parts | options))


def tiny_objective() -> Objective:
    return Objective(
        {
            "video": SelfDistillation("video"),
            "image": SelfDistillation("image"),
            "cluster": ClusterDistillation(),
        }
    )


@pytest.fixture
def network() -> Discovr:
    torch.manual_seed(0)
    return tiny_network()


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randn(3, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
