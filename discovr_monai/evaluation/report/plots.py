"""The plots of an evaluation.

Each function writes one PNG and returns a sentence that says what it shows, for those who do not
see it. All of them draw on :func:`_figure`, whose style is that of the HTML pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LARGEST_MAP = 2000  # points of a t-SNE
COLOURS = ["0a5a8c", "d55e00", "1b8a6b", "b0568b", "8a6d00", "5b6b7a"]  # for colour-blind eyes
INK, LABEL, GUIDE = "#16212b", "#52606d", "#b9c4cd"
STYLE: Any = {  # as the pages look
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8896a3",
    "axes.labelcolor": INK,
    "axes.titleweight": "semibold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": LABEL,
    "ytick.color": LABEL,
    "legend.frameon": False,
    "font.size": 10,
}


@contextmanager
def _figure(path: Path, columns: int = 1) -> Iterator[Any]:
    """Axes in the pages' style, saved at the end."""
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
    """Confusion matrix of (C, C) counts: rows are the truth, columns the prediction."""
    totals = table.sum(1)
    shares = table / np.maximum(totals, 1)[:, None]
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
    right = [f"{n}: {table[i, i]:g} of {totals[i]:g} right" for i, n in enumerate(classes)]
    return f"Confusion matrix. {'; '.join(right)}."


def draw_roc(path: Path, truth: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> str:
    """One ROC curve for each column of scores (M, n) against truth (M, n) bool."""
    from sklearn.metrics import roc_auc_score, roc_curve

    labels = []
    with _figure(path) as axes:
        axes.plot([0, 1], [0, 1], color=GUIDE, lw=1)
        for name, positive, score in zip(names, truth.T, scores.T, strict=True):
            if 0 < positive.sum() < len(positive):
                false_rate, true_rate, _ = roc_curve(positive, score)
                labels.append(f"{name} (AUROC {roc_auc_score(positive, score):.2f})")
                axes.plot(false_rate, true_rate, label=labels[-1], lw=2)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
        if labels:
            axes.legend(loc="lower right")
    return f"ROC curves: {', '.join(labels) or 'none, for each needs both classes'}."


def draw_map(
    path: Path, features: np.ndarray, colour: np.ndarray, names: Sequence[str] | None, title: str
) -> str | None:
    """Map by t-SNE of at most LARGEST_MAP of the features.

    Args:
        features: (M, D).
        colour: (M,) int classes, or values if ``names`` is None.
        names: of the classes.
        title: what the values are.

    Returns:
        The sentence, or None if nothing is drawn: fewer than five points, or all are equal.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler

    rows = np.random.default_rng(0).permutation(len(features))[:LARGEST_MAP]
    if len(rows) < 5 or not np.ptp(features[rows], axis=0).max() > 1e-9:
        return None  # t-SNE crashes on equal points
    x = StandardScaler().fit_transform(features[rows])
    x = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    tsne = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0)
    points = tsne.fit_transform(x)
    with _figure(path) as axes:
        if names is None:
            dots = axes.scatter(*points.T, c=colour[rows], s=14, cmap="viridis")
            axes.figure.colorbar(dots, label=title).outline.set_visible(False)
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
    """Scatter plot and Bland-Altman plot of (M,) predictions."""
    difference, mean = predicted - truth, (predicted + truth) / 2
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
        right.scatter(mean, difference, s=16, alpha=0.8)
        lines = {"bias": bias, "−1.96 sd": bias - spread, "+1.96 sd": bias + spread}
        for name, value in lines.items():
            right.axhline(value, color=LABEL, ls="-" if name == "bias" else "--", lw=1)
            text = f"{name} {value:.1f}".replace("-", "−")
            right.text(right.get_xlim()[1], value, text, ha="right", va="bottom", color=INK)
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
    """Metrics over the share of the labels; each point is a value with its low and high end."""
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
