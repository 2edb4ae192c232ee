"""Self-supervised learning from heart ultrasound: DISCOVR as a MONAI Bundle.

Public names are resolved on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "read_cine": "discovr_monai.data.read.cine",
    "LoadCined": "discovr_monai.data.clips.transforms",
    "SampleClipd": "discovr_monai.data.clips.transforms",
    "TubeMasking": "discovr_monai.networks.masking",
    "VisionTransformer": "discovr_monai.networks.vit",
    "Discovr": "discovr_monai.networks.discovr",
    "SelfDistillation": "discovr_monai.losses.distillation",
    "ClusterDistillation": "discovr_monai.losses.clustering",
    "Objective": "discovr_monai.losses.objective",
    "DiscovrTrainer": "discovr_monai.training.trainer",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
