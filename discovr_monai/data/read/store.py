"""Decoded cines on disk: compact uint8, memory-mapped, bounded, safe against crashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from discovr_monai.base.files import save_array, write_text
from discovr_monai.base.types import Cine, PreparedCine

VERSION = 4
STALE_SECONDS = 3600  # temporary files older than this were left by a crash


def prepared(cine: Cine) -> PreparedCine:
    """What the store keeps of a cine."""
    window = cine.window or (*cine.frames.shape[1:3], 0, 0, *cine.frames.shape[1:3])
    return PreparedCine(cine.frames, cine.fps, cine.fps_source, window, cine.spacing)


class CineStore:
    """Cache of prepared cines, one .npy each, read through a memory map.

    An entry belongs to a file's name, size, modification time and to how it was prepared: a
    changed file or setting is a new entry. File names are hashes. Several processes may share a
    store. When it grows over its bound, the least recently used entries go. A full disk only
    means that nothing more is cached.

    Args:
        directory: made if missing.
        max_gb: bound in GB (10^9 bytes).
    """

    def __init__(self, directory: str | Path, max_gb: float = 20.0) -> None:
        if max_gb <= 0:
            raise ValueError(f"cache size {max_gb} GB must be above 0")
        self.directory, self.max_bytes = Path(directory), max_gb * 1e9
        self._bytes: float | None = None  # what this process knows of the store's size
        self._full = False

    def get(
        self, path: Path, name: str, preparation: str, make: Callable[[], Cine]
    ) -> PreparedCine:
        """A prepared cine; its frames are memory-mapped when cached.

        Args:
            path: the source file.
            name: its relative name.
            preparation: what ``make`` does, as text; part of the key.
            make: decodes and prepares; called when there is no valid entry.
        """
        stat = path.stat() if path.exists() else None
        if stat is None:
            return prepared(make())  # raises the clear error
        key = f"{VERSION}|{name}|{stat.st_size}|{stat.st_mtime_ns}|{preparation}"
        entry = self.directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        cached = self._read(entry)
        if cached is not None:
            return cached
        cine = prepared(make())
        self._write(entry, cine)
        return cine

    def _read(self, entry: Path) -> PreparedCine | None:
        try:
            frames = np.load(entry, mmap_mode="r", allow_pickle=False)
            about = json.loads(entry.with_suffix(".json").read_text())
            now = time.time()
            if now - entry.stat().st_atime > 60:  # marks its use, also where atime is off
                os.utime(entry, (now, entry.stat().st_mtime))
            spacing = tuple(about["spacing"]) if about["spacing"] else None
            window = tuple(about["window"])
            return PreparedCine(frames, about["fps"], about["fps_source"], window, spacing)
        except (OSError, ValueError, KeyError):  # not there, or cut short by a power cut
            return None

    def _write(self, entry: Path, cine: PreparedCine) -> None:
        if self._full:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._make_room(cine.frames.nbytes)
            about = json.dumps({k: v for k, v in cine._asdict().items() if k != "frames"})
            write_text(entry.with_suffix(".json"), about, durable=False)
            save_array(entry, cine.frames, durable=False)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            self._full = True
            warnings.warn(
                f"the cine cache cannot be written ({error.strerror}): going on without it. "
                "Free space or set cache_dir to another disk",
                stacklevel=2,
            )

    def _make_room(self, wanted: int) -> None:
        """Evicts until ``wanted`` more bytes fit; rescans the folder only when it must."""
        if self._bytes is None or self._bytes + wanted > self.max_bytes:
            entries = []
            for item in os.scandir(self.directory):
                with contextlib.suppress(FileNotFoundError):  # another process evicts too
                    stat = item.stat()
                    if item.name.endswith(".tmp"):
                        if time.time() - stat.st_mtime > STALE_SECONDS:
                            Path(item.path).unlink()
                    elif item.name.endswith(".npy"):
                        entries.append((stat.st_atime, stat.st_size, Path(item.path)))
            self._bytes = float(sum(size for _, size, _ in entries))
            over = self._bytes + wanted > self.max_bytes
            for _, size, path in sorted(entries) if over else []:
                if self._bytes + wanted <= self.max_bytes * 0.9:  # some slack: not every time
                    break
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
                self._bytes -= size
        self._bytes += wanted
