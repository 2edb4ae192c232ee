"""Draws docs/images/annotate_slicer.png: what a label server sends, laid out as 3D Slicer shows it.

3D Slicer is not started: this is a drawing, and says so. Frames, outlines, names and figures are
the answers of a running server over simulated hearts:

    discovr-monai phantom hearts --clips 15 --frames 48
    discovr-monai label --studies hearts --view A4C
    python benchmarks/pictures/slicer_picture.py
"""

from __future__ import annotations

import argparse
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib
import nibabel
import numpy as np
from monailabel.client.client import MONAILabelClient

from discovr_monai.evaluation.report.plots import INK, STYLE

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

SEGMENTS = ("#80ae80", "#f1d691", "#b17a65")  # what 3D Slicer gives to segments without a colour
RED = "#f34a33"  # of the view whose slices are a cine's frames
SHOWN = ("ef", "ef_low", "ef_high", "edv_ml", "esv_ml", "contour_ef", "ed_frame", "es_frame")


def ask(server: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(T, H, W) frames and labels of the first cine that a server has, and the params."""
    with tempfile.TemporaryDirectory() as folder:
        client = MONAILabelClient(server, folder)
        identity = client.next_sample("first", {})["id"]
        label, params = client.infer("discovr_segmentation", identity, {})
        image = Path(folder) / f"{identity}.nii.gz"
        image.write_bytes(_download(client, identity))
        volumes: Any = (nibabel.load(image), nibabel.load(label))
        frames, labels = (np.asarray(v.dataobj).T for v in volumes)
        Path(label).unlink()
    return frames, labels, params


def _download(client: MONAILabelClient, identity: str) -> bytes:
    address = f"{client.get_server_url()}/datastore/image?image={identity}"
    with urllib.request.urlopen(address) as answer:
        return bytes(answer.read())


def draw_view(axes: Any, frame: np.ndarray, labels: np.ndarray, said: str) -> None:
    """A slice view: the frame, each segment filled thinly and outlined, a red bar above."""
    axes.imshow(frame, cmap="gray", vmin=0, vmax=255, interpolation="bilinear")
    for value, colour in enumerate(SEGMENTS, 1):
        inside = (labels == value).astype(float)
        axes.contourf(inside, [0.5, 1.5], colors=[colour], alpha=0.3)
        axes.contour(inside, [0.5], colors=[colour], linewidths=1.6)
    axes.set(xticks=[], yticks=[])
    axes.add_patch(Rectangle((0, 1), 1, 0.07, transform=axes.transAxes, color=RED, clip_on=False))
    axes.text(0.02, 1.035, said, transform=axes.transAxes, va="center", color="white", fontsize=9)


def draw_segments(axes: Any, names: list[str]) -> None:
    """The segment editor's list."""
    axes.set(xlim=(0, 1), ylim=(6, 0))
    for row, (name, colour) in enumerate(zip(names, SEGMENTS, strict=True)):
        axes.add_patch(Rectangle((0, row + 0.2), 0.09, 0.6, color=colour))
        axes.text(0.14, row + 0.5, name, va="center", color=INK)
    axes.set_title("Segment Editor")
    axes.set_axis_off()


def draw_areas(axes: Any, params: dict[str, Any], names: list[str]) -> None:
    """Areas over time, with ED and ES."""
    areas = params["area_over_time"]
    seconds = areas["seconds"] or range(params["frames"])
    for name, colour in zip(names, SEGMENTS, strict=True):
        axes.plot(seconds, areas[name], color=colour, lw=2.4)
    for frame, word in ((params["ed_frame"], "ED"), (params["es_frame"], "ES")):
        axes.axvline(seconds[frame], color=RED, lw=1)
        axes.text(seconds[frame], 0.02, f" {word}", transform=axes.get_xaxis_transform(), color=RED)
    unit = "cm²" if areas["unit"] == "cm2" else areas["unit"]
    axes.set(xlabel="seconds" if areas["seconds"] else "frame", ylabel=f"area ({unit})")
    axes.set_ylim(0, None)
    axes.set_title("area_over_time, in the params")


def main() -> None:
    """The first cine of a server; no other is tried."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("server", nargs="?", default="http://127.0.0.1:8000")
    frames, labels, params = ask(arguments.parse_args().server)
    names = sorted(params["label_names"], key=params["label_names"].get)
    with matplotlib.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 6.6), layout="constrained")
        parts = figure.subplot_mosaic(
            [["ed", "es", "segments"], ["areas", "areas", "console"]],
            width_ratios=[1, 1, 0.6], height_ratios=[1.6, 1],
        )  # fmt: skip
        for key in ("ed", "es"):
            at = params[f"{key}_frame"]
            draw_view(parts[key], frames[at], labels[at], f"R   frame {at} ({key.upper()})")
        draw_segments(parts["segments"], names)
        draw_areas(parts["areas"], params, names)
        console = "\n".join(f"{key}: {params[key]}" for key in SHOWN)
        parts["console"].text(0, 0.97, console, va="top", family="monospace", color=INK)
        parts["console"].set_title("Python console: params")
        parts["console"].set_axis_off()
        figure.suptitle(
            "Drawn by a script, not a screenshot: what the label server sends for a simulated "
            "heart, as 3D Slicer shows it",
            fontsize=10,
        )
        file = Path(__file__).parents[2] / "docs" / "images" / "annotate_slicer.png"
        figure.savefig(file, dpi=85, metadata={"Software": None})


if __name__ == "__main__":
    main()
