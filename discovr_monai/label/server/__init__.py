"""MONAI Label's server, with our app, tasks, datastore and protection.

MONAI Label imports at once some modules that a server of cines never calls. Before any module of
MONAI Label is imported, those that are not installed are replaced here by stand-ins.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, NoReturn


def _absent(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("this needs torchvision or pydicom-seg, which are not installed")


def _ensure(name: str, functions: tuple[str, ...]) -> ModuleType:
    """The module, or one whose functions refuse to be called."""
    try:
        return importlib.import_module(name)
    except Exception:  # an installed pydicom-seg fails in many ways with pydicom 3
        module = ModuleType(name)
        for function in functions:
            setattr(module, function, _absent)
        sys.modules[name] = module
        return module


_ensure("torchvision", ()).utils = _ensure(  # type: ignore[attr-defined]
    "torchvision.utils", ("make_grid", "save_image")
)
_ensure("pydicom_seg", ("MultiClassReader", "MultiClassWriter", "template"))
