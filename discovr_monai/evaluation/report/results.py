"""Where an evaluation's results go: JSON, CSV, pictures, an HTML page and MLflow."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from discovr_monai.base.files import write_text
from discovr_monai.base.tracking import log_evaluation
from discovr_monai.base.types import DatalistRow
from discovr_monai.evaluation.features.extract import patients_of
from discovr_monai.evaluation.report.statistics import Estimate, Metrics, estimate
from discovr_monai.pages.page import CineView, Nearest, write_evaluation_page

TITLES = {
    "knn": "Classification by the nearest cines",
    "linear_probe": "Classification by a probe",
    "lvef": "Ejection fraction",
    "anomaly": "Anomaly detection",
    "segmentation": "Segmentation",
}


class Picture(NamedTuple):
    """A picture's file, what it shows (for those who do not see it), and its caption."""

    file: Path
    alt: str
    caption: str


class Results:
    """Collects the figures of one evaluation and writes them when it is finished.

    ``results.json`` and ``results.csv`` hold each metric with its 95 % interval over patients,
    ``predictions.csv`` what was predicted of each cine, by salted id, and ``report.html`` is a page
    that shows all of it. The same checkpoint and data give the same bytes.

    Attributes:
        facts: what else goes into results.json, such as a chosen penalty.
        cines: for the page's players.
        retrieval: for the page, queries with the cases that are nearest to them.

    Args:
        task: "knn", "lvef", ...
        output_dir: folder of all files.
        settings: what was evaluated and how; goes into the JSON and MLflow, so it holds no paths.
        draws, seed: of the bootstrap.
        tracking_uri: MLflow's store, None for none.
        experiment_name: MLflow's experiment.
    """

    def __init__(
        self,
        task: str,
        output_dir: str | Path,
        *,
        settings: Mapping[str, Any] | None = None,
        draws: int = 1000,
        seed: int = 0,
        tracking_uri: str | None = None,
        experiment_name: str = "discovr-evaluation",
    ) -> None:
        if draws < 1:
            raise ValueError(f"bootstrap_draws {draws} must be at least 1")
        self.task, self.folder = task, Path(output_dir)
        self.settings = dict(settings or {})
        self.draws, self.seed = draws, seed
        self.tracking_uri, self.experiment_name = tracking_uri, experiment_name
        self.figures: list[dict[str, Any]] = []
        self.headlines: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.pictures: list[Picture] = []
        self.cines: list[CineView] = []
        self.retrieval: list[tuple[Nearest, Sequence[Nearest]]] = []
        self.predictions: list[dict[str, Any]] = []

    def add(
        self,
        section: str,
        method: str,
        rows: Sequence[DatalistRow],
        metrics: Metrics,
        *,
        label_fraction: float = 1.0,
        headlines: Mapping[str, str] | None = None,
    ) -> dict[str, Estimate]:
        """Computes metrics with intervals over the rows' patients and keeps them.

        Args:
            section: of the datalist ("test").
            method: what made the predictions ("k=10", "ridge", "training median").
            rows: whose samples they are, in the metrics' order.
            metrics: weights (..., M) -> {name: (...)}.
            label_fraction: share of the training labels that was used.
            headlines: metric -> its name among the figures that sum the evaluation up. They stand
                on top of the page, and in MLflow beside those of the same checkpoint's other
                evaluations.
        """
        patients = patients_of(rows)
        estimates = estimate(metrics, patients, self.draws, self.seed)
        for name, figure in estimates.items():
            self.figures.append(
                {
                    "section": section,
                    "method": method,
                    "label_fraction": label_fraction,
                    "metric": name,
                    **{k: _rounded(v) for k, v in figure._asdict().items()},
                    "samples": len(rows),
                    "patients": len(set(patients)),
                }
            )
            if headlines and name in headlines:
                self.headlines.append({**self.figures[-1], "name": headlines[name]})
        return estimates

    def predict(
        self,
        section: str,
        method: str,
        rows: Sequence[DatalistRow],
        label_fraction: float = 1.0,
        **columns: np.ndarray,
    ) -> None:
        """Keeps what was predicted of each row; columns are (M,), or (M, n) for n columns."""
        wide: dict[str, np.ndarray] = {}
        for name, values in columns.items():
            values = np.asarray(values)
            if values.ndim == 1:
                wide[name] = values
            else:
                wide |= {f"{name}_{i}": column for i, column in enumerate(values.T)}
        for i, row in enumerate(rows):
            self.predictions.append(
                {
                    "section": section,
                    "method": method,
                    "label_fraction": label_fraction,
                    "id": row["id"],
                    **{k: _rounded(v[i].item()) for k, v in wide.items()},
                }
            )

    def draw(self, name: str, caption: str, how: Callable[..., str | None], *content: Any) -> None:
        """Makes a picture for the page and MLflow.

        Args:
            name: of the file.
            caption: stands below it.
            how: (file, *content) writes it and returns what it shows, or None if it wrote nothing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / name
        file.unlink(missing_ok=True)  # of a run before
        alt = how(file, *content)
        if alt is not None:
            self.pictures.append(Picture(file, alt, caption))

    def content(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "task": self.task,
            "settings": self.settings,
            "bootstrap": {"draws": self.draws, "seed": self.seed, "over": "patients"},
            **self.facts,
            "results": self.figures,
        }

    def finish(self) -> dict[str, Any]:
        """Writes everything, prints a table, returns :meth:`content`."""
        content = self.content()
        write_text(self.folder / "results.json", json.dumps(content, indent=1) + "\n")
        write_text(self.folder / "results.csv", _csv(self.figures))
        write_text(self.folder / "predictions.csv", _csv(self.predictions))
        self._page()
        print(self.table())
        written = "results.json, results.csv, predictions.csv, report.html"
        print(f"Written: {self.folder.name}/{written}", flush=True)
        if self.tracking_uri:
            files = map(self.folder.joinpath, ("report.html", "results.json", "results.csv"))
            log_evaluation(
                self.tracking_uri,
                experiment=self.experiment_name,
                task=self.task,
                settings=self.settings,
                metrics=self._flat(),
                headlines=self._headlines(),
                artifacts=[*files, *(p.file for p in self.pictures)],
                output_dir=self.folder,
            )
        return content

    def _page(self) -> None:
        """Writes report.html; animations are left out where players show the same."""
        bootstrap = {"bootstrap draws": self.draws, "seed": self.seed}
        about = {**self.settings, **self.facts, **bootstrap}
        shown = [p for p in self.pictures if p.file.suffix != ".gif" or not self.cines]
        write_evaluation_page(
            self.folder / "report.html",
            TITLES.get(self.task, self.task.replace("_", " ").capitalize()),
            self.figures,
            {k: v for k, v in about.items() if v != {}},  # such as the training of a converted file
            [(p.file, p.alt, p.caption) for p in shown],
            self.cines,
            self.retrieval,
            headlines=self.headlines,
        )

    def _headlines(self) -> dict[str, float]:
        """Name -> value of the headlines; sections but the first are named."""
        first = self.headlines[0]["section"] if self.headlines else ""
        return {
            h["name"] if h["section"] == first else f"{h['name']}, {h['section']}": h["value"]
            for h in self.headlines
            if h["value"] is not None
        }

    def _flat(self) -> dict[str, float]:
        """All figures and their intervals under names that MLflow takes."""
        flat = {}
        for f in self.figures:
            share = "" if f["label_fraction"] == 1 else f" {100 * f['label_fraction']:g} percent"
            name = f"{f['section']}/{f['method']}{share}/{f['metric']}"
            name = re.sub(r"[^\w\-. :/]", " ", name)
            for suffix, key in (("", "value"), (" low", "low"), (" high", "high")):
                if f[key] is not None:
                    flat[name + suffix] = f[key]
        return flat

    def table(self) -> str:
        """The figures as text, a line for each section, method and share of labels."""
        groups: dict[tuple, list[str]] = {}
        for f in self.figures:
            key = (f["section"], f["method"], f["label_fraction"])
            value, low, high = (_short(f[k]) for k in ("value", "low", "high"))
            groups.setdefault(key, []).append(f"{f['metric']} {value} [{low}, {high}]")
        lines = [f"{self.task}, with 95 % bootstrap intervals over patients"]
        for (section, method, share), figures in groups.items():
            labels = "" if share == 1 else f", {100 * share:g} % of the labels"
            lines.append(f"  {section}, {method}{labels}: {'; '.join(figures)}")
        return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """A float with six significant digits, or None if it is not finite (JSON has no NaN)."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _short(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    return text.getvalue()
