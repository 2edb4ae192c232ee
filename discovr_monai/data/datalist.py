"""What to train on: a datalist, or a folder that is scanned, checked and split."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from discovr_monai.data.privacy import load_salt, salted_id
from discovr_monai.data.tables import shown, write_table
from discovr_monai.data.workers import run_isolated
from discovr_monai.distributed import barrier, rank
from discovr_monai.types import CineError, DatalistRow

if TYPE_CHECKING:
    from discovr_monai.data.transforms import LoadCined

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
    loader: LoadCined,
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
    resolved = root.resolve()
    for name in dict.fromkeys(names):
        if Path(name).is_absolute() or not (root / name).resolve().is_relative_to(resolved):
            raise ValueError(
                f"datalist {path.name!r} points outside the data folder ({Path(name).name!r}): "
                "use paths relative to dataset_dir"
            )
    missing = [n for n in dict.fromkeys(names) if must_exist and not (root / n).exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} files of datalist {path.name!r} do not exist, the "
            f"first is {missing[0]!r}. Check --dataset_dir, or leave these rows out"
        )
    return sections


# ---- scanning ----------------------------------------------------------------------------


def scan_folder(
    root: Path,
    *,
    loader: LoadCined,
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
    todo = [n for n in files if known.get(n, {}).get("stamp") != stamps[n]]
    found = {n: known[n] for n in files if n not in set(todo)}
    for name, verdict in check_all(todo, loader, salt, workers, quiet):
        verdict.pop("seen", None)
        found[name] = {**verdict, "stamp": stamps[name]}
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_json(index, found)
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


def check_file(name: str, loader: LoadCined, salt: bytes) -> dict[str, Any]:
    """{"row": ..., "seen": ...} for a usable cine, {"bad": (kind, problem, remedy)} for another.

    "seen" is what a report shows: the file's size, a thumbnail and a perceptual hash.
    """
    if not (loader.root / name).resolve().is_relative_to(loader.root.resolve()):
        return {"bad": ("refused", "it is a link that leads outside the folder", "Copy the file")}
    try:
        found = loader.load(name)
    except CineError as error:
        return {"bad": (error.kind, error.problem, error.remedy)}
    except MemoryError:
        return {"bad": ("unreadable", "it does not fit into memory", "Shorten or shrink it")}
    except Exception as error:  # a reader's own bug must not end a scan of thousands
        kind = type(error).__name__
        return {"bad": ("unreadable", f"reading it failed ({kind})", "Report it, leave it out")}
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


def check_all(
    names: Sequence[str],
    loader: LoadCined,
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
        check = partial(check_file, loader=loader, salt=salt)
        for name, verdict, failure in run_isolated(check, names, workers=workers):
            yield name, verdict if failure is None else {"bad": failure}
            bar.update()


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def ensure_demo_data(dataset_dir: str | Path, demo_dir: str | Path, **phantom: Any) -> None:
    """Makes the phantom data set if ``dataset_dir`` is the demo folder and it is not there."""
    if Path(dataset_dir).resolve() != Path(demo_dir).resolve():
        return
    if not rank() and not (Path(demo_dir) / "datalist.json").exists():
        from discovr_monai.data.phantom import write_phantom_dataset

        print("Making the demo data: a beating-heart phantom (once)", flush=True)
        write_phantom_dataset(demo_dir, **phantom)
    barrier()
