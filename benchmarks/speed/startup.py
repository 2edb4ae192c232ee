"""From the command to the first step, and what a training does beside its steps.

    python benchmarks/speed/startup.py                     both parts, five rounds
    python benchmarks/speed/startup.py --parts idle --paper    the paper's size, too
    python benchmarks/speed/startup.py --quick             small and once, to try it out

start  The README's training on a small folder of simulated cines, in processes of their own, from
       their start to the end of the first step; beside it a process that imports torch and MONAI
       and takes a step of the same network without our trainer, data or store. The difference is
       ours.
         cold   no compiled Python anywhere (an empty PYTHONPYCACHEPREFIX), a new output folder
         first  Python compiled, as pip leaves it; a new output folder: cines are scanned and
                decoded, MLflow's store is made
         warm   the same command again
       All find the files in the disk's cache: nothing here empties that.
idle   Seconds of each call that is no step (validation, pictures, checkpoints, diagnoses, MLflow),
       and their share of an epoch of the demo (and of the paper's on EchoNet-Dynamic).

Processes take turns; figures are medians [lowest, highest]. Works below OUT, on its disk; writes
OUT/startup.json, prints its tables; --docs puts them into docs/performance.md. Measure on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from startup_report import PRESETS, imported, tables

from discovr_monai.phantom.dataset import write_phantom_dataset

sys.path.append(str(Path(__file__).parents[1]))
from shared import busy_cores, write_between_markers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "performance.md"
BUNDLE = ROOT / "bundles" / "discovr"
CHILD = Path(__file__).with_name("startup_child.py")
CINES = 24
STATES = ("cold", "first", "warm")
SMALL = {  # for --quick: same parts, seconds instead of minutes
    "image_size": 32, "num_frames": 4, "embed_dim": 24, "depth": 1, "num_heads": 3,
    "decoder_dim": 24, "decoder_depth": 1, "head_outputs": 32, "head_hidden": 16,
    "head_bottleneck": 8, "num_prototypes": 16, "batch_size": 4,
}  # fmt: skip


def main() -> None:
    """Measures what the command line asks for."""
    options = parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        found: dict[str, Any] = {"machine": machine(), "rounds": options.rounds}
        found |= {"quick": options.quick, "cines": CINES, "simulating": make_cines(folder)}
        if "start" in options.parts:
            found["start"] = [one_round(folder, i, options) for i in range(options.rounds + 1)][1:]
            found["imports"] = imports_on_top(folder, options)
        if "idle" in options.parts:
            presets = ["demo"] + ["paper"] * options.paper
            found["idle"] = {preset: calls(folder, preset, options) for preset in presets}
    (out / "startup.json").write_text(json.dumps(found, indent=1))
    print(tables(found))
    if options.docs:
        write_between_markers(DOCS, tables(found), "speed/startup.py")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("start", "idle")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=STATES)
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--paper", action="store_true", help="the paper's size in part idle")
    parser.add_argument("--quick", action="store_true", help="tiny and once: figures mean nothing")
    parser.add_argument("--out", default="output/bench", help="folder for startup.json")
    parser.add_argument("--docs", action="store_true", help="tables into docs/performance.md")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.quick:
        options.rounds = 1
    return options


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "busy_cores": busy_cores(),
    }


def make_cines(folder: Path) -> float:
    """A few cines as the demo's, half as long, below ``folder``; the seconds that it took."""
    start = time.perf_counter()
    write_phantom_dataset(folder / "phantom", num_clips=CINES, num_frames=48, progress=False)
    return time.perf_counter() - start


def start(what: str, command: list[str], *python: str, **environment: str) -> dict[str, Any]:
    """Runs a child to its end; what it found, and its "words" (stderr)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        words = [sys.executable, *python, str(CHILD), what, str(out), *command]
        env = os.environ | environment | {"BORN": repr(time.time())}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # a start compiles for the next one
        done = subprocess.run(words, cwd=BUNDLE, env=env, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise SystemExit(f"{what}: the process failed\n{done.stdout}\n{done.stderr}")
        return json.loads(out.read_text()) | {"words": done.stderr}


def settings(values: dict[str, Any]) -> list[str]:
    """--key value of a bundle's command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def training(folder: Path, output: Path, options: argparse.Namespace) -> list[str]:
    """The README's command on the cines, without their datalist: as on a folder of one's own."""
    changed = {"dataset_dir": folder / "phantom" / "Videos", "output_dir": output, "epochs": 1}
    changed |= SMALL if options.quick else {}
    return ["run", "training", "--config_file", "configs/train.yaml", *settings(changed)]


def plain(options: argparse.Namespace) -> list[str]:
    """The arguments of the process without us."""
    return ["configs/train.yaml", json.dumps(SMALL if options.quick else {})]


def one_round(folder: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """State -> what both processes found; they take turns at going first."""
    print(f"round {number}" + " (warms up)" * (not number), flush=True)
    found: dict[str, Any] = {}
    outputs = {"cold": folder / f"cold{number}", "first": folder / f"output{number}"}
    for state in options.states if number else ["first", "warm"]:
        output = outputs.get(state, outputs["first"])
        ways = {"ours": training(folder, output, options), "plain": plain(options)}
        found[state] = {}
        for what in list(ways) if number % 2 else list(ways)[::-1]:
            empty = {"PYTHONPYCACHEPREFIX": str(folder / f"compiled{number}{what}")}
            child = start(what, ways[what], **(empty if state == "cold" else {}))
            found[state][what] = {key: child[key] for key in ("seconds", "processor", "parts")}
    return found


def imports_on_top(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Package -> seconds of importing what torch and MONAI alone do not (-X importtime)."""
    ways = {"ours": training(folder, folder / "imports", options), "plain": plain(options)}
    watch = ("-X", "importtime")
    seconds = {what: imported(start(what, ways[what], *watch)["words"]) for what in ways}
    more: dict[str, float] = {}
    for module in seconds["ours"].keys() - seconds["plain"].keys():
        package = module.partition(".")[0]
        more[package] = more.get(package, 0.0) + seconds["ours"][module]
    return more


def calls(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What each call of a training takes; validation, pictures and diagnoses at every chance."""
    preset = PRESETS[name]
    batch = SMALL["batch_size"] if options.quick else preset.measured_batch()
    videos = folder / "phantom" / "Videos"
    names = sorted(file.name for file in videos.iterdir())
    rows = [{"image": names[i % CINES]} for i in range(3 * batch)]
    listed = folder / f"{name}.json"
    listed.write_text(json.dumps({"training": rows[: 2 * batch], "validation": rows[2 * batch :]}))
    changed: dict[str, Any] = {
        "dataset_dir": videos, "datalist": listed, "output_dir": folder / f"idle_{name}",
        "epochs": 4, "val_interval": 1, "pictures_every": 1, "diagnose_every": 1, "workers": 0,
        "batch_size": batch,
    }  # fmt: skip
    changed |= SMALL if options.quick else {}
    files = ["configs/train.yaml", *preset.overlays]
    command = ["run", "training", "--config_file", str(files), *settings(changed)]
    print(f"calls of a training, {name}", flush=True)
    child = start("calls", command)
    return {"parts": child["parts"], "calls": child["calls"], "batch": batch}


if __name__ == "__main__":
    main()
