"""docs/results.md and its picture, and a table of options, from the JSONs of compare_methods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from comparison_results import results_of

from discovr_monai.evaluation.report.statistics import (
    auroc,
    bootstrap_weights,
    classification_metrics,
    mean_metric,
    regression_metrics,
)

SECTIONS = {"test": "Unseen adult phantoms", "shifted": "Shifted: paediatric, brighter, deeper"}


def _array(columns: dict[str, list], key: str) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in columns[key]], dtype=float)


def _f1(c: dict[str, list], w: np.ndarray) -> np.ndarray:
    scores = np.stack([1 - _array(c, "score_1"), _array(c, "score_1")], 1)
    return classification_metrics(_array(c, "truth").astype(int), scores, w)["macro_f1"]


def _mae(c: dict[str, list], w: np.ndarray) -> np.ndarray:
    return regression_metrics(_array(c, "truth"), _array(c, "predicted"), w)["mae"]


def _anomaly(c: dict[str, list], w: np.ndarray) -> np.ndarray:
    return auroc(_array(c, "truth") > 0, _array(c, "score"), w)


def _dice(c: dict[str, list], w: np.ndarray) -> np.ndarray:
    return mean_metric(_array(c, "dice_all"), w)


# heading -> (task, method of the predictions, figure, whether larger is better)
COLUMNS: dict[str, tuple[str, str, Callable, bool]] = {
    "kNN F1": ("knn", "k=10", _f1, True),
    "probe F1": ("linear_probe", "logistic", _f1, True),
    "LVEF MAE": ("lvef", "ridge", _mae, False),
    "LV Dice": ("segmentation", "linear head", _dice, True),
    "anomaly AUROC": ("anomaly", "5 nearest", _anomaly, True),
}
COMPARED = ("kNN F1", "probe F1", "LVEF MAE")
Runs = dict[str, list[dict[str, Any]]]


def read_runs(plan: dict[str, Any]) -> Runs:
    """Method -> its finished seeds, of this protocol only."""
    runs: Runs = {}
    for name in plan["methods"]:
        for file in sorted(results_of(name, plan).glob(f"{name}-[0-9]*.json")):
            content = json.loads(file.read_text())
            if content["seed"] not in plan["size"]["seeds"]:
                continue
            if content["method"] == name and content["protocol"] == plan["key"]:
                runs.setdefault(name, []).append(content)
    return runs


def draws(
    runs: list[dict[str, Any]], section: str, column: str, plan: dict[str, Any]
) -> np.ndarray:
    """(1 + D,) a figure's value and its bootstrap draws over patients, averaged over seeds."""
    task, method, figure, _ = COLUMNS[column]
    patients = [str(p) for p in runs[0]["patients"][section]]
    common = plan["evaluation"]["common"]
    weights = bootstrap_weights(patients, common["bootstrap_draws"], seed=0)
    weights = np.concatenate((np.ones((1, len(patients))), weights))
    predictions = [r["tasks"][task]["predictions"][f"{section}, {method}"] for r in runs]
    return np.mean([figure(columns, weights) for columns in predictions], axis=0)


def _cell(values: np.ndarray, percent: bool = False) -> str:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return (
        f"{values[0]:.3f} [{low:.3f}, {high:.3f}]"
        if not percent
        else f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"
    )


def _main_table(runs: Runs, plan: dict[str, Any], section: str) -> list[str]:
    lines = [
        f"| method | seeds | {' | '.join(COLUMNS)} |",
        f"| --- | --- |{' --- |' * len(COLUMNS)}",
    ]
    for name, per_seed in runs.items():
        cells = [_cell(draws(per_seed, section, c, plan), c == "LVEF MAE") for c in COLUMNS]
        title = plan["methods"][name]["title"]
        lines.append(f"| {title} | {len(per_seed)} | {' | '.join(cells)} |")
    return lines


def _spread_table(runs: Runs, plan: dict[str, Any]) -> list[str]:
    """The value of each seed, for the methods that have several."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name, per_seed in runs.items():
        if len(per_seed) > 1:
            cells = [
                ", ".join(f"{draws([r], 'test', c, plan)[0]:.3g}" for r in per_seed)
                for c in COLUMNS
            ]
            lines.append(f"| {plan['methods'][name]['title']} | {' | '.join(cells)} |")
    return lines


def _difference_table(runs: Runs, plan: dict[str, Any], section: str) -> list[str]:
    lines = [f"| DISCOVR against | {' | '.join(COMPARED)} |", f"| --- |{' --- |' * len(COMPARED)}"]
    for name, per_seed in runs.items():
        if name == "discovr":
            continue
        cells = []
        for column in COMPARED:
            gap = draws(runs["discovr"], section, column, plan) - draws(
                per_seed, section, column, plan
            )
            gap = gap if COLUMNS[column][3] else -gap
            low, high = np.nanpercentile(gap[1:], [2.5, 97.5])
            verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
            cells.append(f"{gap[0]:+.3f} [{low:+.3f}, {high:+.3f}] {verdict}")
        lines.append(f"| {plan['methods'][name]['title']} | {' | '.join(cells)} |")
    return lines


def _cost_table(runs: Runs, plan: dict[str, Any], measured: Path) -> list[str]:
    """Time and memory; of steps where comparison_cost.py has timed them, else of whole runs."""
    cost = json.loads(measured.read_text()) if measured.exists() else None
    said = "Wall time of whole runs, which may have shared their machine."
    if cost is not None:
        said = (
            f"A pretraining is its steps times the median step, on {cost['threads']} thread of "
            f"{cost['cpu']}, {cost['date']}, the methods in turns: "
            "`python benchmarks/compare/comparison_cost.py`. Evaluations are wall times "
            "on a shared machine."
        )
    lines = [
        said,
        "",
        "| method | pretraining (min) | a step (s) | peak memory (GiB) | evaluation (min) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, per_seed in runs.items():
        evaluated = np.mean([r["evaluation_seconds"] for r in per_seed]) / 60
        cells = _cost(per_seed) if cost is None else _step_cost(cost["methods"].get(name))
        title = plan["methods"][name]["title"]
        lines.append(f"| {title} | {' | '.join(cells)} | {evaluated:.1f} |")
    return lines


def _cost(per_seed: list[dict[str, Any]]) -> list[str]:
    minutes = [r["pretraining_seconds"] / 60 for r in per_seed if r.get("pretraining_seconds")]
    memory = [r["pretraining_gib"] for r in per_seed if r.get("pretraining_gib")]
    return [
        f"{np.mean(minutes):.1f}" if minutes else "-",
        "-",
        f"{max(memory):.2f}" if memory else "-",
    ]


def _step_cost(one: dict[str, Any] | None) -> list[str]:
    if one is None:
        return ["-", "-", "-"]
    low, high = one["spread"]
    return [
        f"{one['seconds_per_step'] * one['steps'] / 60:.1f}",
        f"{one['seconds_per_step']:.2f} [{low:.2f}, {high:.2f}]",
        f"{one['gib']:.2f}",
    ]


def _figure_of(run: dict, task: str, section: str, method: str, metric: str) -> str:
    for row in run["tasks"][task]["results"]:
        if (row["section"], row["method"], row["metric"]) == (section, method, metric):
            return f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
    return "?"


def _picture(runs: Runs, plan: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(17, 0.36 * len(runs) + 1.2), sharey=True)
    for axis, column in zip(axes, COLUMNS, strict=True):
        for place, per_seed in enumerate(runs.values()):
            values = draws(per_seed, "test", column, plan)
            low, high = np.nanpercentile(values[1:], [2.5, 97.5])
            colour = "C1" if per_seed[0]["method"] == "discovr" else "C0"
            axis.barh(place, values[0], color=colour)
            axis.plot([low, high], [place, place], color="black", lw=1)
        axis.set_title(column + ("" if COLUMNS[column][3] else " (lower is better)"), fontsize=10)
    axes[0].set_yticks(range(len(runs)), [plan["methods"][n]["title"] for n in runs])
    axes[0].invert_yaxis()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _missing(runs: Runs, plan: dict[str, Any]) -> list[str]:
    """What is not finished, in words; nothing when all is."""
    lacking = []
    for name, method in plan["methods"].items():
        seeds = plan["size"]["seeds"]
        wanted, finished = len(method.get("seeds", seeds)[: len(seeds)]), len(runs.get(name, []))
        if finished < wanted:
            lacking.append(f"{method['title']} ({finished} of {wanted} seeds)")
    return [f"**Not finished yet:** {', '.join(lacking)}.", ""] if lacking else []


def options_tables(plan: dict[str, Any]) -> str:
    """What options.yaml found: figures, and differences from the default."""
    runs = read_runs(plan)
    if "discovr" not in runs:
        return "Nothing to report yet: the default of this protocol is not finished."
    lines = _missing(runs, plan)
    for section, title in SECTIONS.items():
        lines += [f"{title}:", "", *_main_table(runs, plan, section), ""]
        lines += [*_difference_table(runs, plan, section), ""]
    lines += [
        f"{plan['size']['epochs']} epochs under the protocol of [results.md](results.md); "
        "intervals over patients; differences are paired, and positive is better for the default, "
        "which is DISCOVR's first seed there. One seed each: seeds alone differ by as much as some "
        "rows here.",
    ]
    return "\n".join(lines)


def write_report(plan: dict[str, Any], folder: Path, docs: Path) -> None:
    """Writes docs/results.md from what is finished; what is not is named as missing."""
    runs = read_runs(plan)
    if "discovr" not in runs:
        print("nothing to report yet: no DISCOVR run of this protocol is finished")
        return
    name = "results.md" if folder.name == "recorded" else f"results_{folder.name}.md"
    image = docs / "images" / name.replace(".md", ".png")
    _picture(runs, plan, image)
    one = runs["discovr"][0]
    median = _figure_of(one, "lvef", "test", "training median", "mae")
    ceiling = _figure_of(one, "segmentation", "test", "grid ceiling, all", "dice_lv_cavity")
    options = "" if folder.name == "recorded" else " --quick"
    lines = [
        "# What works: the methods under one protocol",
        "",
        "Generated, not written: `python benchmarks/compare/compare_methods.py report"
        + options
        + "` makes "
        "this page from `benchmarks/compare/results/`, `... run"
        + options
        + "` makes those. Everything here is on "
        "**simulated** hearts (see phantom.md): it says how the methods compare at a size that two "
        "cores can train, nothing about patients.",
        "",
        plan["words"].strip(),
        "",
        f"Every method has the same encoder, data and {plan['size']['epochs']} epochs, and the "
        "same settings: `benchmarks/compare/protocol.yaml`. Features are frozen. Intervals are "
        "95 % bootstrap intervals over patients (of the mean over seeds).",
        "",
        f"![bars](images/{image.name})",
        "",
    ]
    lines += _missing(runs, plan)
    for section, title in SECTIONS.items():
        lines += [f"## {title}", "", *_main_table(runs, plan, section), ""]
        if section == "test":
            lines += [
                f"Predicting the training median has a LVEF MAE of {median}. The best LV Dice that "
                f"the token grid allows (the mask averaged to it and upsampled) is {ceiling}.",
                "",
            ]
    lines += ["## Each seed", "", "On the unseen adults.", "", *_spread_table(runs, plan), ""]
    for section, title in SECTIONS.items():
        lines += [
            f"## DISCOVR minus the others: {title}",
            "",
            "Paired over patients; positive is better for DISCOVR (MAE: lower by so much).",
            "",
            *_difference_table(runs, plan, section),
            "",
        ]
    lines += ["## Cost", "", *_cost_table(runs, plan, folder / "cost.json"), ""]
    notes = docs / "results_notes.md"
    if notes.exists() and folder.name == "recorded":
        lines += [notes.read_text()]
    (docs / name).write_text("\n".join(lines))
    print(f"wrote docs/{name}")
