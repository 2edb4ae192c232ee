"""Figures and pictures of segmented cines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
        found = self.row.get("spacing") or (1.0, 1.0)
        return float(found[0]), float(found[1])

    def labelled(self) -> dict[str, int]:
        """Phase -> place in ``frames`` of the labelled frames."""
        known = {p: self.row[k] for p, k in PHASES.items() if self.row.get(k) is not None}  # type: ignore[literal-required]
        return {phase: self.frames.index(f) for phase, f in known.items() if f in self.frames}

    def volumes(self) -> np.ndarray:
        """(len(frames),) mL of the first structure by Simpson's rule."""
        return np.array([simpson_volume(p == 1, self.spacing()) for p in self.predicted])


def frame_figures(
    truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], structures: Sequence[str]
) -> dict[str, float]:
    """Dice, HD95 and ASSD of each structure of one frame, and their means; NaN where undefined."""
    found: dict[str, float] = {}
    for label, name in enumerate(structures, start=1):
        a, b = truth == label, predicted == label
        found[f"dice_{name}"] = dice(a, b)
        hd95 = assd = float("nan")
        if a.any() and b.any():
            y_pred, y = (torch.from_numpy(m)[None, None].float() for m in (b, a))
            hd95 = float(
                compute_hausdorff_distance(
                    y_pred, y, include_background=True, percentile=95, spacing=list(spacing)
                )
            )
            assd = float(
                compute_average_surface_distance(
                    y_pred, y, include_background=True, symmetric=True, spacing=list(spacing)
                )
            )
        found[f"hd95_{name}"], found[f"assd_{name}"] = hd95, assd
    for kind in ("dice", "hd95", "assd"):
        found[f"{kind}_mean"] = _nanmean([found[f"{kind}_{n}"] for n in structures])
    return found


def report(
    results: Results,
    section: str,
    method: str,
    cases: Sequence[Case],
    structures: Sequence[str],
    *,
    grid: Sequence[int],
    label_fraction: float = 1.0,
    draw: bool = True,
    fps: float = 15.0,
    read: Callable[[DatalistRow], np.ndarray] | None = None,
) -> None:
    """Adds everything that is to be said of a section's cines.

    Dice, HD95 and ASSD at ED, at ES and over all labelled frames of a cine, beside the Dice that
    the token grid allows; EF by Simpson's rule from the labelled frames and from the whole curve,
    where the datalist knows the EF.

    Args:
        grid: rows and columns of tokens.
        draw: whether to make pictures, fps: of the animations.
        read: a cine's frames (T, s, s) for the page, larger than the network sees them.
    """
    unit = "mm" if all(c.row.get("spacing") for c in cases) else "pixels"
    if unit == "pixels":  # all of them: a mean of both would be neither
        cases = [replace(c, row={**c.row, "spacing": None}) for c in cases]  # type: ignore[typeddict-item]
    phases = [*PHASES, "all"] if any(c.labelled() for c in cases) else ["all"]
    scores = {phase: [_case_figures(c, phase, structures) for c in cases] for phase in phases}
    limit = {phase: [_case_ceiling(c, phase, structures, grid) for c in cases] for phase in phases}
    rows, whole = [c.row for c in cases], label_fraction == 1
    for phase in phases:
        for name, found in ((method, scores[phase]), ("grid ceiling", limit[phase])):
            if name == "grid ceiling" and not whole:
                continue
            main = whole and (name, phase) == (method, "all")
            table = {key: np.array([f[key] for f in found]) for key in found[0]}
            results.add(
                section,
                f"{name}, {phase}",
                rows,
                lambda w, t=table: {_named(k, unit): mean_metric(v, w) for k, v in t.items()},  # type: ignore[misc]
                label_fraction=label_fraction,
                headlines={"dice_mean": "Dice"} if main else None,
            )
    lv = {f"dice_{p}": np.array([f[f"dice_{structures[0]}"] for f in scores[p]]) for p in phases}
    results.predict(section, method, rows, label_fraction, **lv)
    _ejection_fractions(results, section, method, cases, label_fraction, draw)
    if draw:
        _pictures(results, section, cases, lv["dice_all"], structures, fps, read)


def _named(key: str, unit: str) -> str:
    return key if key.startswith("dice") else f"{key}_{unit}"


def _places(case: Case, phase: str) -> list[int]:
    labelled = case.labelled()
    if phase != "all":
        return [labelled[phase]] if phase in labelled else []
    return sorted(set(labelled.values())) or [i for i, m in enumerate(case.truth) if m.any()]


def _nanmean(values: Sequence[float]) -> float:
    """Mean of what is defined; NaN of nothing."""
    defined = [v for v in values if np.isfinite(v)]
    return float(np.mean(defined)) if defined else float("nan")


def _mean_over(found: list[dict[str, float]], keys: Sequence[str]) -> dict[str, float]:
    return {k: _nanmean([f[k] for f in found]) for k in keys}


def _case_figures(case: Case, phase: str, structures: Sequence[str]) -> dict[str, float]:
    keys = [f"{k}_{n}" for k in ("dice", "hd95", "assd") for n in (*structures, "mean")]
    found = [
        frame_figures(case.truth[i], case.predicted[i], case.spacing(), structures)
        for i in _places(case, phase)
    ]
    return _mean_over(found, keys)


def _case_ceiling(
    case: Case, phase: str, structures: Sequence[str], grid: Sequence[int]
) -> dict[str, float]:
    found = []
    for i in _places(case, phase):
        best = grid_ceiling(case.truth[i], (grid[0], grid[1]), len(structures) + 1)
        one = {
            f"dice_{n}": dice(case.truth[i] == v, best == v)
            for v, n in enumerate(structures, start=1)
        }
        found.append({**one, "dice_mean": _nanmean(list(one.values()))})
    return _mean_over(found, [f"dice_{n}" for n in (*structures, "mean")])


def _ejection_fractions(
    results: Results,
    section: str,
    method: str,
    cases: Sequence[Case],
    label_fraction: float,
    draw: bool,
) -> None:
    known = [c for c in cases if c.row.get("ef") is not None]
    if len(known) < 2:
        return
    truth = np.array([c.row["ef"] for c in known])
    from_frames, from_curve = [], []
    for case in known:
        volumes, at = case.volumes(), case.labelled()
        there = len(at) == 2
        from_frames.append(ejection_fraction(volumes, at["ED"], at["ES"]) if there else np.nan)
        from_curve.append(ejection_fraction(volumes) if len(volumes) > 2 else np.nan)
    for name, values in (("labelled frames", from_frames), ("whole curve", from_curve)):
        found = np.array(values)
        good = np.isfinite(found)
        if good.sum() < 2:
            continue
        rows = [c.row for c, g in zip(known, good, strict=True) if g]
        t, p = truth[good], found[good]
        results.add(
            section,
            f"EF from {name}, {method}",
            rows,
            lambda w, t=t, p=p: regression_metrics(t, p, w),  # type: ignore[misc]
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
    scores: np.ndarray,
    structures: Sequence[str],
    fps: float,
    read: Callable[[DatalistRow], np.ndarray] | None,
) -> None:
    """Best, median and worst: players, overlay animations and areas over time."""
    order = [int(i) for i in np.argsort(-scores, kind="stable") if np.isfinite(scores[i])]
    if not order:
        return
    chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    curves = {}
    for name, index in chosen.items():
        case = cases[index]
        frames = case.picture[case.frames]
        words = f"{section}, {name} Dice of the {metric_name(structures[0])}"
        draw = (save_overlay, frames, case.predicted, case.truth, fps)
        results.draw(f"{section}_{name}.gif", words, *draw)
        larger = case.picture if read is None else read(case.row)
        results.cines.append(_view(case, larger, words, float(scores[index]), structures))
        seconds = np.array(case.frames) / (case.fps or 1.0)
        area = (case.predicted == 1).sum((1, 2)) * float(np.prod(case.spacing())) / 100
        curves[f"{name} (Dice {scores[index]:.2f})"] = (seconds, area)
    unit = "cm$^2$" if all(c.row.get("spacing") for c in cases) else "pixels / 100"
    what = f"{structures[0].replace('_', ' ')} area"
    caption = f"{section}: {what} over time, predicted."
    results.draw(f"{section}_area_time.png", caption, draw_curves, curves, f"{what} ({unit})")


def _view(
    case: Case, larger: np.ndarray, words: str, score: float, structures: Sequence[str]
) -> CineView:
    """A case for the page, with its true contours beside the predicted ones."""
    frames = np.ascontiguousarray(larger[case.frames])
    side, spacing = frames.shape[1], case.row.get("spacing")
    scale = case.predicted.shape[1] / side
    at, whole = case.labelled(), len(case.frames) == len(case.picture)
    known = case.truth.any((1, 2))
    facts = {"Cine": case.row["id"], f"Dice {metric_name(structures[0])}": f"{score:.2f}"}
    if case.row.get("ef") is not None:
        facts["True EF"] = f"{case.row['ef']:.0f} %"
        if whole and len(case.frames) > 2:
            facts["EF from contours"] = f"{ejection_fraction(case.volumes()):.0f} %"
    return CineView(
        title=words[:1].upper() + words[1:],
        frames=frames,
        fps=case.fps if whole else None,
        labels=resize_labels(case.predicted, side),
        reference=resize_labels(case.truth, side) if known.any() else None,
        structures=[metric_name(s) for s in structures],
        spacing=(scale * float(spacing[0]), scale * float(spacing[1])) if spacing else None,
        ed=at.get("ED"),
        es=at.get("ES"),
        facts=facts,
    )
