"""The pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LARGEST_MAP = 2000  # points of a t-SNE


@contextmanager
def _figure(path: Path, columns: int = 1) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 4.5), layout="constrained")
    try:
        yield axes
        figure.savefig(path, dpi=90, metadata={"Software": None})
    finally:
        plt.close(figure)


def draw_confusion(path: Path, table: np.ndarray, classes: Sequence[str], title: str) -> None:
    """(C, C) counts, rows truth, columns predicted."""
    with _figure(path) as axes:
        axes.imshow(
            table / np.maximum(table.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1
        )
        for (row, column), count in np.ndenumerate(table):
            axes.text(column, row, f"{count:g}", ha="center", va="center")
        ticks = range(len(classes))
        axes.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="truth", title=title)
        axes.set_xticklabels(classes)
        axes.set_yticklabels(classes)


def draw_roc(path: Path, truth: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> None:
    """One curve for each column of scores (M, n) against truth (M, n) bool."""
    from sklearn.metrics import roc_auc_score, roc_curve

    with _figure(path) as axes:
        for column, name in enumerate(names):
            if 0 < truth[:, column].sum() < len(truth):
                false, true, _ = roc_curve(truth[:, column], scores[:, column])
                area = roc_auc_score(truth[:, column], scores[:, column])
                axes.plot(false, true, label=f"{name} (AUROC {area:.2f})")
        axes.plot([0, 1], [0, 1], color="0.7", lw=1)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, test")
        axes.legend(loc="lower right")


def draw_map(
    path: Path, features: np.ndarray, colour: np.ndarray, names: Sequence[str] | None, title: str
) -> None:
    """t-SNE of (M, D) features, coloured by class (M,) int, or by a value if names is None."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    rows = np.random.default_rng(0).permutation(len(features))[:LARGEST_MAP]
    if len(rows) < 5 or not np.ptp(features[rows], axis=0).max() > 1e-9:
        return  # nothing to lay out; t-SNE crashes on equal points
    x = StandardScaler().fit_transform(features[rows])
    x = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    place = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0)
    points = place.fit_transform(x)
    with _figure(path) as axes:
        if names is None:
            drawn = axes.scatter(*points.T, c=colour[rows], s=10, cmap="viridis")
            axes.figure.colorbar(drawn, label=title)
        else:
            for number, name in enumerate(names):
                axes.scatter(*points[colour[rows] == number].T, s=10, label=name)
            axes.legend()
        axes.set(xticks=[], yticks=[], title=f"t-SNE of the features: {title}")


def draw_agreement(
    path: Path, truth: np.ndarray, predicted: np.ndarray, quantity: str, unit: str
) -> None:
    """Scatter and Bland-Altman plot of (M,) predictions."""
    difference, middle = predicted - truth, (predicted + truth) / 2
    bias, spread = difference.mean(), 1.96 * difference.std(ddof=1) if len(truth) > 1 else 0.0
    with _figure(path, 2) as (left, right):
        ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
        left.plot(ends, ends, color="0.7", lw=1)
        left.scatter(truth, predicted, s=10)
        left.set(
            xlabel=f"{quantity}, truth ({unit})",
            ylabel=f"{quantity}, predicted ({unit})",
            title="scatter",
        )
        right.scatter(middle, difference, s=10)
        for value, name in (
            (bias, "bias"),
            (bias - spread, "-1.96 sd"),
            (bias + spread, "+1.96 sd"),
        ):
            right.axhline(value, color="0.4", ls="-" if name == "bias" else "--", lw=1)
            right.text(right.get_xlim()[1], value, f"{name} {value:.1f}", ha="right", va="bottom")
        right.set(
            xlabel=f"mean of both ({unit})",
            ylabel=f"predicted - truth ({unit})",
            title="Bland-Altman",
        )


def draw_learning_curve(
    path: Path, shares: Sequence[float], curves: Mapping[str, Sequence[tuple[float, float, float]]]
) -> None:
    """Value, low and high of each metric over the share of labels."""
    with _figure(path) as axes:
        for name, points in curves.items():
            value, low, high = np.array(points, dtype=float).T
            axes.errorbar(
                np.array(shares) * 100, value, [value - low, high - value], marker="o", label=name
            )
        axes.set(xscale="log", xlabel="labels used (%)", title="few labels")
        axes.legend()


def draw_curves(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]], ylabel: str) -> None:
    """Values over time, name -> (seconds, values)."""
    with _figure(path) as axes:
        for name, (seconds, values) in curves.items():
            axes.plot(seconds, values, label=name)
        axes.set(xlabel="time (s)", ylabel=ylabel)
        axes.legend(fontsize="small")


OUTLINES = np.array([[0, 0, 0], [255, 210, 0], [0, 220, 120], [90, 160, 255], [255, 90, 160]])


def save_overlay(
    path: Path,
    frames: np.ndarray,
    predicted: np.ndarray,
    truth: np.ndarray | None,
    fps: float,
    caption: str = "",
) -> None:
    """An animation (GIF): the cine with predicted outlines, beside it with the true areas.

    Args:
        frames: (T, s, s) uint8; predicted, truth: (T, S, S) uint8 labels, S larger or smaller;
            without a truth the outlines stand alone.
        fps: of the animation.
        caption: written below.
    """
    from PIL import Image, ImageDraw

    side, below = 224, 14 if caption else 0
    pictures = []
    for i, frame in enumerate(frames):
        parts = [_outlined(frame, predicted[i], side, filled=False)]
        if truth is not None:
            parts.append(_outlined(frame, truth[i], side, filled=True))
        drawn = np.pad(np.concatenate(parts, 1), ((0, below), (0, 0), (0, 0)))
        picture = Image.fromarray(drawn)
        if caption:
            ImageDraw.Draw(picture).text((4, side + 1), caption, fill=(230, 230, 230))
        # few colours without dithering: half the size, and speckle stays speckle
        pictures.append(picture.quantize(64, dither=Image.Dither.NONE))
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
    )


def _outlined(frame: np.ndarray, labels: np.ndarray, side: int, *, filled: bool) -> np.ndarray:
    """(side, side, 3) uint8: a frame with the outlines, or the areas, of its labels."""
    from PIL import Image

    grey = np.asarray(Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR))
    large = np.asarray(Image.fromarray(labels).resize((side, side), Image.Resampling.NEAREST))
    rgb = grey[..., None].repeat(3, -1).astype(np.float32)
    where = large > 0
    if not filled:
        where = np.zeros(large.shape, bool)
        where[:-1] |= large[:-1] != large[1:]
        where[:, :-1] |= large[:, :-1] != large[:, 1:]
    opacity = 0.35 if filled else 1.0
    colour = OUTLINES[np.minimum(large, len(OUTLINES) - 1)]
    rgb[where] = (1 - opacity) * rgb[where] + opacity * colour[where]
    return rgb.round().astype(np.uint8)
