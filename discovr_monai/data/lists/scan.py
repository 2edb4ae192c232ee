"""A folder without a datalist: every file is decoded once, checked and sorted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from discovr_monai.base.distributed import barrier, rank
from discovr_monai.base.engine import run_isolated
from discovr_monai.base.files import write_text
from discovr_monai.base.privacy import ID_DIGITS, load_salt, salted_id
from discovr_monai.base.tables import shown, write_table
from discovr_monai.data.lists.datalist import Datalist, load_rows
from discovr_monai.data.lists.split import split_by_patient
from discovr_monai.data.read.dicom import patient_of
from discovr_monai.data.read.kinds import failure_of, file_below, walk
from discovr_monai.data.read.loader import CineLoader


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
    beside = root / "datalist.json"
    if datalist is not None or beside.is_file():
        data = Datalist(load_rows(Path(datalist) if datalist is not None else beside, root))
    else:
        scan = partial(
            scan_folder, root, loader=loader, output_dir=Path(output_dir),
            val_fraction=val_fraction, seed=seed,
        )  # fmt: skip
        if not rank():
            data = scan(workers=workers)
        barrier()
        if rank():  # the other ranks read what rank 0 found out
            data = scan(workers=1, quiet=True)
    salt = load_salt()
    for rows in data.sections.values():
        for row in rows:
            row["id"] = salted_id(f"{row['image']}{row.get('first', '')}", salt)
    return data


def _check_folder(root: Path) -> None:
    hint = "Check --dataset_dir"
    if not root.exists():
        raise FileNotFoundError(f"dataset_dir {root.name!r} does not exist. {hint}")
    if not root.is_dir():
        raise NotADirectoryError(f"dataset_dir {root.name!r} is a file, not a folder. {hint}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(f"dataset_dir {root.name!r} may not be read. Change its permissions")


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
    """Decodes every file below ``root`` once and splits the usable ones by patient.

    What an earlier scan said of a file, in scan.json of ``output_dir``, still holds where the
    file's size and time are the same. Patients are salted ids.

    Raises:
        ValueError: if the folder is empty or holds nothing usable.
    """
    files = sorted(walk(root))
    if not files:
        raise ValueError(f"dataset_dir {root.name!r} is empty. Put cines into it")
    index = output_dir / "scan.json"
    earlier = _load_index(index)
    salt = load_salt()
    # An index of an earlier version has shorter ids and no number of digits: all is read again.
    wanted = f"{loader.size}|{loader.sector}|{loader.color}|{ID_DIGITS}"
    stamps = {name: [*_stamp(root / name), wanted] for name in files}
    verdicts = {n: earlier[n] for n in files if earlier.get(n, {}).get("stamp") == stamps[n]}
    todo = [n for n in files if n not in verdicts]
    for name, verdict in examine_files(todo, loader, salt, workers, quiet):
        verdict.pop("seen", None)
        verdicts[name] = {**verdict, "stamp": stamps[name]}
    if verdicts != earlier:
        write_text(index, json.dumps(verdicts))
    rows = [verdicts[n]["row"] for n in files if "row" in verdicts[n]]
    bad = [(n, *verdicts[n]["bad"]) for n in files if "bad" in verdicts[n]]
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
    # 12 digits decide, as when ids had no more: a folder that was split before keeps its split
    sections = split_by_patient(rows, val_fraction, seed, digits=12)
    return Datalist(sections, len(bad), report)


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


def examine_file(name: str, loader: CineLoader, salt: bytes) -> dict[str, Any]:
    """Decodes a file and says whether it is a usable cine; never raises.

    Returns:
        {"row": datalist row, "seen": :func:`appearance`} for a usable cine,
        {"bad": (kind, problem, remedy)} for anything else.
    """
    try:
        file_below(loader.root, name)
        cine = loader.load(name)
    except Exception as error:
        return {"bad": failure_of(error)}
    row: dict[str, Any] = {"image": name, "num_frames": len(cine.frames)}
    row["patient"] = salted_id(patient_of(loader.root / name) or f"file {name}", salt)
    if cine.fps:
        row["fps"], row["fps_source"] = cine.fps, cine.fps_source
    return {"row": row, "seen": appearance(cine.frames, cine.window)}


def appearance(frames: np.ndarray, window: Sequence[int]) -> dict[str, Any]:
    """What a report shows of a cine: size of its file's frames, thumbnail, perceptual hash.

    Args:
        frames: (T, H, W) grey or (T, H, W, 3) RGB, uint8.
        window: see :class:`discovr_monai.base.types.Cine`.

    Returns:
        "size" (rows, columns), "thumbnail" 64 x 64 bytes of grey, "hash" 32 hexadecimal digits:
        for the first and for the middle frame, on a grid of 8 x 9, whether brightness grows from
        left to right (dHash).
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


def examine_files(
    names: Sequence[str],
    loader: CineLoader,
    salt: bytes,
    workers: int | None = None,
    quiet: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, :func:`examine_file`'s verdict) of every file, in any order.

    With several workers, a file that crashes or blocks its reader costs only itself.
    """
    bar = tqdm(desc="reading cines", unit="file", total=len(names), disable=quiet or not names)
    workers = min(workers or os.cpu_count() or 1, 1 + len(names) // 64)
    with bar:
        if workers <= 1:
            for name in names:
                yield name, examine_file(name, loader, salt)
                bar.update()
            return
        # a LoadCined would make each process import MONAI, seconds before its first file
        plain = CineLoader(loader.root, loader.store, loader.size, loader.sector, loader.color)
        examine = partial(examine_file, loader=plain, salt=salt)
        for name, verdict, failure in run_isolated(examine, names, workers=workers):
            yield name, verdict if failure is None else {"bad": failure}
            bar.update()
