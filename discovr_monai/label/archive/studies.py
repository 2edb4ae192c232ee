"""An archive as MONAI Label shows it: a NIfTI per cine under a salted id, and the way back.

The archive is never written to. What is presented lies in a folder of its own, and beside it what
leads back to the files, readable by its owner only:

    WORK/ID.nii.gz                (X, Y, T) uint8, the sector only, at the file's own size
    WORK/labels/TAG/ID.nii.gz     what was saved
    WORK-private/cines.jsonl      id, relative name, and how the cine was read
    WORK-private/files.csv        id -> relative name
    WORK-private/bad_files.csv    what was set aside, and why
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from discovr_monai.base.engine import run_isolated
from discovr_monai.base.files import PRIVATE, read_journal, write_text
from discovr_monai.base.notice import NOTICE
from discovr_monai.base.privacy import load_salt, salted_id
from discovr_monai.base.tables import write_table
from discovr_monai.base.types import Cine, CineError, DatalistRow
from discovr_monai.data.lists.owners import salted_owners
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.kinds import NIFTI, failure_of, file_below
from discovr_monai.data.read.sector import prepare_cine
from discovr_monai.data.write.labels import GEOMETRY, place_anywhere

JOURNAL = "cines.jsonl"
TIMEOUT = 120.0  # seconds that one file may take to read


@dataclass
class Studies:
    """An archive, and the folder that it is presented in.

    Attributes:
        source: DICOM, AVI, MP4, NIfTI, ... at any depth, or a folder with a datalist.json.
        work: see the module; ``source``-label beside it, usually.
        salt: of the ids.
    """

    source: Path
    work: Path
    salt: bytes = field(default_factory=load_salt, repr=False)

    @property
    def private(self) -> Path:
        """Beside :attr:`work`, for nobody else."""
        return self.work.with_name(f"{self.work.name}-private")

    def prepare(self) -> None:
        """Makes the folders; clears what a killed server left.

        Raises:
            ValueError, OSError: with what to do.
        """
        if not self.source.is_dir():
            what = "is a file" if self.source.exists() else "does not exist"
            raise NotADirectoryError(f"studies {self.source.name!r} {what}. Give the folder")
        source = self.source.resolve()
        for folder in (self.work, self.private):
            place = folder.resolve()
            if place.is_relative_to(source) or source.is_relative_to(place):
                raise ValueError(
                    f"{folder.name!r} and the studies lie in each other. Choose a place beside them"
                )
        self.work.mkdir(parents=True, exist_ok=True)
        self.private.mkdir(parents=True, exist_ok=True, mode=0o700)
        stamp = self.private / "studies.json"
        wanted = {
            "source": salted_id(f"source {source}", self.salt),
            "salt": salted_id("label", self.salt),
        }
        if not stamp.exists():
            if any(not p.name.startswith(".") for p in self.work.iterdir()):
                raise ValueError(
                    f"{self.work.name!r} holds other files. Name a new folder (--work)"
                )
            write_text(stamp, json.dumps(wanted), mode=PRIVATE)
        if json.loads(stamp.read_text()) != wanted:
            raise ValueError(
                f"{self.work.name!r} presents other studies, or ids of another salt "
                "(DISCOVR_MONAI_SALT). Name another folder (--work)"
            )
        for left in [*self.work.glob(".*.tmp"), *self.work.glob("labels/*/.*.tmp")]:
            left.unlink(missing_ok=True)

    def records(self) -> dict[str, dict[str, Any]]:
        """Id -> what is known of a cine."""
        return read_journal(self.private / JOURNAL)

    def present(self, workers: int = 1) -> Iterator[dict[str, Any]]:
        """Presents what is new or has changed, in processes that may crash alone.

        Yields:
            Records as they are done, presented or set aside.
        """
        from discovr_monai.inference.plan import find_cines  # heavy: processes that read need none

        known = self.records()
        rows = {salted_id(row["image"], self.salt): row for row in find_cines(self.source)[1]}
        todo = [
            (identity, row)
            for identity, row in rows.items()
            if "first" not in row and not self._done(known.get(identity), row)
        ]
        work = partial(present_file, studies=self)
        done = run_isolated(work, todo, workers=workers, timeout=TIMEOUT) if todo else ()
        path = self.private / JOURNAL
        for (identity, row), found, failure in done:
            entry = {"id": identity, "name": row["image"], "stamp": self._stamp(row)}
            entry |= found if failure is None else {"bad": list(failure)}
            if "bad" in entry:  # what is presented stays, and so does what is known of it
                entry = {**known.get(identity, {}), **entry}
            if "stop" in entry:
                raise OSError(f"cannot write ({entry['stop']}): free space, and start again")
            known[identity] = entry
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with os.fdopen(os.open(path, flags, PRIVATE), "wb") as file:
                file.write(json.dumps(entry).encode() + b"\n")
            yield entry
        self.report(known)

    def report(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes which id is which file, and what was set aside."""
        kept = [(r["id"], r["name"]) for r in known.values() if "window" in r]
        bad = [(r["name"], *r["bad"]) for r in known.values() if "bad" in r]
        for name, header, rows in (
            ("files.csv", ("id", "file"), sorted(kept, key=lambda r: r[1])),
            ("bad_files.csv", ("file", "kind", "reason", "what to do"), sorted(bad)),
        ):
            write_table(self.private / name, header, rows, mode=PRIVATE)

    def _stamp(self, row: DatalistRow) -> list[Any]:
        """Changes with the file and with what the datalist says of it."""
        try:
            stat = (self.source / row["image"]).stat()
        except OSError:
            return []
        return [stat.st_size, stat.st_mtime_ns, json.dumps(row, sort_keys=True)]

    def _done(self, entry: Mapping[str, Any] | None, row: DatalistRow) -> bool:
        if entry is None or entry.get("stamp") != self._stamp(row):
            return False
        return "bad" in entry or (self.work / f"{entry['id']}.nii.gz").is_file()


def present_file(job: tuple[str, DatalistRow], studies: Studies) -> dict[str, Any]:
    """Reads one cine, keeps its sector and writes it; never raises.

    Returns:
        A record without id: "fps", "spacing" (row, column) mm or None, "window" (see
        :class:`Cine`), "frames", "view", and salted "patient" and "study"; or {"bad": (kind,
        problem, remedy)}, or {"stop": reason} where the disk is full.
    """
    identity, row = job
    name = row["image"]
    try:
        path = file_below(studies.source, name)
        cine = read_cine(path, name=name)
        content, record = presented(cine, path, name)
        patient, study = salted_owners(row, studies.source, identity, studies.salt)
        replace_file(studies.work / f"{identity}.nii.gz", content)
    except OSError as error:
        return {"stop": error.strerror}
    except Exception as error:
        return {"bad": failure_of(error)}
    if row.get("fps"):
        record["fps"] = row["fps"]
    if row.get("spacing"):
        record["spacing"] = list(row["spacing"])
    return record | {
        "view": row.get("view"),
        "patient": patient,
        "study": study,
    }


def presented(cine: Cine, source: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """A cine's sector at its own place and size: burned-in text outside is black.

    Args:
        cine: as read.
        source: its file; a NIfTI's own geometry is kept, so that a label lies on both.
        name: for errors.

    Returns:
        A .nii.gz, and its record: "fps", "spacing", "window", "frames".

    Raises:
        CineError: see :func:`prepare_cine`.
    """
    sector = prepare_cine(cine, None, "auto", color=False, name=name)
    assert sector.window is not None
    height, width, top, left, h, w = sector.window
    frames = np.zeros((len(sector.frames), height, width), np.uint8)
    frames[:, top : top + h, left : left + w] = sector.frames
    content = nifti_bytes(frames, cine.spacing, cine.fps, source)
    record = {
        "fps": cine.fps,
        "spacing": list(cine.spacing) if cine.spacing else None,
        "window": [int(n) for n in sector.window],
        "frames": len(frames),
    }
    return gzip.compress(content, compresslevel=1, mtime=0), record


def nifti_bytes(
    frames: np.ndarray, spacing: tuple[float, float] | None, fps: float | None, source: Path
) -> bytes:
    """(T, H, W) uint8 as (X, Y, T) NIfTI with mm and seconds, and nothing of a source's names.

    The geometry is :func:`discovr_monai.data.write.labels.write_nifti_labels`'s, so that labels
    written for the source lie on what is presented, and the other way round.
    """
    import nibabel

    voxels = np.ascontiguousarray(frames.transpose(2, 1, 0))  # (X, Y, T)
    header = nibabel.Nifti1Header()
    header.set_data_shape(voxels.shape)
    like: Any = nibabel.load(source) if source.name.lower().endswith(NIFTI) else None
    if like is not None and like.shape == voxels.shape:
        for name in GEOMETRY:
            header[name] = like.header[name]
    else:
        place_anywhere(header, spacing, fps)
    header.set_data_dtype(np.uint8)
    header["descrip"] = NOTICE.encode()
    return bytes(nibabel.Nifti1Image(voxels, None, header).to_bytes())


def replace_file(path: Path, content: bytes | Path) -> None:
    """Puts bytes, or a copy of a file, at a path: on the disk before the old one goes.

    A kill leaves the old file or the new one, and at most a hidden .tmp beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        with temporary.open("xb") as out:
            if isinstance(content, bytes):
                out.write(content)
            else:
                with content.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def export_labels(
    work: str | Path,
    out: str | Path,
    tag: str = "final",
    source: str | Path | None = None,
    structures: Sequence[str] | None = None,
) -> dict[str, str]:
    """Saved labels under their sources' relative names, on the sources' own frames.

    Args:
        work: what a server presented.
        out: NAME.nii.gz, or NAME.dcm, for the source NAME; as identifying as the archive's names
            are, and DICOM as its headers.
        tag: which labels: "final" (a person's), "original" or another (a model's).
        source: the archive, for the geometry of NIfTI sources; None takes what was presented.
            DICOM needs it.
        structures: writes DICOM: names of labels 1, 2, ..., where a label does not say its own.

    Returns:
        The sources' relative names, and what was written for each: "NIfTI", "segmentation",
        "secondary capture: " and why, or "nothing: " and why.

    Raises:
        ValueError: with what to do.
    """
    from discovr_monai.data.read.masks import read_masks
    from discovr_monai.data.write.labels import write_dicom_labels, write_nifti_labels

    work, out = Path(work), Path(out)
    studies = Studies(Path(), work)
    records = studies.records()
    if not records:
        raise ValueError(f"{studies.private.name} says nothing of {work.name!r}: nothing presented")
    if structures is not None and source is None:
        raise ValueError("labels as DICOM refer to their source: name the archive by --studies")
    known, written = saved_info(work, tag) if structures is not None else {}, {}
    for identity, record in records.items():
        file, name = f"labels/{tag}/{identity}.nii.gz", str(record["name"])
        if "window" not in record or not (work / file).is_file():
            continue
        like = work / f"{identity}.nii.gz" if source is None else Path(source) / name
        try:
            labels = read_masks(work, file, (record["frames"], *record["window"][:2]))
            if structures is None:
                spacing = tuple(record["spacing"]) if record["spacing"] else None
                target = out / f"{name}.nii.gz"
                write_nifti_labels(target, labels, spacing, record["fps"], like, name=name)
                written[name] = "NIfTI"
                continue
            info = known.get(identity, {})
            names, model = told_structures(info) or structures, info.get("model")
            written[name] = write_dicom_labels(
                out / f"{name}.dcm", labels, names, like, str(model or f"MONAI Label {tag}"),
                name=name, corrected=tag == "final",
            )  # fmt: skip
        except ValueError as error:
            problem = error.problem if isinstance(error, CineError) else str(error)
            written[name] = f"nothing: {problem}"
    return written


def saved_info(work: Path, tag: str) -> dict[str, dict[str, Any]]:
    """By id what was saved with labels: by a model its numbers, by 3D Slicer its segments."""
    index = work / "datastore_v2.json"
    objects = json.loads(index.read_text())["objects"] if index.is_file() else {}
    found = {i: o.get("labels", {}).get(tag) or {} for i, o in objects.items()}
    return {i: label.get("info") or {} for i, label in found.items()}


def told_structures(info: Mapping[str, Any]) -> list[str]:
    """Names of labels 1, 2, ... as a label says them itself; [] if it does not."""
    if isinstance(segments := info.get("label_info"), list):
        names = [s.get("name") if isinstance(s, dict) else None for s in segments]
    else:
        numbered = (info.get("params") or {}).get("label_names")
        values = {v: n for n, v in numbered.items()} if isinstance(numbered, dict) else {}
        names = [values.get(i) for i in range(1, len(values) + 1)]
    return [str(n) for n in names] if all(names) else []
