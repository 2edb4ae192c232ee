"""What to train on: a datalist, or a folder that is scanned, checked and split."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from discovr_monai.data.cine import failure_of, file_below
from discovr_monai.data.loading import CineLoader
from discovr_monai.data.privacy import load_salt, salted_id
from discovr_monai.data.tables import shown, write_table
from discovr_monai.data.workers import run_isolated
from discovr_monai.distributed import barrier, rank
from discovr_monai.files import write_text
from discovr_monai.types import CineError, DatalistRow

OURS = {"bad_files.csv", "datalist.json", "phantom.json"}  # never scanned as data


@dataclass
class Datalist:
    """Rows by section, and what was set aside.

    Attributes:
        sections: "training", "validation", ... -> rows; every row has "id".
        set_aside: how many files the report lists.
        report: the report's path, None where nothing was set aside.
    """

    sections: dict[str, list[DatalistRow]]
    set_aside: int = 0
    report: Path | None = None

    @property
    def fingerprint(self) -> str:
        """8 digits that change with which cines are in which section; salted, as their ids are."""
        content = json.dumps({n: [r["id"] for r in rows] for n, rows in self.sections.items()})
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    def rows(self, section: str, *, normal_only: bool = False) -> list[DatalistRow]:
        """A section's rows, without those labelled abnormal if ``normal_only``.

        Raises:
            ValueError: if the section is missing or nothing is left.
        """
        if section not in self.sections:
            have = ", ".join(f"{k} ({len(v)})" for k, v in self.sections.items())
            raise ValueError(f"the datalist has no section {section!r}; it has {have}")
        rows = self.sections[section]
        if normal_only:
            rows = [r for r in rows if not r.get("label")]
        if not rows:
            why = (
                "only cines labelled abnormal; set normal_only: false" if normal_only else "nothing"
            )
            raise ValueError(f"section {section!r} of the datalist holds {why}")
        return rows


def summary(rows: Sequence[Mapping[str, Any]], set_aside: int = 0) -> str:
    """ "225 cines, 0.12 hours, 110 patients", and what was set aside or is unknown."""
    known = [r["num_frames"] / r["fps"] for r in rows if r.get("num_frames") and r.get("fps")]
    hours = f"{sum(known) / 3600:.2f} hours" if known else "length unknown"
    if known and len(known) < len(rows):
        hours += f" ({len(rows) - len(known)} of unknown length)"
    patients = {r["patient"] for r in rows if "patient" in r}
    people = f"{len(patients)} patients" if patients else "patients unknown"
    aside = f"; {set_aside} files set aside" if set_aside else ""
    return f"{len(rows)} cines, {hours}, {people}{aside}"


def load_datalist(
    dataset_dir: str | Path,
    datalist: str | Path | None = None,
    *,
    loader: CineLoader,
    output_dir: str | Path,
    val_fraction: float = 0.1,
    seed: int = 0,
    workers: int | None = None,
) -> Datalist:
    """The rows of a data set, from a datalist JSON or from scanning its folder.

    A datalist is ``datalist``, else ``datalist.json`` in the folder: Decathlon style, paths
    relative to the folder. Without one, every file is decoded once (into the loader's store);
    what cannot be used goes to ``bad_files.csv`` in ``output_dir``, the rest is split by patient
    (by file where the patient is unknown).

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: with what to do.
    """
    root = Path(dataset_dir)
    _check_folder(root)
    own = root / "datalist.json"
    if datalist is not None or own.is_file():
        found = Datalist(load_rows(Path(datalist) if datalist is not None else own, root))
    else:
        result: Datalist | None = None
        if not rank():
            result = scan_folder(
                root,
                loader=loader,
                output_dir=Path(output_dir),
                val_fraction=val_fraction,
                seed=seed,
                workers=workers,
            )
        barrier()
        if result is None:  # the other ranks read what rank 0 found out
            result = scan_folder(
                root,
                loader=loader,
                output_dir=Path(output_dir),
                val_fraction=val_fraction,
                seed=seed,
                workers=1,
                quiet=True,
            )
        found = result
    salt = load_salt()
    for rows in found.sections.values():
        for row in rows:
            row["id"] = salted_id(f"{row['image']}{row.get('first', '')}", salt)
    return found


def _check_folder(root: Path) -> None:
    hint = "Check --dataset_dir"
    if not root.exists():
        raise FileNotFoundError(f"dataset_dir {root.name!r} does not exist. {hint}")
    if not root.is_dir():
        raise NotADirectoryError(f"dataset_dir {root.name!r} is a file, not a folder. {hint}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(f"dataset_dir {root.name!r} may not be read. Change its permissions")


def load_rows(path: Path, root: Path, *, must_exist: bool = True) -> dict[str, list[DatalistRow]]:
    """The sections of a Decathlon-style JSON over ``root``.

    Args:
        must_exist: whether a file that is not there is an error at once.

    Raises:
        FileNotFoundError, ValueError: with what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"datalist {path.name!r} does not exist. Check --datalist")
    try:
        content = json.loads(path.read_text())
        sections = {k: v for k, v in content.items() if isinstance(v, list)}
        rows = [row for section in sections.values() for row in section]
        names = [row["image"] for row in rows]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"datalist {path.name!r} is not a Decathlon-style JSON: it needs lists of rows with "
            f'an "image" each, such as {{"training": [{{"image": "a.avi"}}]}} ({error})'
        ) from error
    missing = []
    for name, below, there in _look_up(root, dict.fromkeys(names)):
        if not below:
            raise ValueError(
                f"datalist {path.name!r} points outside the data folder ({Path(name).name!r}): "
                "use paths relative to dataset_dir"
            )
        if not there:
            missing.append(name)
    if missing and must_exist:
        raise ValueError(
            f"{len(missing)} of {len(names)} files of datalist {path.name!r} do not exist, the "
            f"first is {missing[0]!r}. Check --dataset_dir, or leave these rows out"
        )
    return sections


def _look_up(root: Path, names: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """(name, whether it lies below root, whether it is there) of every file.

    A folder is listed once, instead of asking the disk (often a far one) for each of its files;
    links, and what no list shows, are asked for.
    """
    resolved = root.resolve()
    listed: dict[str, set[str]] = {}
    for name in names:
        folder, file = os.path.split(name)
        if folder not in listed:
            absolute = Path(folder).is_absolute()
            listed[folder] = set() if absolute else _plain_files(root / folder, resolved)
        if file in listed[folder]:
            yield name, True, True
            continue
        path = root / name
        below = not Path(name).is_absolute() and path.resolve().is_relative_to(resolved)
        yield name, below, below and path.exists()


def _plain_files(folder: Path, top: Path) -> set[str]:
    """What a folder holds but links; nothing where it lies outside ``top`` or cannot be listed."""
    folder = folder.resolve()
    if not folder.is_relative_to(top):
        return set()
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink()}
    except OSError:
        return set()


# ---- scanning ----------------------------------------------------------------------------


def scan_folder(
    root: Path,
    *,
    loader: CineLoader,
    output_dir: Path,
    val_fraction: float = 0.1,
    seed: int = 0,
    workers: int | None = None,
    quiet: bool = False,
) -> Datalist:
    """Decodes every file below ``root`` once and sorts the usable ones into two sections.

    Files known from an earlier scan (same size and time) are not decoded again. Patients are
    salted ids.

    Raises:
        ValueError: if the folder is empty or holds nothing usable.
    """
    files = sorted(walk(root))
    if not files:
        raise ValueError(f"dataset_dir {root.name!r} is empty. Put cines into it")
    index = output_dir / "scan.json"
    known = _load_index(index)
    salt = load_salt()
    wanted = f"{loader.size}|{loader.sector}|{loader.color}"
    stamps = {name: [*_stamp(root / name), wanted] for name in files}
    found = {n: known[n] for n in files if known.get(n, {}).get("stamp") == stamps[n]}
    todo = [n for n in files if n not in found]
    for name, verdict in check_all(todo, loader, salt, workers, quiet):
        verdict.pop("seen", None)
        found[name] = {**verdict, "stamp": stamps[name]}
    if found != known:
        write_text(index, json.dumps(found))
    rows = [found[n]["row"] for n in files if "row" in found[n]]
    bad = [(n, *found[n]["bad"]) for n in files if "bad" in found[n]]
    report = output_dir / "bad_files.csv" if bad else None
    if report is not None and not quiet:
        write_table(report, ("file", "kind", "reason", "what to do"), bad)
        print(f"{len(bad)} of {len(files)} files set aside, reasons in {report.name}")
    if not rows:
        raise ValueError(
            f"dataset_dir {root.name!r} holds no usable cine: all {len(files)} files were set "
            f"aside, the reasons are in bad_files.csv in the output folder; the first: "
            f"{shown(bad[0][0])}: {bad[0][2]}"
        )
    return Datalist(split_by_patient(rows, val_fraction, seed), len(bad), report)


def split_by_patient(
    rows: Sequence[DatalistRow], val_fraction: float, seed: int
) -> dict[str, list[DatalistRow]]:
    """Training and validation rows without a patient in both; all train if there is one only."""
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction} must lie in [0, 1)")
    order = {p: salted_id(p, str(seed).encode()) for p in {r["patient"] for r in rows}}
    patients = sorted(order, key=lambda p: order[p])
    held = set(patients[: round(len(patients) * val_fraction)])
    return {
        "training": [r for r in rows if r["patient"] not in held],
        "validation": [r for r in rows if r["patient"] in held],
    }


def walk(root: Path) -> Iterator[str]:
    """Files below root, links to folders not followed, hidden and our own files left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in names:
            raw = name.lower().endswith((".raw", ".zraw"))  # the pixels of an .mhd beside it
            if not name.startswith(".") and name not in OURS and not raw:
                yield str((Path(folder) / name).relative_to(root))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (-1, -1)
    return (stat.st_size, stat.st_mtime_ns)


def _load_index(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def check_file(name: str, loader: CineLoader, salt: bytes) -> dict[str, Any]:
    """{"row": ..., "seen": ...} for a usable cine, {"bad": (kind, problem, remedy)} for another.

    "seen" is what a report shows: the file's size, a thumbnail and a perceptual hash.
    """
    try:
        file_below(loader.root, name)
        found = loader.load(name)
    except Exception as error:
        return {"bad": failure_of(error)}
    row: dict[str, Any] = {"image": name, "num_frames": len(found.frames)}
    row["patient"] = salted_id(patient_of(loader.root / name) or f"file {name}", salt)
    if found.fps:
        row["fps"], row["fps_source"] = found.fps, found.fps_source
    return {"row": row, "seen": look(found.frames, found.window)}


def look(frames: np.ndarray, window: Sequence[int]) -> dict[str, Any]:
    """A small record of a cine: size of its file's frames, thumbnail, perceptual hash.

    The hash is 128 bits: whether brightness grows from left to right, on an 8 x 9 grid of the
    first and of the middle frame (dHash).
    """
    from PIL import Image

    bits = []
    for frame in (frames[0], frames[len(frames) // 2]):
        grey = frame if frame.ndim == 2 else frame[..., 1]
        small = np.asarray(Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX), np.int16)
        bits.append((np.diff(small) > 0).ravel())
    middle = frames[len(frames) // 2]
    thumbnail = Image.fromarray(middle if middle.ndim == 2 else middle[..., 1]).resize((64, 64))
    return {
        "size": (int(window[0]), int(window[1])),
        "hash": np.packbits(np.concatenate(bits)).tobytes().hex(),
        "thumbnail": thumbnail.tobytes(),
    }


def patient_of(path: Path) -> str | None:
    """A DICOM file's PatientID, None for others; to be salted before it goes anywhere."""
    return owners_of(path)[0]


def owners_of(path: Path) -> tuple[str | None, str | None]:
    """A DICOM file's PatientID and StudyInstanceUID; to be salted before they go anywhere."""
    from discovr_monai.data.cine import is_dicom
    from discovr_monai.data.cine_dicom import open_dicom

    try:
        if not is_dicom(path):
            return None, None
        dataset = open_dicom(path, path.name, pixels=False)
    except (CineError, OSError):
        return None, None
    patient, study = dataset.get("PatientID"), dataset.get("StudyInstanceUID")
    return f"patient {patient}" if patient else None, f"study {study}" if study else None


def salted_owners(row: DatalistRow, root: Path, identity: str, salt: bytes) -> tuple[str, str]:
    """Salted patient and study of a cine: the datalist's, else its DICOM header's.

    Without either, a file is a patient of its own, and a study is a patient's, or a folder's.

    Args:
        identity: of the file, for one that is alone.
    """
    path = root / row["image"]
    patient, study = owners_of(path)
    owner = row.get("patient") or patient
    folder = path.parent.relative_to(root)
    there = f"folder {folder}" if folder.parts else f"file {identity}"
    return (
        salted_id(str(owner or f"file {identity}"), salt),
        salted_id(str(row.get("study") or study or owner or there), salt),
    )


def check_all(
    names: Sequence[str],
    loader: CineLoader,
    salt: bytes,
    workers: int | None = None,
    quiet: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, :func:`check_file`'s verdict) of every file, in any order, whatever the files do."""
    bar = tqdm(desc="reading cines", unit="file", total=len(names), disable=quiet or not names)
    workers = min(workers or os.cpu_count() or 1, 1 + len(names) // 64)
    with bar:
        if workers <= 1:
            for name in names:
                yield name, check_file(name, loader, salt)
                bar.update()
            return
        # a LoadCined would make each process import MONAI, seconds before its first file
        plain = CineLoader(loader.root, loader.store, loader.size, loader.sector, loader.color)
        check = partial(check_file, loader=plain, salt=salt)
        for name, verdict, failure in run_isolated(check, names, workers=workers):
            yield name, verdict if failure is None else {"bad": failure}
            bar.update()


def ensure_demo_data(dataset_dir: str | Path, demo_dir: str | Path, **phantom: Any) -> None:
    """Makes the phantom data set if ``dataset_dir`` is the demo folder and it is not there."""
    if Path(dataset_dir).resolve() != Path(demo_dir).resolve():
        return
    if not rank() and not (Path(demo_dir) / "datalist.json").exists():
        from discovr_monai.data.phantom import write_phantom_dataset

        print("Making the demo data: a beating-heart phantom (once)", flush=True)
        write_phantom_dataset(demo_dir, **phantom)
    barrier()
