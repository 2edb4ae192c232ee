"""A small phantom data set and a way to run the bundle's real commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_module

BUNDLE = Path(__file__).parents[2] / "bundles" / "discovr"
TINY = [
    "--image_size", "32", "--num_frames", "4", "--embed_dim", "24", "--depth", "1",
    "--num_heads", "3", "--decoder_def#embed_dim", "24", "--decoder_def#depth", "1",
    "--video_head_def#out_dim", "32", "--video_head_def#hidden_dim", "16",
    "--video_head_def#bottleneck_dim", "8", "--num_prototypes", "16", "--epochs", "2",
    "--batch_size", "4", "--warmup_epochs", "1", "--val_interval", "1",
]  # fmt: skip


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    from discovr_monai.phantom.dataset import write_phantom_dataset

    folder = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom_dataset(folder, num_clips=24, num_frames=24, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """A copy of the bundle, so that runs leave nothing in the repository."""
    copy = tmp_path_factory.mktemp("bundles") / "discovr"
    ignore = shutil.ignore_patterns("data", "output")
    shutil.copytree(BUNDLE, copy, ignore=ignore)
    return copy


def run(bundle: Path, *arguments: str, launcher: list[str] | None = None, **options):
    """A bundle command; from nothing where it has a launcher or options (as its environment)."""
    if not (launcher or options):
        return run_module("monai.bundle", *arguments, cwd=bundle)
    command = [*(launcher or [sys.executable]), "-m", "monai.bundle", *arguments]
    return subprocess.run(
        command, cwd=bundle, capture_output=True, text=True, timeout=300, **options
    )


def train(bundle: Path, *arguments: str, config: str = "configs/train.yaml", **options):
    return run(bundle, "run", "training", "--config_file", config, *TINY, *arguments, **options)
