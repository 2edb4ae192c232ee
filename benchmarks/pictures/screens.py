"""How well the sector is found on simulated screens, and pictures of it.

python benchmarks/pictures/screens.py           200 screens: overlap with the truth, what survives
python benchmarks/pictures/screens.py --draw    docs/images/screens.png and augmentation.png
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from discovr_monai.base.types import Cine
from discovr_monai.data.clips.augment import AUGMENTATIONS
from discovr_monai.data.read.pixels import to_grey
from discovr_monai.data.read.sector import prepare_cine, sector_mask
from discovr_monai.phantom.cine import simulate_cine
from discovr_monai.phantom.screen import simulate_screen

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def measure(seed: int) -> tuple[int, float, int]:
    """(seed, intersection over union with the truth, overlay pixels inside)."""
    torch.set_num_threads(1)
    screen = simulate_screen(seed)
    mask = sector_mask(to_grey(screen.frames))
    both, either = mask & screen.sector, mask | screen.sector
    return seed, float(both.sum() / either.sum()), int((mask & screen.overlay).sum())


def draw() -> None:
    """Screens with what the network sees of them, and each augmentation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, 4)
    for column, seed in enumerate((1, 51, 108, 37)):
        screen = simulate_screen(seed)
        cine = Cine(screen.frames, screen.fps, "x", from_dicom=True)
        seen = prepare_cine(cine, 112, "auto", color=False).frames
        axes[0, column].imshow(screen.frames[8])
        axes[1, column].imshow(seen[8], cmap="gray", vmin=0, vmax=255)
        for axis in axes[:, column]:
            axis.set_axis_off()
    axes[0, 0].set_title("simulated screens (no patients)", fontsize=9, loc="left")
    axes[1, 0].set_title("what the network sees (112 x 112)", fontsize=9, loc="left")
    figure.savefig(IMAGES / "screens.png", dpi=80)

    heart = simulate_cine(3, num_frames=16, size=112)
    strengths = {"rotation": 20, "tilt": 20, "depth": 0.4, "gain": 0.25, "speckle": 0.35,
                 "haze": 0.9, "shadow": 0.95, "cutout": 0.45, "reverse": 1.0}  # fmt: skip
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(2, 5).ravel()
    axes[0].set_title("as it is", fontsize=9)
    axes[0].imshow(heart.frames[4], cmap="gray", vmin=0, vmax=255)
    for axis, (name, kind) in zip(axes[1:], AUGMENTATIONS.items(), strict=False):
        transform = kind(strengths[name])
        transform.set_random_state(seed=4)
        image = transform({"image": torch.from_numpy(heart.frames)[None]})["image"]
        axis.set_title(f"{name}: {strengths[name]:g}", fontsize=9)
        axis.imshow(image[0, 4], cmap="gray", vmin=0, vmax=255)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(IMAGES / "augmentation.png", dpi=80)


def main() -> None:
    """Measures or draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", type=int, default=200)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw()
        return
    with ProcessPoolExecutor(2) as pool:
        screens = list(pool.map(measure, range(options.screens)))
    overlap = np.array([value for _, value, _ in screens])
    worst = min(screens, key=lambda item: item[1])
    print(
        f"{len(screens)} screens: overlap with the truth at least {overlap.min():.3f} "
        f"(seed {worst[0]}), median {np.median(overlap):.3f}; below 0.97: {(overlap < 0.97).sum()}"
    )
    print(f"overlay pixels that survive: {sum(item[2] for item in screens)}")


if __name__ == "__main__":
    main()
