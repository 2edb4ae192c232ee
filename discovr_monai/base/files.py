"""Files that are written whole or not at all, and journals that survive a kill."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRIVATE = 0o600  # for its owner only


def save_atomic(write: Callable[[Path], object], path: Path, *, mode: int | None = None) -> None:
    """Writes through ``write(temporary path)``, flushes to disk, then renames to ``path``.

    Args:
        write: opens the path and writes; where there is a mode, it must not replace the file.
        path: its folder is made if it is missing.
        mode: permissions that the file has from before its first byte; None: the usual ones.

    Raises:
        OSError: when the disk is full or the folder cannot be written; ``path`` is as before
            and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if mode is not None:
            temporary.unlink(missing_ok=True)  # a killed process of this id may have left its own
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Writes a text file (UTF-8) whole or not at all; see :func:`save_atomic`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    save_atomic(write, path, mode=mode)


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
