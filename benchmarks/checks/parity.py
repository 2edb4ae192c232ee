"""Compares our networks with the outputs of a released model, key by key.

    python benchmarks/checks/parity.py FILE.npz

FILE holds ``state.*`` (a released state dict), ``meta.*``, ``input.*`` and ``expected.*``. Any
widths, depths, patch sizes, frame and prototype counts will do. Exits 1 above 1e-5 of
max(1, max|expected|).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from discovr_monai.losses.sinkhorn import sinkhorn
from discovr_monai.networks.discovr import Discovr
from discovr_monai.weights.files import build_from_released

LIMIT = 1e-5


def load(path: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """The file's arrays by group: state, meta, input, expected."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = torch.from_numpy(np.array(arrays[key]))
    return groups


@torch.no_grad()
def outputs(network: Discovr, inputs: dict, expected: dict) -> dict[str, torch.Tensor]:
    """What we compute for each expected key."""
    clip, mask = inputs["clip"], inputs["global_mask"]
    frames = clip.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B * T, 3, 1, H, W)
    masked = network.video.student(clip, mask)
    video_teacher, image_teacher = network.video.teacher(clip), network.image.teacher(frames)
    ours = {
        "video_encoder_tokens": network.video.student(clip),
        "video_encoder_tokens_masked": masked,
        "video_teacher_tokens": video_teacher,
        "image_student_tokens": network.image.student(frames),
        "image_teacher_tokens": image_teacher,
        "video_teacher_head_logits": network.video.teacher_head(video_teacher[:, 0]),
        "image_teacher_head_logits": network.image.teacher_head(image_teacher[:, 0]),
        "video_decoder_tokens_raster": network.video.decoder(masked, mask),
    }
    if "sinkhorn_scores" in expected:  # an input, stored beside what follows from it
        ours["sinkhorn_assignments"] = sinkhorn(expected["sinkhorn_scores"], 0.05, 10)
    return ours


def errors(path: str | Path) -> dict[str, float]:
    """Largest absolute error of each expected key, relative to max(1, max|expected|)."""
    groups = load(path)
    meta, expected = groups["meta"], groups["expected"]
    network = build_from_released(
        groups["state"],
        num_heads=int(meta["num_heads"]),
        decoder_num_heads=int(meta["decoder_num_heads"]),
    ).eval()
    ours = outputs(network, groups["input"], expected)
    wanted = [key for key in expected if key != "sinkhorn_scores"]
    missing = sorted(set(wanted) - set(ours))
    if missing:
        raise SystemExit(f"no output of ours is known for {missing}")
    relative = {}
    for key in wanted:
        if ours[key].shape != expected[key].shape:
            shapes = f"{tuple(ours[key].shape)} against {tuple(expected[key].shape)}"
            raise SystemExit(f"{key}: shape {shapes}")
        scale = max(1.0, float(expected[key].abs().max()))
        relative[key] = float((ours[key] - expected[key]).abs().max()) / scale
    return relative


def main() -> int:
    """Prints the table; 1 if any error exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="an .npz of the parity layout")
    relative = errors(parser.parse_args().file)
    for key, error in relative.items():
        print(f"{key:32s} {error:.2e} {'ok' if error <= LIMIT else 'TOO LARGE'}")
    return 0 if all(error <= LIMIT for error in relative.values()) else 1  # NaN fails too


if __name__ == "__main__":
    sys.exit(main())
