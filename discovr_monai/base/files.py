"""Files that are written whole or not at all, and journals that survive a kill."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import numpy as np

PRIVATE = 0o600  # for its owner only


def save_atomic(
    write: Callable[[Path], object],
    path: Path,
    *,
    mode: int | None = None,
    durable: bool = True,
    replace: bool = True,
) -> None:
    """Writes a file under a temporary name beside ``path``, then renames it to ``path``.

    Nobody ever sees half a file, and several processes, also on several machines that share a
    disk, may write the same path at once: the temporary names are random. They begin with a dot
    and end in .tmp.

    Args:
        write: is called with the temporary path and writes the content; where there is a
            ``mode``, it must open that file instead of making another one.
        path: its folder is made if it is missing.
        mode: permissions that the file has from before its first byte; None: the usual ones.
        durable: whether the content must be on disk before the rename, so that it also survives a
            power cut; False is faster and right for what can be made again.
        replace: False leaves a file alone that is there by the time of the rename.

    Raises:
        OSError: when the disk is full or the folder cannot be written; ``path`` is as before
            and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:40]}.{uuid4().hex}.tmp")
    try:
        if mode is not None:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        write(temporary)
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            _link(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _link(temporary: Path, path: Path) -> None:
    """Renames a file unless the new name is taken."""
    try:
        path.hardlink_to(temporary)  # of many writers exactly one succeeds
    except FileExistsError:
        pass
    except OSError:  # a disk without hard links
        if not path.exists():
            temporary.replace(path)
    temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, **options: Any) -> None:
    """Writes a text file (UTF-8) whole or not at all; options as in :func:`save_atomic`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    save_atomic(write, path, **options)


def save_array(path: Path, array: np.ndarray, **options: Any) -> None:
    """Writes a .npy file whole or not at all; options as in :func:`save_atomic`."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    save_atomic(write, path, **options)


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a file of JSON lines, each an object with an "id", into a dict by that id.

    Where an id occurs more than once, its last line counts. A line that a kill cut short is
    skipped. A file that does not exist is read as {}.
    """
    entries: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                entries[entry["id"]] = entry
    return entries
