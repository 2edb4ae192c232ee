"""What stands where in a page's charts, in percent of width and height, so that charts stretch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CLOSE = 12  # percent of the width; labels that are closer are moved away from each other


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: its place in percent, and the text beside it."""

    at: float
    text: str


def ticks_of(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers from ``low`` or just below to ``high`` or just above.

    Args:
        whole: whether only whole numbers are wanted.

    >>> ticks_of(0, 9.3, 4)
    [0.0, 5.0, 10.0]
    """
    from matplotlib.ticker import MaxNLocator

    least = 1 if whole else 2
    locator = MaxNLocator(count, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=least)
    return [float(v) for v in locator.tick_values(low, high)]


@dataclass(frozen=True)
class Curve:
    """A curve of the area over time.

    Attributes:
        points: of an SVG polyline in a box of 1000 x 1000, y downwards.
        x_ticks, y_ticks: in percent from the left and from the top.
        top: area at the upper edge.
        marks: (name, percent from the left, percent from the top, text-anchor) of ED and ES.
        truth: like ``points``, a line for each run of frames whose true area is known.
    """

    points: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    top: float
    marks: list[tuple[str, float, float, str]]
    truth: list[str]


def draw_curve(
    area: np.ndarray,
    fps: float | None,
    phases: Mapping[str, int],
    truth: np.ndarray | None = None,
) -> Curve:
    """A curve over seconds, or over frames where the frame rate is unknown.

    Args:
        area: (T,) in any unit.
        fps: frames per second, or None.
        phases: "ED" and "ES" -> frame.
        truth: (T,) true areas, NaN where unknown; None for none.
    """
    true = np.full(len(area), np.nan) if truth is None else truth
    last = max(len(area) - 1, 1)
    heights = ticks_of(0, float(np.nanmax([area, true])) or 1.0, 4)
    top = heights[-1]
    x, y = 100 * np.arange(len(area)) / last, 100 - 100 * area / top

    def line(frames: Sequence[int] | np.ndarray, height: np.ndarray) -> str:
        if len(frames) == 1:
            frames = [*frames, *frames]  # a line from a point to itself draws a dot
        return " ".join(f"{10 * x[f]:.0f},{10 * height[f]:.0f}" for f in frames)

    known = np.flatnonzero(np.isfinite(true))
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else []
    end = last / fps if fps else last + 1
    begin = 0 if fps else 1
    times = [t for t in ticks_of(begin, end, 5, whole=not fps) if begin <= t <= end]
    return Curve(
        points=line(range(len(area)), y),
        x_ticks=[Tick(_short(100 * (t - begin) / (end - begin)), f"{t:g}") for t in times],
        y_ticks=[Tick(_short(100 - 100 * v / top), f"{v:g}") for v in heights],
        top=top,
        marks=_marks({name: (_short(x[f]), _short(y[f])) for name, f in phases.items()}),
        truth=[line(run, 100 - 100 * true / top) for run in runs],
    )


def _marks(places: Mapping[str, tuple[float, float]]) -> list[tuple[str, float, float, str]]:
    """Places of names, which stay inside the chart and do not cover each other."""
    ordered = sorted(places.items(), key=lambda item: item[1])
    anchors = {}
    for name, (x, _) in ordered:
        anchors[name] = "start" if x < CLOSE / 2 else "end" if x > 100 - CLOSE / 2 else "middle"
    if len(ordered) == 2 and ordered[1][1][0] - ordered[0][1][0] < CLOSE:
        anchors[ordered[0][0]], anchors[ordered[1][0]] = "end", "start"
    return [(name, x, y, anchors[name]) for name, (x, y) in ordered]


def _short(value: float) -> float:
    return round(float(value), 2)


@dataclass(frozen=True)
class Headline:
    """A figure that is shown large: its name and value, and below it interval and method."""

    name: str
    value: str
    interval: str
    about: str


def headlines_of(figures: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """Headlines of figures like those of :func:`metric_tables`, with "name"; undefined ones go."""
    headlines = []
    for figure in figures:
        value, low, high = (number(figure[k]) for k in ("value", "low", "high"))
        if value is None:
            continue
        n = _digits(max(abs(v) for v in (value, low, high) if v is not None))
        ends = "" if low is None or high is None else f"{_text(low, n)} to {_text(high, n)}"
        about = f"{figure['section']}, {figure['method']}"
        headlines.append(Headline(str(figure["name"]), _text(value, n), ends, about))
    return headlines


def _digits(largest: float) -> int:
    """Decimals that values up to ``largest`` are shown with."""
    return 3 if largest <= 2 else 2 if largest <= 10 else 1


def _text(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class MetricRow:
    """One figure: ``value`` and ``interval`` as text, ``at`` (value, low, high) in percent."""

    method: str
    value: str
    interval: str
    at: tuple[float | None, float | None, float | None]
    count: str


@dataclass(frozen=True)
class MetricGroup:
    """One metric of a section: its name, the ends of its axis, zero's place, its rows."""

    name: str
    ends: tuple[str, str]
    zero: float | None
    rows: list[MetricRow]


@dataclass(frozen=True)
class MetricTable:
    """A section: its name, how many samples of how many patients (if all rows agree), groups."""

    section: str
    count: str
    groups: list[MetricGroup]


def metric_tables(metrics: Sequence[Mapping[str, Any]]) -> list[MetricTable]:
    """Tables of figures by section and metric, in their order.

    Args:
        metrics: as in results.json: section, method, label_fraction, metric, value, low, high
            (None where undefined), and samples and patients if known.
    """
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for figure in metrics:
        sections.setdefault(str(figure["section"]), []).append(figure)
    return [_table(name, figures) for name, figures in sections.items()]


def _table(section: str, figures: Sequence[Mapping[str, Any]]) -> MetricTable:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for figure in figures:
        groups.setdefault(str(figure["metric"]), []).append(figure)
    counts = {_count(f) for f in figures}
    one = counts.pop() if len(counts) == 1 else ""
    return MetricTable(section, one, [_group(n, f, bool(one)) for n, f in groups.items()])


def _group(name: str, figures: Sequence[Mapping[str, Any]], counted: bool) -> MetricGroup:
    numbers = [number(f[k]) for f in figures for k in ("value", "low", "high")]
    drawn = [v for v in numbers if v is not None]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    ends = [0.0, 1.0] if low >= 0 and high <= 1 else ticks_of(min(low, 0), max(high, 0), 4)
    begin, end = ends[0], ends[-1]
    digits = _digits(end - begin)
    shares = any(_share(f) != 1 for f in figures)

    def row(figure: Mapping[str, Any]) -> MetricRow:
        value, low, high = (number(figure[k]) for k in ("value", "low", "high"))
        return MetricRow(
            method=str(figure["method"]) + (f", {_labels(figure)}" if shares else ""),
            value="not defined" if value is None else text(value),
            interval="" if low is None or high is None else f"{text(low)} to {text(high)}",
            at=(place(value), place(low), place(high)),
            count="" if counted else _count(figure),
        )

    def text(value: float) -> str:
        return _text(value, digits)

    def place(value: float | None) -> float | None:
        return None if value is None else _short(100 * (value - begin) / (end - begin))

    return MetricGroup(
        metric_name(name),
        (f"{begin:g}".replace("-", "−"), f"{end:g}"),
        place(0.0) if begin < 0 else None,
        [row(f) for f in figures],
    )


def number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if value is not None and math.isfinite(value) else None


def _share(figure: Mapping[str, Any]) -> float:
    return float(figure.get("label_fraction", 1))


def _labels(figure: Mapping[str, Any]) -> str:
    share = _share(figure)
    return "all labels" if share == 1 else f"{100 * share:g} % of the labels"


def _count(figure: Mapping[str, Any]) -> str:
    samples, patients = figure.get("samples"), figure.get("patients")
    if samples is None:
        return ""
    cines = f"{samples} cine{'' if samples == 1 else 's'}"
    if patients is None:
        return cines
    return f"{cines} of {patients} patient{'' if patients == 1 else 's'}"


_SPELT = {
    "auroc": "AUROC", "auprc": "AUPRC", "f1": "F1", "mae": "MAE", "rmse": "RMSE", "r2": "R²",
    "hd95": "HD95", "assd": "ASSD", "lv": "LV", "la": "LA", "rv": "RV", "ef": "EF", "ed": "ED",
    "es": "ES", "mm": "(mm)", "pixels": "(pixels)", "ml": "(mL)", "pearson": "Pearson r",
}  # fmt: skip


def metric_name(key: str) -> str:
    """A metric's key as people read it.

    >>> metric_name("hd95_lv_mm")
    'HD95 LV (mm)'
    """
    words = re.sub(r"^coverage_([\d.]+)$", r"coverage of the \1 % interval", key).replace("_", " ")
    text = " ".join(_SPELT.get(w, w) for w in words.split(" "))
    return text[:1].upper() + text[1:]
