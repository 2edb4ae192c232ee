"""Peak memory of a step in a process of its own, and what the rows of --options stand for.

python benchmarks/speed/step_memory.py JSON     used by train_step.py; prints the bytes
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from step_setup import build, step

OPTIONS = {  # form of one part of an option row -> type of the value in its group
    r"image_frame_step=([2-9]|[1-9]\d+)": int,
    r"teacher_keep=(0?\.\d*[1-9]\d*)": float,
    r"num_views=([1-9]\d*)": int,
    r"batch=([2-9]|[1-9]\d+)x": int,
    r"activation_checkpointing()": lambda _: True,
    r"compile()": lambda _: True,
}
KNOWN = (
    "image_frame_step=N (N from 2), teacher_keep=SHARE (below 1), activation_checkpointing, "
    "compile, num_views=N, batch=Nx (N from 2), and several joined by commas"
)


def memory_ratios(size: str, precisions: list[str], common: dict[str, Any]) -> dict[str, Any]:
    """Bytes of both formulations, and their ratios plain / ours.

    "memory_ratio" is that of the first precision.
    """
    memory: dict[str, Any] = {"memory_bytes": {}}
    for precision in precisions:
        job = {"size": size, "precision": precision} | common
        ours, plain = peak_of(job), peak_of(job | {"plain": True})
        memory["memory_bytes"] |= {f"ours_{precision}": ours, f"plain_{precision}": plain}
        memory[f"memory_ratio_{precision}"] = plain / ours
    return memory | {"memory_ratio": memory[f"memory_ratio_{precisions[0]}"]}


def peak_of(job: dict[str, Any]) -> float:
    """:func:`peak_memory` of a new process."""
    command = [sys.executable, __file__, json.dumps(job)]
    cold = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # the compiler works each time
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=cold)
    return float(done.stdout.splitlines()[-1])


def peak_memory(job: dict[str, Any]) -> float:
    """Bytes by which building a trainer and two steps raise this process's peak, or the GPU's."""
    option = job.pop("option", None)
    settings, times = settings_of(option) if option else ({}, 1)
    job["batch"] *= times
    step(*build(job["size"], quick=True, device=job["device"]))  # imports everything
    before = highest_memory()
    trainer, batch = build(**settings, **job)
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


def settings_of(option: str) -> tuple[dict[str, Any], int]:
    """The config keys of an option row, and how many times the batch it has.

    Raises:
        ValueError: for what is no option, naming those there are.
    """
    settings: dict[str, Any] = {}
    for part in option.split(","):
        matches = ((re.fullmatch(form, part), value) for form, value in OPTIONS.items())
        name = part.partition("=")[0]
        for match, value in matches:
            if match and name not in settings:
                settings[name] = value(match[1])
                break
        else:
            raise ValueError(f"--options {option}: know {KNOWN}")
    return settings, settings.pop("batch", 1)


if __name__ == "__main__":
    print(peak_memory(json.loads(sys.argv[1])))
