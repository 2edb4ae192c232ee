"""Files that are written whole or not at all, and journals that survive a kill."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_atomic(write: Callable[[Path], object], path: Path) -> None:
    """Writes through ``write(temporary path)``, flushes to disk, then renames to ``path``.

    Raises:
        OSError: when the disk is full or the folder cannot be written; ``path`` is as before
            and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all; see :func:`save_atomic`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text)

    save_atomic(write, path)


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Entries of a file of JSON lines by their "id"; {} if there is no file.

    The last of an id counts; a line that a kill cut short does not.
    """
    found: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                found[entry["id"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
    return found
