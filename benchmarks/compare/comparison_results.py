"""Where the results of compare_methods.py are, and under which protocol they were made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUNDLE = ROOT / "bundles" / "discovr"
RESULTS = HERE / "results"
PROTOCOL = (HERE / "protocol.yaml").resolve()


def protocol(size: str, file: Path = PROTOCOL) -> dict[str, Any]:
    """The protocol at a size; what a file does not say is as in its "base".

    "results" is where its JSONs are. "key" changes with anything that decides a result,
    "training" with what decides a checkpoint.
    """
    content = yaml.safe_load(file.read_text())
    if "base" in content:
        content = yaml.safe_load((file.parent / content["base"]).read_text()) | content
    own = file.stem if size == "recorded" else f"{file.stem}_{size}"
    content["base_results"] = RESULTS / size
    content["results"] = RESULTS / (size if file.resolve() == PROTOCOL else own)
    content["size"] = content.pop("sizes")[size]
    shared = {k: content[k] for k in ("data", "settings", "evaluation")} | {
        "epochs": content["size"]["epochs"]
    }
    content["key"] = digest(shared)
    content["training"] = digest({k: v for k, v in shared.items() if k != "evaluation"})
    return content


def digest(content: Any) -> str:
    """Twelve digits that change with the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def results_of(name: str, plan: dict[str, Any]) -> Path:
    """The folder of a method's JSONs: the base protocol's where it says that it is one of those."""
    folder: Path = plan["base_results" if plan["methods"][name].get("of_base") else "results"]
    return folder
