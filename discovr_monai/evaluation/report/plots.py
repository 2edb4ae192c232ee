"""The pictures of an evaluation; each says in words what it shows, for those who do not see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LARGEST_MAP = 2000  # points of a t-SNE
COLOURS = ["0a5a8c", "d55e00", "1b8a6b", "b0568b", "8a6d00", "5b6b7a"]  # for colour-blind eyes
STYLE: Any = {  # as the pages look
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8896a3",
    "axes.labelcolor": "#16212b",
    "axes.titleweight": "semibold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "font.size": 10,
}
INK, GUIDE = "#16212b", "#b9c4cd"


@contextmanager
def _figure(path: Path, columns: int = 1) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 4.5), layout="constrained")
        try:
            yield axes
            figure.savefig(path, dpi=110, metadata={"Software": None})
        finally:
            plt.close(figure)


def draw_confusion(path: Path, table: np.ndarray, classes: Sequence[str], title: str) -> str:
    """(C, C) counts, rows truth, columns predicted."""
    of_all = table.sum(1)
    shares = table / np.maximum(of_all, 1)[:, None]
    with _figure(path) as axes:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(table):
            colour = "white" if shares[row, column] > 0.6 else INK
            axes.text(column, row, f"{count:g}", ha="center", va="center", color=colour, size=13)
        axes.spines[:].set_visible(False)
        ticks = range(len(classes))
        axes.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="truth", title=title)
        axes.set_xticklabels(classes)
        axes.set_yticklabels(classes)
    right = [f"{n}: {table[i, i]:g} of {of_all[i]:g} right" for i, n in enumerate(classes)]
    return f"Confusion matrix. {'; '.join(right)}."


def draw_roc(path: Path, truth: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> str:
    """One curve for each column of scores (M, n) against truth (M, n) bool."""
    from sklearn.metrics import roc_auc_score, roc_curve

    areas = []
    with _figure(path) as axes:
        axes.plot([0, 1], [0, 1], color=GUIDE, lw=1)
        for column, name in enumerate(names):
            if 0 < truth[:, column].sum() < len(truth):
                false, true, _ = roc_curve(truth[:, column], scores[:, column])
                area = roc_auc_score(truth[:, column], scores[:, column])
                areas.append(f"{name} (AUROC {area:.2f})")
                axes.plot(false, true, label=areas[-1], lw=2)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
        if areas:
            axes.legend(loc="lower right")
    return f"ROC curves: {', '.join(areas) or 'none, for each needs both classes'}."


def draw_map(
    path: Path, features: np.ndarray, colour: np.ndarray, names: Sequence[str] | None, title: str
) -> str | None:
    """t-SNE of (M, D) features, coloured by class (M,) int, or by a value if names is None.

    None where there is nothing to lay out.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    rows = np.random.default_rng(0).permutation(len(features))[:LARGEST_MAP]
    if len(rows) < 5 or not np.ptp(features[rows], axis=0).max() > 1e-9:
        return None  # t-SNE crashes on equal points
    x = StandardScaler().fit_transform(features[rows])
    x = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    place = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0)
    points = place.fit_transform(x)
    with _figure(path) as axes:
        if names is None:
            drawn = axes.scatter(*points.T, c=colour[rows], s=14, cmap="viridis")
            axes.figure.colorbar(drawn, label=title).outline.set_visible(False)
        else:
            for number, name in enumerate(names):
                axes.scatter(*points[colour[rows] == number].T, s=14, alpha=0.8, label=name)
            axes.legend()
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[], title="t-SNE of the features")
    by = title if names is None else f"class ({', '.join(names)})"
    return f"Map (t-SNE) of the features of {len(rows)} cines, coloured by {by}."


def draw_agreement(
    path: Path, truth: np.ndarray, predicted: np.ndarray, quantity: str, unit: str
) -> str:
    """Scatter and Bland-Altman plot of (M,) predictions."""
    difference, middle = predicted - truth, (predicted + truth) / 2
    bias, spread = difference.mean(), 1.96 * difference.std(ddof=1) if len(truth) > 1 else 0.0
    with _figure(path, 2) as (left, right):
        ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
        left.plot(ends, ends, color=GUIDE, lw=1)
        left.scatter(truth, predicted, s=16, alpha=0.8)
        left.set(
            xlabel=f"{quantity}, truth ({unit})",
            ylabel=f"{quantity}, predicted ({unit})",
            title="scatter",
        )
        right.scatter(middle, difference, s=16, alpha=0.8)
        for value, name in (
            (bias, "bias"),
            (bias - spread, "−1.96 sd"),
            (bias + spread, "+1.96 sd"),
        ):
            right.axhline(value, color="#52606d", ls="-" if name == "bias" else "--", lw=1)
            said = f"{name} {value:.1f}".replace("-", "−")
            right.text(right.get_xlim()[1], value, said, ha="right", va="bottom", color=INK)
        right.set(
            xlabel=f"mean of both ({unit})",
            ylabel=f"predicted - truth ({unit})",
            title="Bland-Altman",
        )
    limits = f"{bias - spread:.1f} to {bias + spread:.1f} {unit}"
    return (
        f"{quantity} of {len(truth)} cines, predicted against truth, and their Bland-Altman plot: "
        f"bias {bias:.1f} {unit}, limits of agreement {limits}."
    )


def draw_learning_curve(
    path: Path, shares: Sequence[float], curves: Mapping[str, Sequence[tuple[float, float, float]]]
) -> str:
    """Value, low and high of each metric over the share of labels."""
    with _figure(path) as axes:
        for name, points in curves.items():
            value, low, high = np.array(points, dtype=float).T
            axes.errorbar(
                np.array(shares) * 100, value, [value - low, high - value], marker="o", label=name
            )
        axes.set(xscale="log", xlabel="labels used (%)", title="Few labels")
        axes.legend()
    ends = [f"{n} from {p[0][0]:.2f} to {p[-1][0]:.2f}" for n, p in curves.items()]
    used = f"{100 * shares[0]:g} to {100 * shares[-1]:g} % of the labels"
    return f"Figures over the share of labels, from {used}: {'; '.join(ends)}."


def draw_curves(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]], ylabel: str) -> str:
    """Values over time, name -> (seconds, values)."""
    with _figure(path) as axes:
        for name, (seconds, values) in curves.items():
            axes.plot(seconds, values, label=name, lw=2)
        axes.set(xlabel="time (s)", ylabel=ylabel)
        axes.legend(fontsize="small")
    return f"{ylabel} over time of {', '.join(curves)}."


OUTLINES = np.array([[0, 0, 0], [255, 210, 0], [0, 220, 120], [90, 160, 255], [255, 90, 160]])


def save_overlay(
    path: Path,
    frames: np.ndarray,
    predicted: np.ndarray,
    truth: np.ndarray | None,
    fps: float,
    caption: str = "",
) -> str:
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
    beside = "" if truth is None else ", beside them the true areas"
    return f"Animation of {len(frames)} frames with the predicted outlines{beside}."


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
