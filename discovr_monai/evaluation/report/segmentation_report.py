"""What an evaluation says of segmented cines: figures, EF, pictures and players."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from discovr_monai.base.types import DatalistRow
from discovr_monai.evaluation.heads.contours import (
    dice,
    ejection_fraction,
    grid_ceiling,
    simpson_volume,
)
from discovr_monai.evaluation.report.plots import draw_agreement, draw_curves
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import mean_metric, regression_metrics
from discovr_monai.pages.charts import metric_name
from discovr_monai.pages.drawing import resize_labels
from discovr_monai.pages.overlay import save_overlay
from discovr_monai.pages.page import CineView

PHASES = {"ED": "ed_frame", "ES": "es_frame"}


@dataclass
class Case:
    """One segmented cine.

    Attributes:
        row: of the datalist.
        frames: numbers of the frames that were segmented.
        predicted, truth: (len(frames), S, S) uint8 labels, padded to a square.
        fps: frames per second, or None.
        picture: (T, s, s) uint8, the cine as the network sees it.
    """

    row: DatalistRow
    frames: list[int]
    predicted: np.ndarray
    truth: np.ndarray
    fps: float | None
    picture: np.ndarray

    def spacing(self) -> tuple[float, float]:
        """(row, column) in mm; (1, 1), pixels, where it is unknown."""
        row, column = self.row.get("spacing") or (1.0, 1.0)
        return float(row), float(column)

    def labelled(self) -> dict[str, int]:
        """Phase -> place in ``frames`` of the labelled frames."""
        frames = {p: self.row.get(k) for p, k in PHASES.items()}
        return {p: self.frames.index(f) for p, f in frames.items() if f in self.frames}  # type: ignore[arg-type]

    def volumes(self) -> np.ndarray:
        """(len(frames),) mL of the first structure by Simpson's rule."""
        return np.array([simpson_volume(p == 1, self.spacing()) for p in self.predicted])


def frame_figures(
    truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], structures: Sequence[str]
) -> dict[str, float]:
    """Dice, HD95 and ASSD of each structure of one frame, and their means.

    Args:
        truth, predicted: (H, W) labels.
        spacing: (row, column) mm of a pixel; distances are in its unit.
        structures: names of labels 1, 2, ...

    Returns:
        "dice_NAME", "hd95_NAME", "assd_NAME" and "dice_mean", ...; NaN where undefined.
    """
    figures: dict[str, float] = {}
    for label, name in enumerate(structures, start=1):
        a, b = truth == label, predicted == label
        figures[f"dice_{name}"] = dice(a, b)
        hd95 = assd = float("nan")
        if a.any() and b.any():
            y_pred, y = (torch.from_numpy(m)[None, None].float() for m in (b, a))
            options: Any = {"include_background": True, "spacing": list(spacing)}
            hd95 = float(compute_hausdorff_distance(y_pred, y, percentile=95, **options))
            assd = float(compute_average_surface_distance(y_pred, y, symmetric=True, **options))
        figures[f"hd95_{name}"], figures[f"assd_{name}"] = hd95, assd
    for kind in ("dice", "hd95", "assd"):
        figures[f"{kind}_mean"] = _nanmean([figures[f"{kind}_{n}"] for n in structures])
    return figures


@dataclass(frozen=True)
class Drawing:
    """How cines are drawn.

    Attributes:
        fps: frames per second of the animations.
        read: (row) -> (T, s, s) uint8, the cine as large as the page's players show it.
    """

    fps: float
    read: Callable[[DatalistRow], np.ndarray]


def report(
    results: Results,
    section: str,
    method: str,
    cases: Sequence[Case],
    structures: Sequence[str],
    *,
    grid: tuple[int, int],
    label_fraction: float,
    drawing: Drawing | None,
) -> None:
    """Adds everything that is to be said of a section's cines.

    That is Dice, HD95 and ASSD at ED, at ES and over all labelled frames of a cine, beside the Dice
    that the token grid allows; and where the datalist knows the EF, the EF by Simpson's rule from
    the labelled frames and from the whole curve.

    Args:
        grid: rows and columns of tokens.
        label_fraction: share of the training labels; the grid's ceiling is said once, of all.
        drawing: how to draw; None for no pictures.
    """
    if not all(c.row.get("spacing") for c in cases):  # a mean of mm and pixels would be neither
        cases = [replace(c, row={**c.row, "spacing": None}) for c in cases]  # type: ignore[typeddict-item]
        unit = "pixels"
    else:
        unit = "mm"
    rows = [c.row for c in cases]
    phases = [*PHASES, "all"] if any(c.labelled() for c in cases) else ["all"]
    lv_dice = {}
    for phase in phases:
        figures = _columns([_case_figures(c, phase, structures) for c in cases])
        lv_dice[phase] = figures[f"dice_{structures[0]}"]
        results.add(
            section,
            f"{method}, {phase}",
            rows,
            partial(_means, figures, unit),
            label_fraction=label_fraction,
            headlines={"dice_mean": "Dice"} if label_fraction == 1 and phase == "all" else None,
        )
        if label_fraction == 1:
            ceiling = _columns([_case_ceiling(c, phase, structures, grid) for c in cases])
            results.add(section, f"grid ceiling, {phase}", rows, partial(_means, ceiling, unit))
    columns = {f"dice_{phase}": values for phase, values in lv_dice.items()}
    results.predict(section, method, rows, label_fraction, **columns)
    _ejection_fractions(results, section, method, cases, label_fraction, drawing is not None)
    if drawing is not None:
        _pictures(results, section, cases, lv_dice["all"], structures, drawing)


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _means(figures: Mapping[str, np.ndarray], unit: str, weights: np.ndarray) -> dict[str, Any]:
    """Weighted means; the unit of distances goes into their names."""
    return {
        k if k.startswith("dice") else f"{k}_{unit}": mean_metric(values, weights)
        for k, values in figures.items()
    }


def _places(case: Case, phase: str) -> list[int]:
    """Places in ``frames`` of a phase's frame, or of all frames with a label."""
    labelled = case.labelled()
    if phase != "all":
        return [labelled[phase]] if phase in labelled else []
    return sorted(set(labelled.values())) or [i for i, m in enumerate(case.truth) if m.any()]


def _nanmean(values: Sequence[float]) -> float:
    """Mean of what is defined; NaN of nothing."""
    defined = [v for v in values if np.isfinite(v)]
    return float(np.mean(defined)) if defined else float("nan")


def _mean_over(frames: list[dict[str, float]], keys: Sequence[str]) -> dict[str, float]:
    return {k: _nanmean([f[k] for f in frames]) for k in keys}


def _case_figures(case: Case, phase: str, structures: Sequence[str]) -> dict[str, float]:
    """Means of :func:`frame_figures` over a cine's frames of a phase."""
    keys = [f"{k}_{n}" for k in ("dice", "hd95", "assd") for n in (*structures, "mean")]
    frames = [
        frame_figures(case.truth[i], case.predicted[i], case.spacing(), structures)
        for i in _places(case, phase)
    ]
    return _mean_over(frames, keys)


def _case_ceiling(
    case: Case, phase: str, structures: Sequence[str], grid: tuple[int, int]
) -> dict[str, float]:
    """The Dice that :func:`grid_ceiling` reaches, likewise."""
    frames = []
    for i in _places(case, phase):
        best = grid_ceiling(case.truth[i], grid, len(structures) + 1)
        dices = {
            f"dice_{n}": dice(case.truth[i] == v, best == v)
            for v, n in enumerate(structures, start=1)
        }
        frames.append({**dices, "dice_mean": _nanmean(list(dices.values()))})
    return _mean_over(frames, [f"dice_{n}" for n in (*structures, "mean")])


def _ejection_fractions(
    results: Results,
    section: str,
    method: str,
    cases: Sequence[Case],
    label_fraction: float,
    draw: bool,
) -> None:
    """Adds the EF by Simpson's rule of the cines whose true EF is known."""
    cases = [c for c in cases if c.row.get("ef") is not None]
    if len(cases) < 2:
        return
    truth = np.array([c.row["ef"] for c in cases])
    predicted: dict[str, list[float]] = {"labelled frames": [], "whole curve": []}
    for case in cases:
        volumes, at = case.volumes(), case.labelled()
        from_frames = ejection_fraction(volumes, at["ED"], at["ES"]) if len(at) == 2 else np.nan
        predicted["labelled frames"].append(from_frames)
        from_curve = ejection_fraction(volumes) if len(volumes) > 2 else np.nan
        predicted["whole curve"].append(from_curve)
    for name, values in predicted.items():
        efs = np.array(values)
        good = np.isfinite(efs)
        if good.sum() < 2:
            continue
        t, p = truth[good], efs[good]
        results.add(
            section,
            f"EF from {name}, {method}",
            [c.row for c, g in zip(cases, good, strict=True) if g],
            partial(regression_metrics, t, p),
            label_fraction=label_fraction,
        )
        if draw:
            file = f"{section}_ef_{name.replace(' ', '_')}.png"
            caption = f"{section}: EF by Simpson's rule from the {name}, against the truth."
            results.draw(file, caption, draw_agreement, t, p, "EF", "%")


def _pictures(
    results: Results,
    section: str,
    cases: Sequence[Case],
    dices: np.ndarray,
    structures: Sequence[str],
    drawing: Drawing,
) -> None:
    """Adds players and animations of the best, median and worst cine, and their areas over time."""
    order = [int(i) for i in np.argsort(-dices, kind="stable") if np.isfinite(dices[i])]
    if not order:
        return
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    curves = {}
    for name, index in chosen.items():
        case = cases[index]
        frames = case.picture[case.frames]
        title = f"{section}, {name} Dice of the {metric_name(structures[0])}"
        draw = (save_overlay, frames, case.predicted, case.truth, drawing.fps)
        results.draw(f"{section}_{name}.gif", title, *draw)
        results.cines.append(_view(case, drawing.read(case.row), title, dices[index], structures))
        seconds = np.array(case.frames) / (case.fps or 1.0)
        area = (case.predicted == 1).sum((1, 2)) * float(np.prod(case.spacing())) / 100
        curves[f"{name} (Dice {dices[index]:.2f})"] = (seconds, area)
    unit = "cm$^2$" if all(c.row.get("spacing") for c in cases) else "pixels / 100"
    quantity = f"{structures[0].replace('_', ' ')} area"
    caption = f"{section}: {quantity} over time, predicted."
    draw_areas = (draw_curves, curves, f"{quantity} ({unit})")
    results.draw(f"{section}_area_time.png", caption, *draw_areas)


def _view(
    case: Case, larger: np.ndarray, title: str, score: float, structures: Sequence[str]
) -> CineView:
    """A case for the page, with its true contours beside the predicted ones."""
    frames = np.ascontiguousarray(larger[case.frames])
    side, spacing = frames.shape[1], case.row.get("spacing")
    scale = case.predicted.shape[1] / side
    at, whole = case.labelled(), len(case.frames) == len(case.picture)
    facts = {"Cine": case.row["id"], f"Dice {metric_name(structures[0])}": f"{score:.2f}"}
    if case.row.get("ef") is not None:
        facts["True EF"] = f"{case.row['ef']:.0f} %"
        if whole and len(case.frames) > 2:
            facts["EF from contours"] = f"{ejection_fraction(case.volumes()):.0f} %"
    return CineView(
        title=title[:1].upper() + title[1:],
        frames=frames,
        fps=case.fps if whole else None,
        labels=resize_labels(case.predicted, side),
        reference=resize_labels(case.truth, side) if case.truth.any() else None,
        structures=[metric_name(s) for s in structures],
        spacing=(scale * float(spacing[0]), scale * float(spacing[1])) if spacing else None,
        ed=at.get("ED"),
        es=at.get("ES"),
        facts=facts,
    )
