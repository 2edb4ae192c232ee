"""The tables of startup.json, as they stand in docs/performance.md, and the arithmetic behind."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from shared import busy_warning

CONFIGS = Path(__file__).parents[2] / "bundles" / "discovr" / "configs"
PAUSE = 5.0  # seconds between MLflow's writes (training.handlers.Tracking)
LITTLE = 0.02  # seconds; smaller parts share a row
TARGET = ("validation", "pictures", "checkpoints")
LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)")


@dataclass(frozen=True)
class Preset:
    """A training whose epochs are reckoned.

    Attributes:
        words: what it is.
        overlays: configs on top of train.yaml.
        clips, validation: cines of its data set.
        cpu_batch: clips of a step that a CPU can be measured on; None for the preset's.
    """

    words: str
    overlays: tuple[str, ...]
    clips: int
    validation: int
    cpu_batch: int | None = None

    def keys(self) -> dict[str, Any]:
        """The user's keys, overlays on top."""
        import yaml

        files = ("configs/train.yaml", *self.overlays)
        texts = [yaml.safe_load((CONFIGS.parent / file).read_text()) for file in files]
        return {key: value for text in texts for key, value in text.items()}

    def measured_batch(self) -> int:
        """Clips of a measured step."""
        import torch

        whole: int = self.keys()["batch_size"]
        return self.cpu_batch if self.cpu_batch and not torch.cuda.is_available() else whole


PRESETS = {
    "demo": Preset("the demo (118 normal and 35 validation cines)", (), 118, 35),
    "paper": Preset(
        "the paper's recipe on EchoNet-Dynamic (7465 and 1288 cines), one process",
        ("configs/paper.yaml",), 7465, 1288, 2,
    ),
}  # fmt: skip


def imported(words: str) -> dict[str, float]:
    """Module -> seconds of its own import, from what -X importtime wrote."""
    return {name: int(micro) / 1e6 for micro, name in LINE.findall(words)}


def idle(found: Mapping[str, Any], preset: Preset) -> dict[str, dict[str, float]]:
    """What an epoch holds: row -> "call" (seconds), "calls" (an epoch's), "share" (of its time).

    Args:
        found: "calls" (part -> seconds of each, first one not counted), "parts" (part -> seconds
            without inner parts) and "batch" (clips of a step, and of the validation).
        preset: whose cadence, batch and data set it is reckoned for.
    """
    keys, batch = preset.keys(), found["batch"]
    size, scale = keys["batch_size"], keys["batch_size"] / batch
    steps = preset.clips // size

    def call(name: str) -> float:
        return statistics.median(found["calls"][name][1:] or found["calls"][name])

    def alone(name: str) -> float:
        return float(found["parts"][name]) / len(found["calls"][name])

    diagnosis = call("diagnosis")
    step = (call("step") - diagnosis) * scale
    if not keys["workers"]:
        step += call("clip") * size  # loading that nothing hides
    validations = 1 / keys["val_interval"]
    small = ("screen, a step", "means, a step", "collapse watch, a step")
    rows = {
        "steps": (step, steps),
        "validation": (call("validation") * preset.validation / batch, validations),
        "pictures": (call("pictures"), 1 / keys["pictures_every"]),
        # last.pt; best.pt at most so often
        "checkpoints": (call("checkpoint"), steps / (keys["save_every"] or steps) + validations),
        "diagnoses": (diagnosis, steps / keys["diagnose_every"]),
        "MLflow: figures of a step": (alone("MLflow, a step"), steps),
        "MLflow: a write": (call("MLflow, a write"), max(1.0, steps * step / PAUSE)),
        "progress bar, means, collapse watch": (sum(alone(name) for name in small), steps),
    }
    epoch = sum(seconds * count for seconds, count in rows.values())
    return {
        name: {"call": seconds, "calls": count, "share": seconds * count / epoch}
        for name, (seconds, count) in rows.items()
    }


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: the machine, the start, where it goes, imports, idle costs."""
    about = found["machine"]
    where = about["gpu"] or f"CPU, {about['cores']} cores"
    lines = [f"{where}, PyTorch {about['torch']}; {found['rounds']} rounds."]
    if found["quick"]:
        lines.append("\n**--quick: tiny sizes. These figures mean nothing.**")
    lines += busy_warning(about["busy_cores"])
    if "start" in found:
        lines += ["", *_start(found["start"]), "", *_parts(found["start"])]
        lines += ["", *_imports(found["imports"])]
        lines.append(
            f"\nThe {found['cines']} cines are simulated once, before that:"
            f" {found['simulating']:.0f} s."
        )
    for name, measured in found.get("idle", {}).items():
        lines += ["", *_idle(idle(measured, PRESETS[name]), PRESETS[name])]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _head(first: str, columns: list[str]) -> list[str]:
    return [_row(first, columns), "| --- |" + " --- |" * len(columns)]


def _start(rounds: list[dict[str, Any]]) -> list[str]:
    states = list(rounds[0])

    def seconds(state: str, what: str) -> list[float]:
        return [r[state][what]["seconds"] for r in rounds]

    ours, plain = ({s: seconds(s, what) for s in states} for what in ("ours", "plain"))
    more = {s: [a - b for a, b in zip(ours[s], plain[s], strict=True)] for s in states}
    return [
        *_head("seconds from the command to the end of the first step", states),
        _row("torch, MONAI and a step, without us", [_spread(plain[s]) for s in states]),
        _row("the training command", [_spread(ours[s]) for s in states]),
        _row("**ours on top** (at most 5)", [f"**{_spread(more[s])}**" for s in states]),
    ]


def _parts(rounds: list[dict[str, Any]]) -> list[str]:
    columns = [(s, what) for s in rounds[0] for what in ("ours", "plain")]

    def median(part: str, state: str, what: str) -> float:
        return statistics.median(r[state][what]["parts"].get(part, 0.0) for r in rounds)

    parts = dict.fromkeys(p for s, w in columns for r in rounds for p in r[s][w]["parts"])
    values = {p: [median(p, s, w) for s, w in columns] for p in parts}
    shown = sorted((p for p in parts if max(values[p]) >= LITTLE), key=lambda p: -max(values[p]))
    rest = [sum(values[p][i] for p in parts if p not in shown) for i in range(len(columns))]
    names = {"ours": "command", "plain": "without us"}
    return [
        *_head("where it goes, median seconds", [f"{s}: {names[w]}" for s, w in columns]),
        *(_row(p, [f"{v:.2f}" for v in values[p]]) for p in shown),
        _row("all the rest", [f"{v:.2f}" for v in rest]),
    ]


def _imports(seconds: Mapping[str, float]) -> list[str]:
    ordered = sorted(seconds.items(), key=lambda item: -item[1])[:10]
    rest = sum(seconds.values()) - sum(value for _, value in ordered)
    return [
        *_head("imported on top of torch and MONAI", ["own seconds (-X importtime, one run)"]),
        *(_row(name, [f"{value:.2f}"]) for name, value in ordered),
        _row("others", [f"{rest:.2f}"]),
    ]


def _idle(rows: Mapping[str, Mapping[str, float]], preset: Preset) -> list[str]:
    spent = {name: row["call"] * row["calls"] for name, row in rows.items()}
    epoch, whole = sum(spent.values()), sum(rows[name]["share"] for name in TARGET)
    fixed = spent["pictures"] + spent["checkpoints"]
    room = 0.05 - spent["validation"] / (spent["validation"] + spent["steps"])
    lines = [
        f"An epoch of {preset.words} takes {epoch:.1f} s here:",
        "",
        *_head("", ["seconds a call", "calls an epoch", "share of the epoch"]),
        *(
            _row(n, [f"{r['call']:.3f}", f"{r['calls']:.2f}", f"{100 * r['share']:.1f} %"])
            for n, r in rows.items()
        ),
        _row(
            "**validation, pictures and checkpoints** (under 5 %)",
            ["", "", f"**{100 * whole:.1f} %**"],
        ),
    ]
    if room > 0:
        lines.append(
            f"\nPictures and checkpoints take {fixed:.2f} s of an epoch, however fast its steps: "
            f"with the validation they stay under 5 % where an epoch takes {fixed / room:.0f} s."
        )
    return lines
