"""Peak memory of a step, measured in a process of its own; our options on top of the config.

python benchmarks/step_memory.py JSON     used by train_step.py; prints the bytes
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from step_setup import build, step

from discovr_monai.training.trainer import DiscovrTrainer


def memory_ratios(size: str, precisions: list[str], common: dict[str, Any]) -> dict[str, Any]:
    """Bytes of both formulations and plain / ours; memory_ratio is of the first precision."""
    found: dict[str, Any] = {"memory_bytes": {}}
    for precision in precisions:
        job = {"size": size, "precision": precision} | common
        ours, plain = peak_of(job), peak_of(job | {"plain": True})
        found["memory_bytes"] |= {f"ours_{precision}": ours, f"plain_{precision}": plain}
        found[f"memory_ratio_{precision}"] = plain / ours
    return found | {"memory_ratio": found[f"memory_ratio_{precisions[0]}"]}


def peak_of(job: dict[str, Any]) -> float:
    """:func:`peak_memory` of a new process."""
    command = [sys.executable, __file__, json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def peak_memory(job: dict[str, Any]) -> float:
    """Bytes that building the trainer and two steps of it add to this process, or to the GPU."""
    option = job.pop("option", None)
    step(*build(job["size"], quick=True, device=job["device"]))  # imports everything
    before = highest_memory()
    trainer, batch = build(**(settings_of(option) if option else {}), **job)
    if option:
        apply_option(trainer, option)
    for _ in range(2):  # the optimiser's moments come with the first
        step(trainer, batch)
    if job["device"] == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return highest_memory() - before


def highest_memory() -> float:
    """The most memory that this process has held, in bytes.

    On Linux ru_maxrss starts from what the parent held when it started this process; VmHWM is
    the same mark without it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024.0 * int(line.split()[1])
    mark = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return mark if sys.platform == "darwin" else 1024.0 * mark


def settings_of(option: str) -> dict[str, Any]:
    """The config keys of an option row; "compile" has none."""
    name, _, value = option.partition("=")
    if name == "compile" and not value:
        return {}
    if name == "image_frame_step" and value.isdigit() and int(value) > 1:
        return {name: int(value)}
    raise ValueError(f"--options {option}: know image_frame_step=N (N from 2) and compile")


def apply_option(trainer: DiscovrTrainer, option: str) -> None:
    """Compiles the blocks of every encoder, in place, where the option says so."""
    if option == "compile":
        torch._dynamo.config.recompile_limit = 64  # one block of code, many shapes
        for name, module in trainer.network.named_modules():
            if name.rpartition(".")[0].endswith("blocks"):
                module.compile(dynamic=False)


if __name__ == "__main__":
    print(peak_memory(json.loads(sys.argv[1])))
