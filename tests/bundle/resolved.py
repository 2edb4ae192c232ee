"""What configs build: every component that a command reaches, as plain text.

    python -m tests.bundle.resolved    writes resolved.json, which test_resolved.py compares with

A component is named by the way to it from what a command starts ("train#trainer.optimizer"), so that
it may be written anywhere in a file; one that is reached twice is said to be the same. References
are followed to the value that they end at.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

CONFIGS = Path(__file__).parents[2] / "bundles" / "discovr" / "configs"
SNAPSHOT = Path(__file__).with_name("resolved.json")
OVERLAYS = ("small", "paper", "tiny", "multi_gpu_train", *(
    f"baselines/{file.stem}" for file in sorted((CONFIGS / "baselines").glob("*.yaml"))))  # fmt: skip
EVALUATIONS = ("features", "knn", "linear_probe", "lvef", "segmentation", "anomaly")
STARTS = {
    "train": ("train#trainer", "checkpoints", "train#inferer", "initialize", "training", "run", "finalize"),
    "inference": ("initialize", "run", "finalize"),
    "evaluation": ("initialize", "evaluating", "run", "finalize"),
}  # fmt: skip
REFERENCE = re.compile(r"@(\w+(?:#\w+)*)")
HARMLESS = {"tuple": tuple, "range": range, "str": str}


def resolve(kind: str, *names: str) -> dict[str, Any]:
    """Way -> ``_target_``, plain value or expression, of all that the files build together."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.yaml") for name in names])
    parser.resolve_macro_and_relative_ids()
    _as_calls(parser.get())
    walk = _Walk(parser.get())
    for start in STARTS[kind]:
        walk.visit(start, start)
    return walk.content


def everything() -> dict[str, dict[str, Any]]:
    """All configs; an overlay's part holds what differs from train.yaml, null where it is gone."""
    base = resolve("train", "train")
    configs = {"train": base, "inference": resolve("inference", "inference")}
    for name in OVERLAYS:
        content = resolve("train", "train", name)
        changed = {way: value for way, value in content.items() if base.get(way, ...) != value}
        configs[name] = changed | dict.fromkeys(base.keys() - content.keys())
    for name in EVALUATIONS:
        configs[name] = resolve("evaluation", name)
    return {name: dict(sorted(content.items())) for name, content in configs.items()}


def _as_calls(config: dict[str, Any]) -> None:
    """Two calls that train.yaml wrote as expressions once, and writes as components now."""
    rows = config.get("train", {}).get("dataset", {}).get("data")
    if isinstance(rows, dict):
        call = f"$@data.rows({rows['section']!r}, normal_only={rows['normal_only']!r})"
        config["train"]["dataset"]["data"] = call
    groups = config.get("optimizer", {}).get("params")
    if isinstance(groups, dict):
        call = f"${groups['_target_']}({groups['network']}, {groups['weight_decay']!r})"
        config["optimizer"]["params"] = call


class _Walk:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.content: dict[str, Any] = {}
        self.ways: dict[str, str] = {}  # of components, by their place in the file

    def visit(self, place: str, way: str) -> None:
        """Notes what stands at a place of the file, under its way."""
        value: Any = self.config
        for key in place.split("#"):
            value = value[int(key) if isinstance(value, list) else key]
        if isinstance(value, str) and (reference := REFERENCE.fullmatch(value.replace("::", "#"))):
            self.visit(reference[1], way)
        elif isinstance(value, str) and value.startswith("$"):
            if place in self.ways:
                self.content[way] = f"the same as {self.ways[place]}"
                return
            text = self._expression(value[1:], way)
            try:
                self.content[way] = _plain(eval(text, {"__builtins__": HARMLESS}))
            except Exception:  # needs what only a run has
                self.content[way] = f"${text}"
        elif isinstance(value, dict) and "_target_" in value and place in self.ways:
            self.content[way] = f"the same as {self.ways[place]}"
        elif isinstance(value, (dict, list)):
            if isinstance(value, dict) and "_target_" in value:
                self.ways[place] = way
            for key in sorted(value) if isinstance(value, dict) else range(len(value)):
                self.visit(f"{place}#{key}", f"{way}.{key}")
            if not value:
                self.content[way] = value
        else:
            self.content[way] = value

    def _expression(self, text: str, way: str) -> str:
        """An expression with values instead of references; components in it get ways."""

        def put(reference: re.Match[str]) -> str:
            place = reference[1]
            value: Any = self.config
            for key in place.split("#"):
                value = value[int(key) if isinstance(value, list) else key]
            if isinstance(value, str) and value.startswith("@"):
                return put(REFERENCE.fullmatch(value.replace("::", "#")))  # type: ignore[arg-type]
            if isinstance(value, str) and value.startswith("$"):
                return f"({self._expression(value[1:], way)})"
            if isinstance(value, dict) and "_target_" in value:
                if place not in self.ways:
                    self.visit(place, f"{way}@{value['_target_'].rpartition('.')[2]}")
                return f"<{self.ways.get(place, place)}>"
            return repr(value)

        return REFERENCE.sub(put, text.replace("::", "#"))


def _plain(value: Any) -> Any:
    """As JSON keeps it: a tuple is told from a list."""
    if isinstance(value, tuple):
        return f"{value!r}"
    json.dumps(value)
    return value


def main() -> None:
    """Writes the snapshot."""
    SNAPSHOT.write_text(json.dumps(everything(), indent=0) + "\n")


if __name__ == "__main__":
    main()
