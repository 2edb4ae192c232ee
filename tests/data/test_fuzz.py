"""A few hundred damaged files in CI; the release run of 20,000 is in docs/data.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_damaged_files_get_a_verdict():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "checks" / "fuzz.py"), "--files", "300", "--seed", "1"],
        capture_output=True, text=True, timeout=500, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "300 files, seed 1: 0 failures" in done.stdout
