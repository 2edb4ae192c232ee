"""An archive as MONAI Label shows it: a NIfTI per cine under a salted id, and the way back.

The archive is never written to. What is presented lies in a folder of its own, and beside it lies
what leads back to the files, readable by its owner only:

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
from discovr_monai.base.files import PRIVATE, read_journal, save_atomic, write_text
from discovr_monai.base.notice import NOTICE
from discovr_monai.base.privacy import ID_DIGITS, load_salt, salted_id
from discovr_monai.base.tables import write_table
from discovr_monai.base.types import Cine, CineError, DatalistRow
from discovr_monai.data.lists.owners import salted_owners
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.kinds import NIFTI, failure_of, file_below
from discovr_monai.data.read.masks import read_masks
from discovr_monai.data.read.sector import prepare_cine
from discovr_monai.data.write.labels import (
    GEOMETRY,
    place_anywhere,
    write_dicom_labels,
    write_nifti_labels,
)
from discovr_monai.label.archive.saved import FINAL, SUFFIX

TIMEOUT = 120.0  # seconds that one file may take to read


@dataclass
class Studies:
    """An archive, and the folder that it is presented in.

    Attributes:
        source: holds DICOM, AVI, MP4, NIfTI, ... at any depth, or a datalist.json.
        work: where cines are presented, usually ``source``-label beside the source.
        salt: of the ids.
    """

    source: Path
    work: Path
    salt: bytes = field(default_factory=load_salt, repr=False)

    @property
    def private(self) -> Path:
        """Beside :attr:`work`, for nobody else."""
        return self.work.with_name(f"{self.work.name}-private")

    @property
    def journal(self) -> Path:
        """Of the cines that were presented or set aside; the last entry of an id counts."""
        return self.private / "cines.jsonl"

    @property
    def _owner(self) -> Path:
        """Says whose cines the folder presents, and by which salt."""
        return self.private / "studies.json"

    @property
    def digits(self) -> int:
        """Of the ids; a folder of an earlier release goes on with the fewer that it has.

        The shorter id of a cine or patient is the beginning of the longer one.
        """
        if self._owner.is_file():
            return len(json.loads(self._owner.read_text())["salt"])
        return ID_DIGITS

    def prepare(self) -> None:
        """Makes the folders, and clears what a killed server left.

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
        wanted = {
            "source": salted_id(f"source {source}", self.salt)[: self.digits],
            "salt": salted_id("label", self.salt)[: self.digits],
        }
        if not self._owner.exists():
            if any(not p.name.startswith(".") for p in self.work.iterdir()):
                raise ValueError(
                    f"{self.work.name!r} holds other files. Name a new folder (--work)"
                )
            write_text(self._owner, json.dumps(wanted), mode=PRIVATE)
        if json.loads(self._owner.read_text()) != wanted:
            raise ValueError(
                f"{self.work.name!r} presents other studies, or ids of another salt "
                "(DISCOVR_MONAI_SALT). Name another folder (--work)"
            )
        for left in [*self.work.glob(".*.tmp"), *self.work.glob("labels/*/.*.tmp")]:
            left.unlink(missing_ok=True)

    def records(self) -> dict[str, dict[str, Any]]:
        """Id -> what the journal says of a cine."""
        return read_journal(self.journal)

    def present(self, workers: int = 1) -> Iterator[dict[str, Any]]:
        """Presents what is new or has changed, in processes whose crash ends nothing else.

        Yields:
            Records as they are done, presented or set aside.

        Raises:
            OSError: the disk is full.
        """
        from discovr_monai.inference.plan import find_cines  # heavy, and readers do not need it

        records, digits = self.records(), self.digits
        cines = find_cines(self.source)[1]
        rows = {salted_id(row["image"], self.salt)[:digits]: row for row in cines}
        todo = [
            (identity, row)
            for identity, row in rows.items()
            if "first" not in row and not self._is_done(records.get(identity), row)
        ]
        work = partial(present_file, studies=self)
        done = run_isolated(work, todo, workers=workers, timeout=TIMEOUT) if todo else ()
        for (identity, row), result, failure in done:
            record = {"id": identity, "name": row["image"], "stamp": self._stamp(row)}
            record |= result if failure is None else {"bad": list(failure)}
            if "stop" in record:
                raise OSError(f"cannot write ({record['stop']}): free space, and start again")
            if "bad" in record:  # what was presented earlier stays, and so does its record
                record = {**records.get(identity, {}), **record}
            records[identity] = record
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with os.fdopen(os.open(self.journal, flags, PRIVATE), "wb") as file:
                file.write(json.dumps(record).encode() + b"\n")
            yield record
        self._report(records)

    def _report(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes which id is which file, and what was set aside."""
        names = sorted(
            ((r["id"], r["name"]) for r in records.values() if "window" in r), key=lambda r: r[1]
        )
        bad = sorted((r["name"], *r["bad"]) for r in records.values() if "bad" in r)
        write_table(self.private / "files.csv", ("id", "file"), names, mode=PRIVATE)
        header = ("file", "kind", "reason", "what to do")
        write_table(self.private / "bad_files.csv", header, bad, mode=PRIVATE)

    def _stamp(self, row: DatalistRow) -> list[Any]:
        """Changes with the file and with what the datalist says of it."""
        try:
            stat = (self.source / row["image"]).stat()
        except OSError:
            return []
        return [stat.st_size, stat.st_mtime_ns, json.dumps(row, sort_keys=True)]

    def _is_done(self, record: Mapping[str, Any] | None, row: DatalistRow) -> bool:
        if record is None or record.get("stamp") != self._stamp(row):
            return False
        return "bad" in record or (self.work / f"{record['id']}{SUFFIX}").is_file()


def present_file(job: tuple[str, DatalistRow], studies: Studies) -> dict[str, Any]:
    """Reads one cine, keeps its sector and writes it; never raises.

    Args:
        job: the cine's id and datalist row.
        studies: where it is, and where it goes.

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
        replace_file(studies.work / f"{identity}{SUFFIX}", content)
    except OSError as error:
        return {"stop": error.strerror}
    except Exception as error:
        return {"bad": failure_of(error)}
    if row.get("fps"):
        record["fps"] = row["fps"]
    if row.get("spacing"):
        record["spacing"] = list(row["spacing"])
    owners = {"patient": patient[: studies.digits], "study": study[: studies.digits]}
    return record | {"view": row.get("view"), **owners}


def presented(cine: Cine, source: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    """A cine's sector at its own place and size; what is burned in outside of it becomes black.

    Args:
        cine: as it was read.
        source: its file; a NIfTI's own geometry is kept, so that a label lies on both.
        name: for errors.

    Returns:
        The content of a .nii.gz, and its record: "fps", "spacing", "window", "frames".

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

    The geometry is that of :func:`discovr_monai.data.write.labels.write_nifti_labels`, so that
    labels written for the source lie on what is presented, and the other way round.
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
    """Puts bytes, or a copy of a file, at a path; when it returns, content and name are on disk.

    A kill leaves the old file or the new one, and at most a hidden .tmp beside it.
    """

    def write(temporary: Path) -> None:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            shutil.copyfile(content, temporary)

    save_atomic(write, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else a loss of power could undo the renaming
    finally:
        os.close(folder)


# ---- the way back --------------------------------------------------------------------------


def export_labels(
    work: str | Path,
    out: str | Path,
    tag: str = FINAL,
    source: str | Path | None = None,
    structures: Sequence[str] | None = None,
) -> dict[str, str]:
    """Writes saved labels under their sources' relative names, on the sources' own frames.

    Args:
        work: what a server presented.
        out: gets NAME.nii.gz or NAME.dcm for the source NAME; names, and the headers of DICOM, are
            as identifying as the archive's.
        tag: which labels: "final" (a person's), "original" or another (a model's).
        source: the archive; DICOM needs it. None takes the geometry of what was presented.
        structures: writes DICOM, with these names of labels 1, 2, ... where a label does not say
            its own; None writes NIfTI.

    Returns:
        The sources' relative names, and what was written for each: "NIfTI", "segmentation",
        "secondary capture: " and why, or "nothing: " and why.

    Raises:
        ValueError: with what to do.
    """
    work, out = Path(work), Path(out)
    studies = Studies(Path(), work)
    records = studies.records()
    if not records:
        raise ValueError(f"{studies.private.name} says nothing of {work.name!r}: nothing presented")
    if structures is not None and source is None:
        raise ValueError("labels as DICOM refer to their source: name the archive by --studies")
    infos = label_infos(work, tag) if structures is not None else {}
    written: dict[str, str] = {}
    for identity, record in records.items():
        file, name = f"labels/{tag}/{identity}{SUFFIX}", str(record["name"])
        if "window" not in record or not (work / file).is_file():
            continue
        like = work / f"{identity}{SUFFIX}" if source is None else Path(source) / name
        try:
            labels = read_masks(work, file, (record["frames"], *record["window"][:2]))
            if structures is None:
                spacing = tuple(record["spacing"]) if record["spacing"] else None
                target = out / f"{name}{SUFFIX}"
                write_nifti_labels(target, labels, spacing, record["fps"], like, name=name)
                written[name] = "NIfTI"
            else:
                info = infos.get(identity, {})
                names = structure_names(info) or structures
                model = str(info.get("model") or f"MONAI Label {tag}")
                target, corrected = out / f"{name}.dcm", tag == FINAL
                written[name] = write_dicom_labels(
                    target, labels, names, like, model, name=name, corrected=corrected
                )
        except ValueError as error:
            problem = error.problem if isinstance(error, CineError) else str(error)
            written[name] = f"nothing: {problem}"
    return written


def label_infos(work: Path, tag: str) -> dict[str, dict[str, Any]]:
    """Id -> what was saved with a label: a model's numbers, or the segments of 3D Slicer."""
    index = work / "datastore_v2.json"
    objects = json.loads(index.read_text())["objects"] if index.is_file() else {}
    labels = {i: entry.get("labels", {}).get(tag) or {} for i, entry in objects.items()}
    return {identity: label.get("info") or {} for identity, label in labels.items()}


def structure_names(info: Mapping[str, Any]) -> list[str]:
    """Names of labels 1, 2, ... as a label says them itself; [] if it does not.

    >>> structure_names({"params": {"label_names": {"wall": 2, "cavity": 1}}})
    ['cavity', 'wall']
    """
    if isinstance(segments := info.get("label_info"), list):
        names = [s.get("name") if isinstance(s, dict) else None for s in segments]
    else:
        numbered = (info.get("params") or {}).get("label_names")
        by_value = {v: n for n, v in numbered.items()} if isinstance(numbered, dict) else {}
        names = [by_value.get(value) for value in range(1, len(by_value) + 1)]
    return [str(n) for n in names] if all(names) else []
