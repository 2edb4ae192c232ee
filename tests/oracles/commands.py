"""What a person can type, and what comes out of it: help texts, and hashes of a job's outputs."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "discovr"


def command(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """What ``discovr-monai arguments`` prints."""
    code = "import sys; from discovr_monai.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def help_of_all_commands() -> dict[str, str]:
    """Command -> its help, with runs of spaces as one; "" is the program's own."""
    texts = {"": command("--help")}
    (names,) = re.findall(r"\{([a-z,-]+)\}\s+\.\.\.", texts[""].splitlines()[0])
    texts |= {name: command(name, "--help") for name in sorted(names.split(","))}
    return {name: re.sub(r"\s+", " ", text).strip() for name, text in texts.items()}


def targets_of(content: Any) -> Iterator[str]:
    """Every ``_target_`` and every dotted name of ours in an expression of a config."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "_target_":
                yield value
            else:
                yield from targets_of(value)
    elif isinstance(content, list):
        for value in content:
            yield from targets_of(value)
    elif isinstance(content, str) and content.startswith("$") and "import " not in content:
        yield from re.findall(r"discovr_monai(?:\.\w+)+", content)


def config_targets() -> dict[str, set[str]]:
    """Config -> what of our package it names."""
    files = sorted((BUNDLE / "configs").rglob("*.yaml"))
    return {
        str(file.relative_to(BUNDLE)): {
            t for t in targets_of(yaml.safe_load(file.read_text())) if t.startswith("discovr_monai")
        }
        for file in files
    }


def hashes_of(folder: Path, leave_out: str = r"^$") -> dict[str, str]:
    """Relative name -> SHA-256 of every file of a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not re.search(leave_out, str(file.relative_to(folder)))
    }


def outputs(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of what datalist, prepare and inference make of a phantom folder.

    They hold on one machine: simulated speckle and a network's figures are floats.
    """
    private = {"XDG_CONFIG_HOME": str(folder / "config")}
    salt = folder / "config" / "discovr-monai" / "salt"
    salt.parent.mkdir(parents=True)
    salt.write_bytes(bytes(range(32)))
    phantom = folder / "phantom"
    command("phantom", str(phantom), "--clips", "6", "--frames", "24", **private)
    command("datalist", "echonet-dynamic", str(phantom), "--output", str(folder / "list.json"),
            "--report", str(folder / "report"), **private)  # fmt: skip
    command("prepare", str(phantom), str(folder / "prepared"), "--dicom", "--workers", "1",
            **private)  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "run", "--config_file",
         "configs/inference.yaml", "--dataset_dir", str(phantom), "--view", "A4C",
         "--output_dir", str(folder / "study")],
        cwd=BUNDLE, check=True, capture_output=True, env=os.environ | private,
    )  # fmt: skip
    found = {"phantom": hashes_of(phantom), "report": hashes_of(folder / "report", "pdf$")}
    found["datalist"] = hashes_of(folder, r"^(?!list\.json)")
    found["prepared"] = hashes_of(folder / "prepared")
    found["inference"] = hashes_of(folder / "study", r"\.(log|lock)$")
    return found
