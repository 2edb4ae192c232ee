"""Tiny models with heads, untrained, and a few cines that are partly labelled."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import torch

from discovr_monai.base.types import DatalistRow
from discovr_monai.evaluation.heads.saved import Familiarity
from discovr_monai.evaluation.heads.segmenter import SegmentationHead
from discovr_monai.networks.vit import VisionTransformer
from discovr_monai.weights.files import DESCRIPTION, description_tensor

CLIP = {
    "stride": 2, "duration": None, "pad_mode": "loop", "default_fps": None,
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip
SIZES = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
STRUCTURES = ["lv_cavity", "myocardium"]


def write_model(path: Path, seed: int = 0, structures: list[str] | None = None) -> Path:
    """Both teachers and a segmentation head, with random weights."""
    structures = structures or STRUCTURES
    torch.manual_seed(seed)
    parts = {
        "video_teacher": VisionTransformer(num_frames=4, tubelet_size=2, **SIZES),
        "image_teacher": VisionTransformer(num_frames=1, tubelet_size=1, qv_bias=False, **SIZES),
        "segmentation": SegmentationHead(24, len(structures) + 1, 1),
        "segmentation_familiarity": Familiarity(48),
    }
    head = {"kind": "segmentation", "checkpoint": "0" * 16, "branch": "image_teacher"}
    head |= {"head": "linear", "structures": structures, "views": ["A4C"], "cines": 1}
    about = {
        "video": dict(parts["video_teacher"].settings),
        "image": dict(parts["image_teacher"].settings),
        "decoder_num_heads": None,
        "clip": CLIP,
        "heads": {"segmentation": head},
    }
    tensors = {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}
    torch.save({**tensors, DESCRIPTION: description_tensor(about)}, path)
    return path


def write_cines(root: Path, count: int, frames: int = 8, drawn: tuple[int, ...] = (1, 5)) -> list:
    """Discs that beat, as NIfTI, each of a patient of its own, with labels in some frames."""
    (root / "labels" / "final").mkdir(parents=True)
    y, x = np.ogrid[:40, :40]
    rows: list[DatalistRow] = []
    for number in range(count):
        radii = 10 + 3 * np.cos(np.arange(frames) + number)
        far = np.hypot(y - 20, x - 20)
        labels = np.stack([np.where(far < r, 1, np.where(far < r + 4, 2, 0)) for r in radii])
        noise = np.random.default_rng(number).integers(0, 30, labels.shape)
        cine = (np.array([60, 10, 200])[labels] + noise).astype(np.uint8)
        kept = np.zeros_like(labels, np.uint8)
        kept[list(drawn)] = labels[list(drawn)]
        name = f"c{number:02d}.nii.gz"
        for file, content in ((root / name, cine), (root / "labels" / "final" / name, kept)):
            nibabel.save(nibabel.Nifti1Image(content.transpose(2, 1, 0), np.eye(4)), file)
        row: DatalistRow = {"image": name, "id": f"c{number:02d}", "view": "A4C"}
        rows.append({**row, "patient": f"p{number}", "mask": f"labels/final/{name}"})
    return rows
