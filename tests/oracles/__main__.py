"""Oracles of a change that should change nothing.

    python -m tests.oracles record FILE     before: what this tree makes, on this machine
    python -m tests.oracles compare FILE    after: what differs from it
    python -m tests.oracles expected        the part that holds on every machine, into the tests

The last one is what tests/test_oracles.py compares with.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.oracles.commands import help_of_all_commands, outputs
from tests.oracles.training import PRESETS, digest, five_steps, shapes_of

EXPECTED = Path(__file__).with_name("expected.json")
STEPS = {"demo": "", "paper": "paper"}  # whose heads


def expected() -> dict[str, Any]:
    """What does not depend on the machine."""
    return {
        "state_dicts": {preset or "train": digest(shapes_of(preset)) for preset in PRESETS},
        "names": {"train": shapes_of("")},
        "steps": {name: five_steps(preset) for name, preset in STEPS.items()},
        "help": help_of_all_commands(),
    }


def everything() -> dict[str, Any]:
    """:func:`expected`, and the hashes of outputs: in one folder always, an output names it."""
    folder = Path(tempfile.gettempdir()) / "discovr-monai-oracles"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        return expected() | {"outputs": outputs(folder)}
    finally:
        shutil.rmtree(folder)


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Where two records differ; floats may by 1e-12 of the larger of 1 and themselves."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = [f"{place}/{key}: only in one" for key in before.keys() ^ after.keys()]
        for key in before.keys() & after.keys():
            found += differences(before[key], after[key], f"{place}/{key}")
        return sorted(found)
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{place}[{i}]")]
    if isinstance(before, float) and isinstance(after, float):
        if abs(before - after) <= 1e-12 * max(1.0, abs(before)):
            return []
        return [f"{place}: {before!r} became {after!r}"]
    return [] if before == after else [f"{place}: {before!r} became {after!r}"]


def main(how: str, file: str = "") -> int:
    """0 where nothing differs."""
    if how == "expected":
        EXPECTED.write_text(json.dumps(expected(), indent=1) + "\n")
    elif how == "record":
        Path(file).write_text(json.dumps(everything(), indent=1))
    elif how == "compare":
        found = differences(json.loads(Path(file).read_text()), everything())
        print("\n".join(found) or "nothing differs")
        return 1 if found else 0
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
