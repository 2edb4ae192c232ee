"""A class called from Python does what its config does: the defaults are the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pydoc import locate
from typing import Any

import pytest
from monai.bundle import ConfigParser

from tests.bundle.conftest import BUNDLE

TASKS = ("features", "knn", "linear_probe", "lvef", "anomaly", "segmentation")
ROOM = "discovr_monai.evaluation."


def literal(parser: ConfigParser, value: Any) -> Any:
    """What a config's value comes to; LookupError if that depends on the run or the machine."""
    if isinstance(value, str) and value.startswith("@"):
        return literal(parser, parser[value[1:].replace("#", "::")])
    if isinstance(value, str) and value.startswith("$"):
        if "@" in value or "torch" in value or "monai" in value:
            raise LookupError(value)
        return eval(value[1:])
    if isinstance(value, dict):
        raise LookupError(value)
    return value


def defaults(task: str) -> Iterator[tuple[str, Any, Any]]:
    """Argument, default in the signature, value in the config, of every part of a config."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / f"{task}.yaml"))
    for part in parser.get().values():
        if not isinstance(part, dict) or not str(part.get("_target_")).startswith(ROOM):
            continue
        parameters = inspect.signature(locate(part["_target_"])).parameters
        for name in part.keys() & parameters.keys():
            default = parameters[name].default
            try:
                value = literal(parser, part[name])
            except LookupError:
                continue
            if default is not inspect.Parameter.empty:
                yield f"{part['_target_'].rpartition('.')[2]}.{name}", default, value


@pytest.mark.parametrize("task", TASKS)
def test_a_default_is_the_configs_value(task):
    found = list(defaults(task))
    assert len(found) >= (5 if task == "features" else 12)
    for name, default, value in found:
        default = list(default) if isinstance(default, tuple) else default
        assert default == value, name
