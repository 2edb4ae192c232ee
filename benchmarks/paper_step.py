"""One optimiser step of configs/paper.yaml with batch_size 2, all else unchanged.

    python benchmarks/paper_step.py --data FOLDER

Prints the losses, the seconds of the step and the process's peak memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from ignite.engine import Events
from monai.bundle import ConfigParser

CONFIGS = Path(__file__).parents[1] / "bundles" / "discovr" / "configs"


def main() -> None:
    """Builds the trainer from the configs and stops it after one step."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", required=True, help="a folder of cines, the demo data say")
    arguments.add_argument("--config", default="paper", choices=["paper", "small"])
    arguments.add_argument("--batch_size", type=int, default=2)
    options = arguments.parse_args()
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.yaml"), str(CONFIGS / f"{options.config}.yaml")])
    parser["bundle_root"] = str(CONFIGS.parent)
    parser["dataset_dir"], parser["batch_size"] = options.data, options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        parser["output_dir"] = folder
        trainer = parser.get_parsed_content("train::trainer")
        clock: list[float] = []

        @trainer.on(Events.ITERATION_STARTED)
        def start() -> None:
            clock.append(time.perf_counter())

        @trainer.on(Events.ITERATION_COMPLETED)
        def stop() -> None:
            clock.append(time.perf_counter())
            trainer.terminate()

        trainer.run()
    output = {k: round(v, 3) for k, v in trainer.state.output[0].items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.config}.yaml, batch_size {options.batch_size}, {trainer.precision}: {output}")
    print(f"one step: {clock[1] - clock[0]:.1f} s; peak memory of the process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
