"""What several scripts share: tables inside hand-written pages, and what machine measured them."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from discovr_monai.base.files import save_atomic

END = "<!-- end -->"
QUIET = 0.3  # cores that other processes may keep busy while figures worth keeping are measured


def begin(script: str) -> str:
    """The line above a script's table, for example of "speed/train_step.py"."""
    return f"<!-- benchmarks/{script}: begin -->"


def write_between_markers(page: Path, text: str, script: str) -> None:
    """Replaces what stands between a script's two marker lines in a page.

    Raises:
        ValueError: if the page has no such markers.
    """
    before, marker, rest = page.read_text().partition(begin(script))
    _, end, after = rest.partition(END)
    if not marker or not end:
        raise ValueError(f"{page.name} has no markers {begin(script)} and {END}: put them back")
    content = f"{before}{marker}\n{text}\n{END}{after}"
    save_atomic(lambda path: Path(path).write_text(content), page)


def cpu_name() -> str:
    """The processor's name, as Linux tells it or else Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0]


def machine(device: torch.device) -> dict[str, Any]:
    """What measured figures depend on."""
    return {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "busy_cores": busy_cores(),
    }


def busy_cores(seconds: float = 2.0) -> float:
    """How many cores other processes keep busy; prints a warning if these are too many.

    The load average is no use here: for minutes it still counts the measurement before this one.
    """
    busy = psutil.cpu_percent(seconds) / 100 * (psutil.cpu_count() or 1)
    if busy > QUIET:
        print(f"others keep {busy:.1f} cores busy here: only a quiet machine gives figures to keep")
    return round(busy, 2)


def busy_warning(busy: float) -> list[str]:
    """The lines that a table says so with; none if the machine was quiet."""
    if busy <= QUIET:
        return []
    return [f"\n**Others kept {busy:.1f} cores busy: not to be kept.**"]
