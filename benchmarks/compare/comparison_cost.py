"""What a pretraining of each method costs, in one run on one machine.

    python benchmarks/compare/comparison_cost.py [--steps 20]

A pretraining that was interrupted, or that shared its machine, tells nothing of its time. So each
method of protocol.yaml takes some steps at the recorded size, in a process of its own and in two
rounds with the methods in turns, on phantoms of the protocol's size; the median step times the
number of steps is the time in docs/results.md. Writes results/recorded/cost.json
in this folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from comparison_results import BUNDLE, HERE, protocol

sys.path.append(str(Path(__file__).parents[1]))
from shared import cpu_name

WARM_UP = 3


def main() -> None:
    """Measures every trained method, or in a child one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="of each method in each round")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=Path("output") / "compare")
    options = parser.parse_args()
    if options.method:
        print(json.dumps(measure(options.method, options.work.resolve(), options.steps)))
        return
    plan = protocol("recorded")
    trained = [
        n for n, m in plan["methods"].items() if m.get("train", True) and "checkpoint" not in m
    ]
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in trained}
    if not (options.work / "data" / "datalist.json").exists():
        parser.error(f"--work {options.work} has no data: compare_methods.py run makes it")
    for number in range(2):
        for name in trained if number else reversed(trained):
            measured[name].append(child(name, options.work, options.steps))
            print(f"{name}: {statistics.median(measured[name][-1]['seconds']):.3f} s", flush=True)
    cost = {name: summary(rounds) for name, rounds in measured.items()}
    content = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": 1,
        "methods": cost,
    }
    (plan["results"] / "cost.json").write_text(json.dumps(content, indent=1))


def child(name: str, work: Path, steps: int) -> dict[str, Any]:
    """One round of one method, on one thread."""
    command = [sys.executable, __file__, "--method", name, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))}  # fmt: skip
    done = subprocess.run(
        [*command, "--work", str(work)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest step, and the peak of memory."""
    seconds = [s for one in rounds for s in one["seconds"]]
    return {
        "seconds_per_step": round(statistics.median(seconds), 4),
        "spread": [round(min(seconds), 4), round(max(seconds), 4)],
        "steps": rounds[0]["steps"],
        "gib": round(max(one["gib"] for one in rounds), 2),
    }


def measure(name: str, work: Path, steps: int) -> dict[str, Any]:
    """Seconds of single steps of the bundle's own trainer, and how many a pretraining has."""
    from ignite.engine import Events
    from monai.bundle import ConfigParser

    from discovr_monai.configuration import MOVED

    plan = protocol("recorded")
    method = plan["methods"][name]
    files = ["train.yaml", *([method["config"]] if "config" in method else [])]
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / file) for file in files])
    output = tempfile.TemporaryDirectory()
    settings = plan["settings"] | method.get("overrides", {}) | {
        "seed": 0, "dataset_dir": str(work / "data"), "bundle_root": str(BUNDLE),
        "output_dir": output.name, "cache_dir": str(work / "cache"), "resume": "never",
        "epochs": plan["size"]["epochs"],
    }  # fmt: skip
    for key, value in settings.items():
        parser[MOVED.get(key, key)] = value
    parser.parse()
    trainer = parser.get_parsed_content("train#trainer")
    times = [time.perf_counter()]

    def note(engine: Any) -> None:
        times.append(time.perf_counter())
        if len(times) > steps + WARM_UP:
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run()
    seconds = [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    output.cleanup()
    return {
        "seconds": seconds,
        "steps": trainer.state.epoch_length * plan["size"]["epochs"],
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    main()
