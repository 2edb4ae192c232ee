"""Pictures of a data set: contact sheet, histograms, near-duplicates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.tables import write_table
from discovr_monai.data.lists.catalogue import Catalogue

BANDS = 8  # of 16 bits: hashes that differ in fewer than 8 bits share one
NEAR = 6  # bits


def near_duplicates(hashes: Mapping[str, str], near: int = NEAR) -> list[tuple[str, str, int]]:
    """Pairs of names whose 128-bit hashes differ in at most ``near`` bits, exactly.

    Args:
        hashes: name -> 32 hexadecimal digits.
        near: below ``BANDS``.

    Returns:
        (name, name, bits that differ), nearest first.
    """
    if not 0 <= near < BANDS:
        raise ValueError(f"near {near} must lie in 0..{BANDS - 1}")
    names = sorted(hashes)
    codes = np.array([list(bytes.fromhex(hashes[n])) for n in names], np.uint8).reshape(-1, 16)
    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for i, code in enumerate(codes[:, 2 * band : 2 * band + 2]):
            buckets[code.tobytes()].append(i)
        for members in buckets.values():
            pairs.update(_close(members, codes, near))
    named = [(names[i], names[j], _bits(codes[i], codes[j])) for i, j in pairs]
    return sorted(named, key=lambda pair: (pair[2], pair[0], pair[1]))


def _bits(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.unpackbits(a ^ b).sum())


def _close(members: Sequence[int], codes: np.ndarray, near: int) -> list[tuple[int, int]]:
    pairs = []
    index = np.array(members)
    for position, i in enumerate(members[:-1]):
        others = index[position + 1 :]
        distance = np.unpackbits(codes[others] ^ codes[i], axis=1).sum(1)
        pairs += [(i, int(j)) for j in others[distance <= near]]
    return pairs


def draw_report(catalogue: Catalogue, folder: str | Path) -> list[Path]:
    """Draws contact_sheet.png and histograms.png, writes duplicates.csv.

    Args:
        catalogue: built with ``check``.
        folder: made if missing. The pictures show patients' images: keep them local.

    Returns:
        The files.

    Raises:
        ValueError: if the catalogue was not checked.
    """
    if not catalogue.seen:
        raise ValueError("a report needs the files' content: build the datalist with check")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    section = {r["image"]: name for name, rows in catalogue.sections.items() for r in rows}
    pairs = near_duplicates({n: s["hash"] for n, s in catalogue.seen.items()})
    across = [p for p in pairs if section.get(p[0]) != section.get(p[1])]
    cells = [
        (a, b, bits, section.get(a, ""), section.get(b, ""),
         "across sections" if section.get(a) != section.get(b) else "within")
        for a, b, bits in pairs
    ]  # fmt: skip
    header = ("file", "file like it", "bits that differ of 128", "section", "section", "where")
    write_table(folder / "duplicates.csv", header, cells)
    _contact_sheet(catalogue, folder / "contact_sheet.png")
    _histograms(catalogue, len(pairs), len(across), folder / "histograms.png")
    return [folder / n for n in ("contact_sheet.png", "histograms.png", "duplicates.csv")]


def _contact_sheet(catalogue: Catalogue, path: Path, columns: int = 12, rows: int = 3) -> None:
    """Evenly spaced cines of every section, their middle frames."""
    from matplotlib.figure import Figure

    sections = {n: r for n, r in catalogue.sections.items() if r}
    figure = Figure(figsize=(columns, 1.1 * rows * len(sections) + 0.4), layout="constrained")
    parts = figure.subfigures(len(sections), 1, squeeze=False)[:, 0]
    for part, (name, items) in zip(parts, sections.items(), strict=True):
        part.suptitle(f"{name}: {len(items)} cines", fontsize=9)
        chosen = np.unique(np.linspace(0, len(items) - 1, columns * rows).astype(int))
        axes = part.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, index in zip(axes, chosen, strict=False):
            pixels = catalogue.seen[items[index]["image"]]["thumbnail"]
            picture = np.frombuffer(pixels, np.uint8).reshape(64, 64)
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
    figure.savefig(path, dpi=100)


def _histograms(catalogue: Catalogue, pairs: int, across: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    rows: dict[str, list[Any]] = {n: list(r) for n, r in catalogue.sections.items() if r}
    for axis, key, title in (
        (axes[0, 0], "num_frames", "frames"), (axes[0, 1], "fps", "frames per second"),
        (axes[0, 2], "ef", "ejection fraction (%)"),
    ):  # fmt: skip
        values = {n: [float(r[key]) for r in items if r.get(key)] for n, items in rows.items()}
        filled = [v for v in values.values() if v]
        axis.set_title(title, fontsize=10)
        if not filled:
            axis.text(0.5, 0.5, "not known", ha="center", transform=axis.transAxes)
            continue
        bins = np.histogram_bin_edges(np.concatenate(filled), 30)
        for name, numbers in values.items():
            axis.hist(numbers, bins, histtype="step", label=name)
        axis.legend(fontsize=8)
    sides = [catalogue.seen[r["image"]]["size"] for items in rows.values() for r in items]
    axes[1, 0].scatter(*np.array(sides).T[::-1], s=12, alpha=0.4)
    axes[1, 0].set_title("size of the frames (columns, rows)", fontsize=10)
    classes: dict[str, dict[Any, int]] = {}
    for name, items in rows.items():
        counts = classes.setdefault(name, {})
        for row in items:
            counts[row.get("label", "none")] = counts.get(row.get("label", "none"), 0) + 1
    kinds = sorted({k for c in classes.values() for k in c}, key=str)
    for offset, kind in enumerate(kinds):
        heights = [c.get(kind, 0) for c in classes.values()]
        names = {0: "normal", 1: "abnormal", "none": "no label"}
        places = np.arange(len(classes)) + 0.25 * offset
        axes[1, 1].bar(places, heights, 0.25, label=names.get(kind, kind))
    axes[1, 1].set_xticks(np.arange(len(classes)), list(classes), fontsize=8)
    axes[1, 1].legend(fontsize=8)
    axes[1, 1].set_title("labels", fontsize=10)
    axes[1, 2].set_axis_off()
    aside = len(catalogue.set_aside)
    axes[1, 2].text(
        0.0, 0.95,
        f"{catalogue.name}\n\n{sum(map(len, rows.values()))} cines, {aside} set aside\n"
        f"{pairs} pairs look alike, {across} of them in two sections\n(duplicates.csv)",
        va="top",
    )  # fmt: skip
    figure.savefig(path, dpi=100)
