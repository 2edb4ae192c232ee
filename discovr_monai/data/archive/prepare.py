"""An archive of studies to compact, de-identified training cines.

The output folder can be shared: salted ids, no tag, date or path. What leads back stays in a
private folder beside it, encrypted under the salt.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from discovr_monai.base.engine import run_isolated
from discovr_monai.base.files import read_journal, save_array, write_text
from discovr_monai.base.privacy import load_salt, salted_id
from discovr_monai.base.tables import write_table
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data.lists.split import split_by_patient
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.dicom import open_dicom
from discovr_monai.data.read.kinds import failure_of, file_below, walk
from discovr_monai.data.read.sector import prepare_cine, resize_square
from discovr_monai.data.write.dicom import deidentified_tags, salted_uid, write_dicom

VERSION = 1
JOURNAL, MANIFEST, STAMP = "journal.jsonl", "manifest.encrypted", "prepared.json"


@dataclass(frozen=True)
class Settings:
    """How every file of an archive is prepared.

    Attributes:
        source, out: folders.
        size: side of the square frames in pixels.
        dicom: also write de-identified DICOM at the file's own resolution.
        patient_from: "file" (DICOM's PatientID, else each file by itself) or "folder" (the first
            folder below the source).
        salt: of the ids.
    """

    source: Path
    out: Path
    size: int
    dicom: bool
    patient_from: str
    salt: bytes

    def __post_init__(self) -> None:
        if self.patient_from not in ("file", "folder"):
            raise ValueError(f"patient_from {self.patient_from!r} must be 'file' or 'folder'")
        if not 16 <= self.size <= 1024:
            raise ValueError(f"size {self.size} must lie in 16..1024 pixels")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    private: str | Path | None = None,
    size: int = 112,
    dicom: bool = False,
    patient_from: str = "file",
    salt_file: str | Path | None = None,
    workers: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    timeout: float = 120.0,
    progress: bool = True,
) -> Counter:
    """Prepares every file below a folder; goes on where an earlier call was stopped.

    ``out`` gets cines/xx/ID.npy ((T, size, size) uint8, sector only), datalist.json, verdicts.csv
    (ids and reasons) and with ``dicom`` dicom/xx/ID.dcm. ``private`` gets the journal,
    bad_files.csv (relative names) and the encrypted manifest. Files that did not change since the
    last call are not read again.

    Args:
        source: DICOM, AVI, MP4, ... at any depth; never written to.
        out: may be shared; new, empty, or of an earlier call with the same settings.
        private: must not be shared; ``out``-private beside it if None.
        size, dicom, patient_from: see :class:`Settings`.
        salt_file: the salt's file; the user's own if None.
        workers: processes; all cores if None.
        val_fraction, seed: of the split by patient in the datalist.
        timeout: seconds that one file may take.
        progress: whether to show a bar.

    Returns:
        Counts: "kept", and each reason of what was set aside.

    Raises:
        ValueError, OSError: with what to do.
    """
    source, out = Path(source), Path(out)
    private = Path(private) if private is not None else out.with_name(f"{out.name}-private")
    _check_folders(source, out, private)
    settings = Settings(source, out, size, dicom, patient_from, load_salt(salt_file))
    private.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _only_one(private):
        _claim(out, settings)
        files = sorted(walk(source))
        if not files:
            raise ValueError(f"{source.name!r} is empty: there is nothing to prepare")
        done = _done_before(files, settings, private)
        todo = [name for name in files if name not in done]
        with tqdm(total=len(files), initial=len(done), desc="preparing", unit="file",
                  disable=not progress) as bar:  # fmt: skip
            for name, entry in _run(todo, settings, private, workers, timeout):
                done[name] = entry
                bar.update()
        return _finish(files, done, settings, private, val_fraction, seed)


def reidentify(
    private: str | Path, salt_file: str | Path | None = None
) -> Iterator[dict[str, str]]:
    """Entries {"id", "source", "patient", "patient_id", "study_uid"} of an encrypted manifest.

    Raises:
        ValueError: if there is none, or it was made with another salt.
    """
    from cryptography.fernet import Fernet, InvalidToken

    path = Path(private) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{path.parent.name!r} holds no {MANIFEST}")
    box = Fernet(_key(load_salt(salt_file)))
    entries: dict[str, dict[str, str]] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines):
        try:
            entry = json.loads(box.decrypt(line))
        except (InvalidToken, ValueError):
            if number == len(lines) - 1 and entries:
                continue  # cut short when the job was killed; the file was done again
            raise ValueError(f"{MANIFEST} was made with another salt") from None
        entries[entry["id"]] = entry
    yield from entries.values()


# ---- one file ----------------------------------------------------------------------------


def prepare_file(name: str, settings: Settings) -> dict[str, Any]:
    """Reads, isolates, resizes and writes one file; never raises.

    Returns:
        {"row": datalist row, "about": for the manifest}, or {"bad": (kind, problem, remedy)}.
    """
    try:
        cine = read_cine(file_below(settings.source, name), name=name)
        whole = prepare_cine(cine, None, "auto", color=False, name=name)
        row, about = _describe(name, cine.from_dicom, settings)
        frames = resize_square(whole.frames, settings.size)
        if int(frames.max()) - int(frames.min()) < 8:
            raise CineError(name, "its frames are blank", "Leave it out", "not a cine")
        row["num_frames"] = len(frames)
        if cine.fps:
            row["fps"], row["fps_source"] = cine.fps, cine.fps_source
        if cine.spacing is not None:  # of the prepared frames
            scale = max(whole.frames.shape[1:3]) / settings.size
            row["spacing"] = [round(s * scale, 5) for s in cine.spacing]
        save_array(settings.out / row["image"], frames, durable=False)
        if settings.dicom:
            _save_dicom(whole, row, settings)
    except OSError as error:
        return {"stop": f"cannot write ({error.strerror})"}
    except Exception as error:
        return {"bad": failure_of(error)}
    return {"row": row, "about": about}


def _file_id(name: str, salt: bytes) -> str:
    return salted_id(f"file {name}", salt)


def _describe(
    name: str, from_dicom: bool, settings: Settings
) -> tuple[DatalistRow, dict[str, str]]:
    """The row with salted ids, and what the manifest keeps."""
    salt, identity = settings.salt, _file_id(name, settings.salt)
    first, slash, _ = name.partition("/")
    patient_id = study = ""
    if from_dicom:
        dataset = open_dicom(settings.source / name, name, pixels=False)
        patient_id = str(dataset.get("PatientID") or "")
        study = str(dataset.get("StudyInstanceUID") or "")
    if settings.patient_from == "folder" and slash:
        key = f"patient folder {first}"
    else:
        key = f"patient {patient_id}" if patient_id else f"file {name}"
    row: DatalistRow = {
        "image": f"cines/{identity[:2]}/{identity}.npy",
        "patient": salted_id(key, salt),
    }
    if study:
        row["study"] = salted_id(f"study {study}", salt)
    about = {
        "id": identity, "source": name, "patient": row["patient"],
        "patient_id": patient_id, "study_uid": study,
    }  # fmt: skip
    return row, about


def _save_dicom(cine: Any, row: DatalistRow, settings: Settings) -> None:
    identity = Path(row["image"]).stem
    write_dicom(
        settings.out / "dicom" / identity[:2] / f"{identity}.dcm",
        cine.frames,
        fps=cine.fps,
        spacing=cine.spacing,
        uids={
            "study": salted_uid(f"study {row.get('study', identity)}", settings.salt),
            "series": salted_uid(f"series {identity}", settings.salt),
            "instance": salted_uid(f"instance {identity}", settings.salt),
        },
        tags=deidentified_tags(row["patient"]),
    )


# ---- the job -----------------------------------------------------------------------------


def _check_folders(source: Path, out: Path, private: Path) -> None:
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise NotADirectoryError(f"{source.name!r} {what}. Give the folder with the studies")
    places = {"out": out.resolve(), "private": private.resolve()}
    for name, place in places.items():
        if place.is_relative_to(source.resolve()):
            raise ValueError(f"{name} lies inside the source folder. Choose a place beside it")
    if places["private"].is_relative_to(places["out"]):
        raise ValueError("private lies inside out, which may be shared. Choose a place beside it")


@contextmanager
def _only_one(private: Path) -> Iterator[None]:
    with (private / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another prepare is at work in {private.name!r}. Wait for it, or stop it"
            ) from None
        yield


def _claim(out: Path, settings: Settings) -> None:
    """Takes a new or empty folder, or one of the same settings; clears what a crash left."""
    stamp = out / STAMP
    wanted = {
        "version": VERSION, "size": settings.size, "dicom": settings.dicom,
        "patient_from": settings.patient_from,
        "salt": salted_id("which salt", settings.salt, 12),  # as it always was: this is no id
    }  # fmt: skip
    if stamp.is_file():
        earlier = json.loads(stamp.read_text())
        different = [k for k in wanted if earlier.get(k) != wanted[k]]
        if different:
            raise ValueError(
                f"{out.name!r} was prepared with another {different[0]} "
                f"({earlier.get(different[0])}, not {wanted[different[0]]}). Name another folder"
            )
        for left in [*out.glob("cines/*/.*.tmp"), *out.glob("dicom/*/.*.tmp")]:
            left.unlink(missing_ok=True)
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out.name!r} holds other files. Name a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(stamp, json.dumps(wanted))


def _stamp_of(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _still_valid(entry: dict[str, Any], name: str, settings: Settings) -> bool:
    try:
        if entry["stamp"] != _stamp_of(settings.source / name):
            return False
    except OSError:
        return False
    return "row" not in entry or (settings.out / entry["row"]["image"]).is_file()


def _done_before(
    files: Sequence[str], settings: Settings, private: Path
) -> dict[str, dict[str, Any]]:
    """The journal's entries of files that have not changed since."""
    journal = read_journal(private / JOURNAL)
    entries = {name: journal.get(_file_id(name, settings.salt)) for name in files}
    return {n: e for n, e in entries.items() if e is not None and _still_valid(e, n, settings)}


def _run(
    names: Sequence[str], settings: Settings, private: Path, workers: int | None, timeout: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Works through the files; manifest and journal grow line by line."""
    from cryptography.fernet import Fernet

    if not names:
        return
    box = Fernet(_key(settings.salt))
    count = min(workers or os.cpu_count() or 1, len(names))
    work = partial(prepare_file, settings=settings)
    with (
        _appending(private / JOURNAL) as journal,
        _appending(private / MANIFEST) as manifest,
    ):
        for name, verdict, failure in run_isolated(work, names, workers=count, timeout=timeout):
            result = verdict if failure is None else {"bad": failure}
            if "stop" in result:
                raise OSError(
                    f"{result['stop']}: free space or choose another place, then type the same "
                    "command again to go on"
                )
            entry: dict[str, Any] = {"id": _file_id(name, settings.salt)}
            entry["stamp"] = _stamp_of(settings.source / name)
            if about := result.pop("about", None):
                manifest.write(box.encrypt(json.dumps(about).encode()) + b"\n")
                manifest.flush()
            entry.update(result)
            journal.write(json.dumps(entry).encode() + b"\n")
            journal.flush()
            yield name, entry


@contextmanager
def _appending(path: Path) -> Iterator[Any]:
    """A file open for appending, on a line of its own, readable by its owner only."""
    torn = path.is_file() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    if torn:  # a kill cut the last line: drop it, its file is done again
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        yield file


def _finish(
    files: Sequence[str],
    done: dict[str, dict[str, Any]],
    settings: Settings,
    private: Path,
    val_fraction: float,
    seed: int,
) -> Counter:
    """Datalist, verdicts and the private report."""
    out = settings.out
    kept = [done[n]["row"] for n in files if "row" in done[n]]
    bad = [(n, *done[n]["bad"]) for n in files if "bad" in done[n]]
    verdicts = [
        (done[n]["id"], "kept" if "row" in done[n] else "set aside",
         "" if "row" in done[n] else done[n]["bad"][1])
        for n in files
    ]  # fmt: skip
    write_table(out / "verdicts.csv", ("id", "verdict", "reason"), sorted(verdicts))
    write_table(private / "bad_files.csv", ("file", "kind", "reason", "what to do"), bad)
    content = {
        "name": "prepared archive",
        "description": "discovr-monai prepare: sector only, salted ids",
        "prepared": {"size": settings.size, "sector": True},
        **split_by_patient(sorted(kept, key=lambda row: row["image"]), val_fraction, seed),
    }
    write_text(out / "datalist.json", json.dumps(content, indent=1))
    counts = Counter(problem for _, _, problem, _ in bad)
    counts["kept"] = len(kept)
    return counts


def _key(salt: bytes) -> bytes:
    return base64.urlsafe_b64encode(hmac.new(salt, b"manifest", hashlib.sha256).digest())
