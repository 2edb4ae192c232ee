"""Annotation on phantoms: contours carried through a beat, and which cine to label next.

    python benchmarks/compare/annotation.py propagation [--cines 60]  10 s of a core for each
    python benchmarks/compare/annotation.py sampling [--repeats 5]    minutes of a core per repeat
    python benchmarks/compare/annotation.py report                    docs/annotation_results.md

Both go on where they stopped: what is finished stands in benchmarks/compare/results/annotation/.
The protocol was fixed before the test seeds were seen: whatever was chosen (features, the mixture,
the flow's share) was chosen on the validation seeds (--section validation), among the few
alternatives that docs/annotation_results.md names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.files import save_atomic
from discovr_monai.evaluation.heads.contours import dice
from discovr_monai.evaluation.report.statistics import estimate, mean_metric
from discovr_monai.phantom.cine import PhantomCine, simulate_cine

sys.path.append(str(Path(__file__).parents[1]))
from shared import write_between_markers

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "annotation"
PAGE = ROOT / "docs" / "annotation_results.md"
MODEL = ROOT / "bundles" / "discovr" / "models" / "model.pt"

FIRST_SEED = {"validation": 40_001, "test": 60_001}  # each seed is a patient of its own
POPULATIONS = ("adult", "adult", "adult", "paediatric", "adult", None)  # in turn; None: a mixture
DRAWN: dict[str, tuple[str, ...]] = {"ED and ES": ("ed", "es"), "ED": ("ed",), "ES": ("es",)}
DRAWN["two at random"] = ("random", "random")
STRUCTURES = {"lv_cavity": 1, "myocardium": 2}
METHODS = {
    "encoder": "mixture along the video encoder's features",
    "flow": "optical flow (baseline)",
    "nearest": "nearest drawn frame, unmoved",
    "halfway": "the drawn shapes' mean",
}


# ---- propagation ---------------------------------------------------------------------------


def one_beat(cine: PhantomCine) -> np.ndarray:
    """Frames of a beat that holds the cine's ED and ES."""
    length = int(np.ceil(60 / cine.heart_rate * cine.fps))
    start = max(0, min(cine.ed_frame, len(cine.frames) - length))
    return np.arange(start, min(len(cine.frames), start + length))


def carry(seed: int, population: str | None) -> dict[str, Any]:
    """Mean Dice over a beat's frames that were not drawn, by what is drawn, method, structure."""
    from discovr_monai.data.clips.normalise import PrepareClip
    from discovr_monai.data.read.sector import resize_square
    from discovr_monai.inference.model import load_model
    from discovr_monai.label.learn.propagation import frame_features, propagate, propagate_by_flow

    model = load_model(MODEL)
    cine = simulate_cine(seed, population=population)
    beat = one_beat(cine)
    frames, masks = cine.frames[beat], cine.masks[beat]
    prepare = PrepareClip(model.about["clip"]["mean"], model.about["clip"]["std"])
    small = resize_square(frames, model.clip_shape[2])[None]
    encoder = model.encoders["video_teacher"]
    features = frame_features(encoder, lambda batch: prepare(batch, "cpu"), small)
    ends = {"ed": cine.ed_frame - beat[0], "es": cine.es_frame - beat[0]}
    rng = np.random.default_rng(seed)
    dice_by_drawn: dict[str, Any] = {"seed": seed, "population": cine.population, "kind": cine.kind}
    for name, which in DRAWN.items():
        at = sorted({int(ends[w]) for w in which if w in ends})
        at = at or sorted(rng.choice(len(beat), 2, replace=False).tolist())
        drawn = {t: masks[t] for t in at}
        nearest = np.stack(
            [masks[min(at, key=lambda k, t=t: abs(k - t))] for t in range(len(beat))]
        )
        half = propagate(frames, drawn, np.zeros((len(beat), 1))) if len(at) > 1 else nearest
        maps = {
            "encoder": propagate(frames, drawn, features),
            "flow": propagate_by_flow(frames, drawn),
            "nearest": nearest,
            "halfway": half,
        }
        others = [t for t in range(len(beat)) if t not in at]
        dice_by_drawn[name] = {
            method: {
                part: float(np.nanmean([dice(masks[t] == v, out[t] == v) for t in others]))
                for part, v in STRUCTURES.items()
            }
            for method, out in maps.items()
        }
    return dice_by_drawn


def propagation(cines: int, section: str) -> None:
    """Runs what is missing."""
    file = RESULTS / f"propagation_{section}.json"
    known = {r["seed"]: r for r in _read(file)}
    for number in range(cines):
        seed = FIRST_SEED[section] + number
        if seed not in known:
            known[seed] = carry(seed, POPULATIONS[number % len(POPULATIONS)])
            _write(file, [known[s] for s in sorted(known)])
            print(seed, {k: round(v["encoder"]["lv_cavity"], 3) for k, v in known[seed].items()
                         if k in DRAWN}, flush=True)  # fmt: skip


def propagation_table(section: str = "test") -> str:
    """Markdown: LV cavity and myocardium, and what the encoder's way gains, with intervals."""
    rows = _read(RESULTS / f"propagation_{section}.json")
    patients = [str(r["seed"]) for r in rows]
    lines = [
        f"{len(rows)} simulated patients, a beat each (about two in three adults; never seen in",
        "training or when choosing). Mean Dice over all frames that were not drawn, mean over",
        "patients with its 95 % bootstrap interval over patients.",
        "",
        "| drawn | method | LV cavity | less the flow's, paired | myocardium |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in DRAWN:
        flow = _values(rows, name, "flow", "lv_cavity")
        for method, title in METHODS.items():
            if method == "halfway" and name in ("ED", "ES"):
                continue
            cavity = _values(rows, name, method, "lv_cavity")
            wall = _values(rows, name, method, "myocardium")
            gain = "" if method == "flow" else _interval(cavity - flow, patients, "+.3f")
            lines.append(
                f"| {name} | {title} | {_interval(cavity, patients)} | {gain} | "
                f"{_interval(wall, patients)} |"
            )
    return "\n".join(lines)


def _values(rows: Sequence[Mapping[str, Any]], drawn: str, method: str, part: str) -> np.ndarray:
    return np.array([r[drawn][method][part] for r in rows])


def _interval(values: np.ndarray, patients: Sequence[str], form: str = ".3f") -> str:
    metrics: Callable = lambda weights: {"mean": mean_metric(values, weights)}  # noqa: E731
    interval = estimate(metrics, patients)["mean"]
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


# ---- files ---------------------------------------------------------------------------------


def _read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps(rows, indent=1)
    save_atomic(lambda path: Path(path).write_text(text + "\n"), file)


def report() -> None:
    """Writes the page's tables of what has been run."""
    from annotation_sampling import table

    write_between_markers(PAGE, propagation_table(), "compare/annotation.py propagation")
    if known := _read(RESULTS / "sampling.json"):
        write_between_markers(PAGE, table(known), "compare/annotation.py sampling")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    carrying = commands.add_parser("propagation")
    carrying.add_argument("--cines", type=int, default=60)
    carrying.add_argument("--section", choices=sorted(FIRST_SEED), default="test")
    sampling = commands.add_parser("sampling")
    sampling.add_argument("--repeats", type=int, default=5)
    sampling.add_argument("--work", type=Path, default=ROOT / "output" / "annotation")
    commands.add_parser("report")
    options = parser.parse_args()
    if options.command == "propagation":
        propagation(options.cines, options.section)
    elif options.command == "sampling":
        from annotation_sampling import run

        file = RESULTS / "sampling.json"
        run(options.repeats, MODEL, options.work, _read(file), lambda rows: _write(file, rows))
    else:
        report()


if __name__ == "__main__":
    main()
