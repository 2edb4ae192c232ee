"""Draws docs/images/sector.png: a raw screen, the sector found, what the network sees.

python benchmarks/pictures/sector_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pydicom

from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.sector import sector_mask

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """The apical four-chamber cine inside the pydicom wheel."""
    path = Path(pydicom.examples.get_path("ybr_color"))
    cine = read_cine(path, color="grey")
    seen = LoadCined(root=path.parent, size=112)({"image": path.name})["image"][0]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    pictures = {
        "as stored": cine.frames[0],
        "what moves: the sector": sector_mask(cine.frames) * 255,
        "what the network sees (112 x 112)": seen[0],
    }
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    figure.savefig(Path(__file__).parents[2] / "docs" / "images" / "sector.png", dpi=80)


if __name__ == "__main__":
    main()
