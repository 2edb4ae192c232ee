"""A checkpoint of a network that was never trained: the baseline of every frozen feature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from discovr_monai.base.files import save_atomic
from discovr_monai.configuration import MOVED
from discovr_monai.weights.files import FORMAT, describe_encoders

BUNDLE = Path(__file__).parents[2] / "bundles" / "discovr"


def write_untrained(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the network that train.yaml with ``settings`` (seed among them) starts from."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.yaml"))
    for key, value in settings.items():
        parser[MOVED.get(key, key)] = value
    torch.manual_seed(settings["seed"])
    network = parser.get_parsed_content("network_def")
    about = describe_encoders(network, parser.get_parsed_content("checkpoints#clip"))
    state = {"format": FORMAT, "about": about, "network": network.state_dict()}
    save_atomic(lambda temporary: torch.save(state, temporary), path)
