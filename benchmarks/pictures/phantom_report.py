"""How the phantom compares with a real cine: pictures for docs/phantom.md, and the figures.

    python benchmarks/pictures/phantom_report.py

The real cine is the apical four-chamber one inside the pydicom wheel. Its values are as displayed
(log-compressed and post-processed by the scanner); the phantom's envelope is also measured before
compression, where theory asks for a speckle SNR of 1.91.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pydicom

from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.sector import sector_mask
from discovr_monai.phantom.cine import PhantomCine, simulate_cine
from discovr_monai.phantom.heart import KINDS
from discovr_monai.phantom.ultrasound import BEAMS, RANGES, PointSpread, complex_noise

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def describe(name: str, frames: np.ndarray, sector: np.ndarray) -> np.ndarray:
    """Prints the figures of a cine; returns its values inside the sector."""
    values = frames[:, sector].astype(float)  # (T, P)
    low, median, high = np.percentile(values, [10, 50, 90])
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in pairwise(values)]
    print(
        f"{name}: mean {values.mean():.0f}, sd {values.std():.0f}, quantiles 10/50/90 % "
        f"{low:.0f}/{median:.0f}/{high:.0f}; correlation of neighbouring frames "
        f"{np.mean(pairs):.3f}; SNR of an 8 x 8 patch of tissue as displayed "
        f"{patch_snr(frames, sector):.2f}"
    )
    return values.ravel()


def patch_snr(frames: np.ndarray, sector: np.ndarray) -> float:
    """Median mean / sd over the bright 8 x 8 patches of the first frame inside the sector."""
    ratios = []
    for y in range(0, sector.shape[0] - 8, 8):
        for x in range(0, sector.shape[1] - 8, 8):
            patch = frames[0, y : y + 8, x : x + 8].astype(float)
            if sector[y : y + 8, x : x + 8].all() and patch.mean() > frames[0][sector].mean():
                ratios.append(patch.mean() / max(patch.std(), 1e-9))
    return float(np.median(ratios))


def envelope_snr() -> float:
    """Mean / sd of the phantom's envelope in a uniform region, before compression."""
    random = np.random.default_rng(0)
    spread = PointSpread(0.5)
    envelopes = [np.abs(spread(complex_noise(random, (RANGES, BEAMS)))) for _ in range(20)]
    rows = np.stack(envelopes)[:, 20:-20, 8:-8]
    return float(np.median(rows.mean((0, 2)) / rows.std((0, 2))))


def draw_beside(phantom: PhantomCine, real: np.ndarray) -> None:
    """ED, half way and ES of the phantom; three frames of the real cine."""
    middle = (phantom.ed_frame + phantom.es_frame) // 2
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    for axis, frame, name in zip(
        axes[0], (phantom.ed_frame, middle, phantom.es_frame), ("ED", "between", "ES"), strict=True
    ):
        axis.imshow(phantom.frames[frame], cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"phantom, {name}")
    for axis, frame in zip(axes[1], (0, 7, 14), strict=True):
        axis.imshow(real[frame], cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"real, frame {frame}")
    for axis in axes.ravel():
        axis.set_axis_off()
    figure.savefig(IMAGES / "phantom_beside_real.png", dpi=80)


def draw_kinds() -> None:
    """One heart of each kind and population, at end diastole."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.8), layout="constrained")
    cases = [("adult", kind) for kind in KINDS] + [("paediatric", "normal"), ("fetal", "normal")]
    for seed, (axis, (population, kind)) in enumerate(zip(axes.ravel(), cases, strict=True)):
        cine = simulate_cine(seed, num_frames=48, population=population, kind=kind)
        axis.imshow(cine.frames[cine.ed_frame], cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"{population}, {kind.replace('_', ' ')}, EF {cine.ef:.0f} %", fontsize=9)
        axis.set_axis_off()
    figure.savefig(IMAGES / "phantom_kinds.png", dpi=80)


def draw_truth(phantom: PhantomCine) -> None:
    """Masks at ED and ES, and the volume curve."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, frame, name in zip(
        axes, (phantom.ed_frame, phantom.es_frame), ("ED", "ES"), strict=False
    ):
        axis.imshow(phantom.frames[frame], cmap="gray", vmin=0, vmax=255)
        for label, colour in ((1, "tab:red"), (2, "tab:green"), (3, "tab:blue")):
            axis.contour(phantom.masks[frame] == label, [0.5], colors=colour, linewidths=1)
        axis.set_title(f"{name}: LV cavity, myocardium, left atrium", fontsize=9)
        axis.set_axis_off()
    seconds = np.arange(len(phantom.volumes)) / phantom.fps
    axes[2].plot(seconds, phantom.volumes)
    for frame, name in ((phantom.ed_frame, "ED"), (phantom.es_frame, "ES")):
        axes[2].plot(seconds[frame], phantom.volumes[frame], "o", label=name)
    axes[2].set(xlabel="time (s)", ylabel="LV volume (mL)", title=f"EF {phantom.ef:.0f} %")
    axes[2].legend()
    figure.savefig(IMAGES / "phantom_truth.png", dpi=80)


def main() -> None:
    """Draws the pictures and prints the figures."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    real = read_cine(pydicom.examples.get_path("ybr_color"), color="grey").frames
    start = time.perf_counter()
    phantom = simulate_cine(0, population="adult", kind="normal")
    print(f"one clip of 96 frames: {time.perf_counter() - start:.2f} s on one core")
    draw_beside(phantom, real)
    draw_kinds()
    draw_truth(phantom)
    values = {
        "phantom": describe("phantom", phantom.frames, phantom.sector),
        "real": describe("real", real, sector_mask(real)),
    }
    print(f"phantom's envelope in a uniform region: SNR {envelope_snr():.2f} (theory 1.91)")
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, intensities in values.items():
        axis.hist(intensities, 64, range=(0, 255), density=True, histtype="step", label=name)
    axis.set(xlabel="intensity", ylabel="density", title="Intensity inside the sector")
    axis.legend()
    figure.savefig(IMAGES / "phantom_histogram.png", dpi=80)


if __name__ == "__main__":
    main()
