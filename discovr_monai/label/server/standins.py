"""Modules that MONAI Label imports at once and that a server of cines never calls.

Imported before any module of MONAI Label, by the launcher and by app/main.py: trainings and
scorings run in processes of their own, which import main.py only. Real packages are left alone.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, NoReturn


def _absent(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("this needs torchvision or pydicom-seg, which are not installed")


def _ensure(name: str, names: tuple[str, ...]) -> ModuleType:
    """The module, or one whose ``names`` refuse to be called."""
    try:
        return importlib.import_module(name)
    except Exception:  # pydicom-seg is installed by some and fails in many ways (pydicom 3)
        module = ModuleType(name)
        for each in names:
            setattr(module, each, _absent)
        sys.modules[name] = module
        return module


_ensure("torchvision", ()).utils = _ensure(  # type: ignore[attr-defined]
    "torchvision.utils", ("make_grid", "save_image")
)
_ensure("pydicom_seg", ("MultiClassReader", "MultiClassWriter", "template"))
