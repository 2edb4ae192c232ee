"""Which of MLflow's runs are alive: each holds a lock beside its SQLite store while it lasts.

Only a run itself tells MLflow that it has ended. One that is killed, or whose machine loses power,
would be RUNNING for ever; its lock is gone with it.

    FOLDER/mlruns.db
    FOLDER/.mlruns.db.running/RUN_ID    locked by the run's process, touched when it writes

The locks are POSIX's, which SQLite uses too: a child inherits none, and most shared disks pass them
on to other machines. Some do not, so a free lock alone ends no run; see :func:`end_dead_runs`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

LOCAL = {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}
_held: dict[Path, IO[str]] = {}  # closing another handle of such a file would give up its lock
_one = threading.RLock()  # among this process's threads, which share its locks


def hold(store: Path | None, run: str, output: str | Path | None = None) -> None:
    """Says that this process is at work on a run, until :func:`release` or its own end.

    A run on a disk without locks is held by nobody, and never taken for dead.

    Args:
        store: the SQLite file; None, another kind of store: nothing is done.
        run: its id.
        output: the folder of the training; one that starts there later takes its place.
    """
    if store is None:
        return
    with _one:
        _hold(store, _folder(store) / run, output)


def _hold(store: Path, file: Path, output: str | Path | None) -> None:
    if file in _held:
        return
    try:
        file.parent.mkdir(exist_ok=True)
        handle = file.open("a")
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            inode = os.fstat(handle.fileno()).st_ino
            told = {"boot": _boot(), "machine": _machine(), "inode": inode}
            handle.truncate(0)
            handle.write(json.dumps(told | {"output": _below(store, output)}))
            handle.flush()
            os.fsync(handle.fileno())  # what a loss of power leaves must still say whose it was
        except OSError:
            handle.close()
            raise
    except OSError:
        return
    _held[file] = handle


def touch(store: Path | None, run: str) -> None:
    """Notes that a held run was alive just now: when it is found dead, this was its end."""
    if store is not None and (handle := _held.get(_folder(store) / run)):
        os.utime(handle.fileno())


def release(store: Path | None, run: str) -> None:
    """Lets go of a run that has told MLflow of its end."""
    if store is None:
        return
    with _one:
        if handle := _held.pop(file := _folder(store) / run, None):
            file.unlink(missing_ok=True)
            handle.close()


def end_dead_runs(
    client: MlflowClient, store: Path | None, output: str | Path | None = None
) -> int:
    """Marks RUNNING runs as KILLED whose process is certainly gone, with the time of its last sign.

    Certain is that nobody holds the lock, and that the process was on this machine: it said so
    under the same boot, or by the machine's own number on a disk of this machine's. Where a
    training starts, the one that was at work in its folder is certainly over too, wherever that
    was. What might be alive on another machine stays as it is, and so does a copied store.

    Args:
        client: of the store.
        store: the SQLite file; None, another kind of store: nothing is done.
        output: the folder in which a training starts.

    Returns:
        How many were marked.
    """
    if store is None:
        return 0
    ours = _below(store, output)
    machine = _machine() if _is_local(store.resolve().parent) else ""
    ended = 0
    for file in sorted(_folder(store).glob("*")):
        with _one:
            if file in _held:
                continue
            try:
                with file.open("r+") as handle:  # its lock is ours until the run is marked
                    told = _left_behind(handle)
                    here = told.get("boot") == _boot() != "" or told.get("machine") == machine != ""
                    if here or (ours is not None and told.get("output") == ours):
                        ended += _end(client, file, os.fstat(handle.fileno()).st_mtime)
            except OSError:  # another process was faster, or the folder may only be read
                continue
    return ended


def _end(client: MlflowClient, file: Path, seconds: float) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        running = client.get_run(file.name).info.status == "RUNNING"
        if running:
            client.set_terminated(file.name, "KILLED", int(seconds * 1000))
    except MlflowException:  # a run that was removed, a store that may only be read
        return False
    file.unlink(missing_ok=True)
    return running


def _left_behind(handle: IO[str]) -> dict[str, Any]:
    """What a run's process said, if it holds its lock no longer: it is ours then.

    Returns:
        {} if it is alive, or never had the lock.

    Raises:
        OSError: on a disk without locks.
    """
    try:
        told: dict[str, Any] = json.loads(handle.read())  # written under the lock: it had it
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        copied = os.fstat(handle.fileno()).st_ino != told["inode"]  # nobody ever locked a copy
    except (ValueError, KeyError, BlockingIOError, PermissionError):
        return {}
    return {} if copied else told


def _folder(store: Path) -> Path:
    store = store.resolve()
    return store.with_name(f".{store.name}.running")


def _below(store: Path, output: str | Path | None) -> str | None:
    """A folder as seen from the store's: the same on every machine. None if it lies elsewhere."""
    if output is None:
        return None
    root, folder = store.resolve().parent, Path(output).resolve()
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else None


def _boot() -> str:
    """Drawn by Linux when it starts; names neither machine nor user. "" on other systems."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _machine() -> str:
    """A number of this machine that tells nothing of it; "" where Linux has given it none."""
    try:
        own = Path("/etc/machine-id").read_bytes().strip()
    except OSError:
        return ""
    return hashlib.sha256(b"discovr" + own).hexdigest()[:16] if own else ""


def _is_local(folder: Path) -> bool:
    """Whether a folder's disk is this machine's own, as far as Linux says."""
    try:
        mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        return False
    return kind_of_disk(folder, mounts) in LOCAL


def kind_of_disk(folder: Path, mounts: str) -> str:
    """Of the disk that an absolute folder lies on, "ext4" or "nfs4"; "" if there is none.

    Args:
        folder: without links.
        mounts: lines as in /proc/self/mountinfo.
    """
    deepest, kind = "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), left.split(" ")[4])
        if folder.is_relative_to(point) and len(point) >= len(deepest):  # later ones lie on top
            deepest, kind = point, right.split(" ")[0]
    return kind
