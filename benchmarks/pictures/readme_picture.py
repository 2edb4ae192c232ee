"""Draws docs/images/readme.png from a trained checkpoint and the demo data.

    python benchmarks/pictures/readme_picture.py --ckpt bundles/discovr/output/pretrain/last.pt \
        --data bundles/discovr/data/phantom
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from monai.bundle import ConfigParser

from discovr_monai.training.pictures import blend, cluster_map, palette, pca_colours, token_maps
from discovr_monai.weights.files import load_strict, read_checkpoint

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
FRAMES = (0, 4, 8, 12)


@torch.no_grad()
def main() -> None:
    """First clip of the test section; no other is tried."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--ckpt", required=True)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "readme.png")
    options = arguments.parse_args()
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles" / "discovr" / "configs" / "train.yaml")
    parser["dataset_dir"] = str(options.data)
    parser["loader"]["store"] = None
    network = parser.get_parsed_content("network_def").eval()
    load_strict(network, read_checkpoint(options.ckpt)["network"], options.ckpt)
    row = json.loads((options.data / "datalist.json").read_text())["test"][0]
    image = parser.get_parsed_content("validate::preprocessing")(row)["image"]
    clip = parser.get_parsed_content("prepare_batch")({"image": image[None]})
    grey = image[0].numpy()  # (T, H, W)
    grid, (frames, side) = network.video.student.grid, grey.shape[:2]
    colours = token_maps(pca_colours(network.video.teacher(clip)[0, 1:]), grid, frames, side)
    nearest = cluster_map(network, clip)[0].numpy()
    clusters = token_maps(palette(len(network.video.prototypes))[nearest], grid, frames, side)
    rows = {
        "input frames": grey,
        "video teacher:\nPCA of tokens": blend(grey, colours, 0.6),
        "image teacher:\nnearest prototype": blend(grey, clusters, 0.6),
    }
    figure, axes = plt.subplots(3, len(FRAMES), figsize=(8.6, 6), layout="constrained")
    for axis_row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, frame in zip(axis_row, FRAMES, strict=True):
            axis.imshow(pictures[frame], cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            if pictures is grey:
                seconds = frame * parser["stride"] / row["fps"]
                axis.set_title(f"{seconds:.2f} s", fontsize=10)
        axis_row[0].set_ylabel(name, fontsize=10)
    figure.suptitle(
        f"A simulated heart ({row['population']}), seen by the demo training", fontsize=11
    )
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
