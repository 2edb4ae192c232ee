"""How long a training takes from its command to the end of its first step.

    python benchmarks/speed/startup.py            five rounds
    python benchmarks/speed/startup.py --quick    small and once, to try it out

The README's training starts on a small folder of simulated cines, beside a process that imports
torch and MONAI and takes a step of the same network without our trainer, data or store. The
difference is ours. Each is measured in three states:

    cold   no compiled Python anywhere (an empty PYTHONPYCACHEPREFIX), a new output folder
    first  Python compiled, as pip leaves it, and a new output folder: cines are scanned and
           decoded, MLflow's store is made
    warm   the same command again

All find the files in the disk's cache, which nothing here empties. The processes take turns;
figures are medians [lowest, highest]. The script works below OUT, writes OUT/startup.json and
prints a table; --docs also puts it into docs/performance.md. Measure on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from discovr_monai.base.distributed import local_device
from discovr_monai.phantom.dataset import write_phantom_dataset

sys.path.append(str(Path(__file__).parents[1]))
from shared import busy_warning, machine, write_between_markers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "performance.md"
BUNDLE = ROOT / "bundles" / "discovr"
CHILD = Path(__file__).with_name("startup_child.py")
CINES = 24
STATES = ("cold", "first", "warm")
SMALL = {  # for --quick
    "image_size": 32, "num_frames": 4, "embed_dim": 24, "depth": 1, "num_heads": 3,
    "decoder_def#embed_dim": 24, "decoder_def#depth": 1, "video_head_def#out_dim": 32,
    "video_head_def#hidden_dim": 16, "video_head_def#bottleneck_dim": 8,
    "num_prototypes": 16, "batch_size": 4,
}  # fmt: skip


def main() -> None:
    """Measures and writes the table."""
    options = parse()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        folder = Path(name)
        report = {
            "machine": machine(local_device()),
            "rounds": options.rounds,
            "quick": options.quick,
        }
        videos = folder / "phantom"
        write_phantom_dataset(videos, num_clips=CINES, num_frames=48, progress=False)
        rounds = [one_round(folder, i, options.quick) for i in range(options.rounds + 1)]
        report["start"] = rounds[1:]
    (out / "startup.json").write_text(json.dumps(report, indent=1))
    print(table(report))
    if options.docs:
        write_between_markers(DOCS, table(report), "speed/startup.py")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--quick", action="store_true", help="tiny and once: figures mean nothing")
    parser.add_argument("--out", default="output/bench", help="folder for startup.json")
    parser.add_argument("--docs", action="store_true", help="the table into docs/performance.md")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.quick:
        options.rounds = 1
    return options


def settings(values: dict[str, Any]) -> list[str]:
    """--key value of a bundle's command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def one_round(folder: Path, number: int, quick: bool) -> dict[str, dict[str, float]]:
    """State -> seconds of "ours" and "plain", which take turns at going first."""
    print(f"round {number}" + " (warms up)" * (not number), flush=True)
    seconds: dict[str, dict[str, float]] = {}
    for state in STATES if number else STATES[1:]:
        output = folder / (f"cold{number}" if state == "cold" else f"output{number}")
        changed = {"dataset_dir": folder / "phantom" / "Videos", "output_dir": output, "epochs": 1}
        changed |= SMALL if quick else {}
        training = ["run", "training", "--config_file", "configs/train.yaml", *settings(changed)]
        commands = {
            "ours": training,
            "plain": ["configs/train.yaml", json.dumps(SMALL if quick else {})],
        }
        seconds[state] = {}
        for what in list(commands) if number % 2 else reversed(commands):
            empty = {"PYTHONPYCACHEPREFIX": str(folder / f"compiled{number}{what}")}
            environment = empty if state == "cold" else {}
            seconds[state][what] = start(what, commands[what], **environment)["seconds"]
    return seconds


def start(what: str, command: list[str], **environment: str) -> dict[str, Any]:
    """Runs startup_child.py to its end; what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "start.json"
        words = [sys.executable, str(CHILD), what, str(out), *command]
        env = os.environ | environment | {"BORN": repr(time.time())}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # a start compiles for the next one
        done = subprocess.run(words, cwd=BUNDLE, env=env, capture_output=True, text=True)
        if done.returncode or not out.exists():
            raise SystemExit(f"{what}: the process failed\n{done.stdout}\n{done.stderr}")
        return json.loads(out.read_text())


def table(report: dict[str, Any]) -> str:
    """Markdown: the machine, and the seconds of both processes in each state."""
    about, rounds = report["machine"], report["start"]
    where = about["gpu"] or f"CPU, {about['cores']} cores"
    lines = [f"{where}, PyTorch {about['torch']}; {report['rounds']} rounds."]
    if report["quick"]:
        lines.append("\n**--quick: tiny sizes. These figures mean nothing.**")
    lines += busy_warning(about["busy_cores"])
    states = list(rounds[0])
    rows: dict[str, list[str]] = {}
    for state in states:
        plain, ours = ([r[state][what] for r in rounds] for what in ("plain", "ours"))
        more = [a - b for a, b in zip(ours, plain, strict=True)]
        rows.setdefault("torch, MONAI and a step, without us", []).append(spread(plain))
        rows.setdefault("the training command", []).append(spread(ours))
        rows.setdefault("**ours on top** (at most 5)", []).append(f"**{spread(more)}**")
    head = ["seconds from the command to the end of the first step", *states]
    lines += ["", f"| {' | '.join(head)} |", "| --- |" + " --- |" * len(states)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Median [lowest, highest]."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
