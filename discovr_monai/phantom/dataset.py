"""A data set of phantom clips in EchoNet-Dynamic's layout.

Every clip follows from the data set's seed and its own numbers (see
:mod:`discovr_monai.phantom.cine`), so the files do not depend on how many processes write them.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from discovr_monai.base.distributed import barrier, rank
from discovr_monai.base.files import save_atomic, write_text
from discovr_monai.phantom.cine import build_scanner, encode_avi, truth_of
from discovr_monai.phantom.heart import POPULATIONS

VERSION = 1
SPLITS = ("TRAIN", "VAL", "TEST")
FILE_LIST = "FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split"
TRACINGS = "FileName,X1,Y1,X2,Y2,Frame"
TRUTH = "FileName,patient,population,kind,label,heart_rate,ed_frame,es_frame"


@dataclass(frozen=True)
class _Plan:
    """One clip of a data set: which heart, which files."""

    name: str
    patient: int
    clip: int
    split: str


def plan_dataset(seed: int, num_clips: int) -> list[_Plan]:
    """Shares clips among patients (1 to 3 each) and patients among splits (75/12.5/12.5 %)."""
    rng = np.random.default_rng([seed, 2**32 - 1])
    sizes: list[int] = []
    while sum(sizes) < num_clips:
        sizes.append(min(int(rng.integers(1, 4)), num_clips - sum(sizes)))
    count = len(sizes)
    held = max(round(count / 8), 1) if count > 2 else 0
    splits = np.array(["TRAIN"] * (count - 2 * held) + ["VAL"] * held + ["TEST"] * held)
    splits = splits[rng.permutation(count)]
    names: list[str] = []
    while len(names) < num_clips:
        name = f"0X{int(rng.integers(16**15, 16**16 - 1, dtype=np.uint64)):X}"
        if name not in names:
            names.append(name)
    owners = [(patient, clip) for patient, size in enumerate(sizes) for clip in range(size)]
    return [
        _Plan(name, patient, clip, str(splits[patient]))
        for name, (patient, clip) in zip(names, owners, strict=True)
    ]


def _make_clip(job: tuple[str, dict[str, Any], _Plan]) -> dict[str, Any]:
    """Writes one clip's movie and masks unless they are there, and returns its truth."""
    folder, settings, plan = job
    root = Path(folder)
    scanner = build_scanner(
        settings["seed"],
        num_frames=settings["num_frames"],
        size=settings["size"],
        patient=plan.patient,
        clip=plan.clip,
        **{key: settings[key] for key in ("population", "gain", "depth")},
    )
    video, mask = root / "Videos" / f"{plan.name}.avi", root / "Masks" / f"{plan.name}.npz"
    if not video.exists():
        cine = scanner.cine()
        save_atomic(partial(encode_avi, cine, scanner.beat.fps), video, durable=False)
    if not mask.exists():
        masks = np.stack([scanner.mask(t) for t in range(settings["num_frames"])])
        save_atomic(partial(_save_masks, masks), mask, durable=False)
    return {**asdict(plan), **truth_of(scanner), "spacing": scanner.pixel}


def _save_masks(masks: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # savez would add .npz to the name of a temporary file
        np.savez_compressed(file, mask=masks)


def _map(jobs: Sequence[Any], workers: int) -> Iterable[dict[str, Any]]:
    """Results of the jobs in order, from this process or from spawned ones."""
    if workers <= 1:
        yield from map(_make_clip, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_make_clip, jobs)


def csv_text(header: str, rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header.split(","))
    writer.writerows(rows)
    return text.getvalue()


def _write_tables(root: Path, clips: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Writes the three CSV files."""
    size, frames = settings["size"], settings["num_frames"]
    listing = [
        (
            c["name"],
            *(round(c[key], 6) for key in ("ef", "esv", "edv")),
            *(size, size, round(c["fps"]), frames, c["split"]),
        )
        for c in clips
    ]
    tracings = [
        (f"{c['name']}.avi", *(round(float(v), 4) for v in row), c[f"{phase}_frame"])
        for c in clips
        for phase in ("es", "ed")
        for row in c[f"{phase}_chords"]
    ]
    truth = [
        (
            *(c["name"], f"P{c['patient']:04d}", c["population"], c["kind"], c["label"]),
            *(round(c["heart_rate"], 2), c["ed_frame"], c["es_frame"]),
        )
        for c in clips
    ]
    write_text(root / "FileList.csv", csv_text(FILE_LIST, listing))
    write_text(root / "VolumeTracings.csv", csv_text(TRACINGS, tracings))
    write_text(root / "Phantom.csv", csv_text(TRUTH, truth))


def _datalist(clips: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The MONAI Decathlon-style list; no patient is in two sections but for pretraining."""
    keys = {"TRAIN": "training", "VAL": "validation", "TEST": "test"}
    out: dict[str, Any] = {
        "name": "discovr phantom",
        "description": f"Simulated apical four-chamber cines, seed {settings['seed']}; no patients",
        "training": [],
        "validation": [],
        "test": [],
    }
    for c in clips:
        row: dict[str, Any] = {
            "image": f"Videos/{c['name']}.avi",
            "patient": f"P{c['patient']:04d}",
            "fps": c["fps"],
            "num_frames": settings["num_frames"],
            **{key: round(c[key], 6) for key in ("ef", "edv", "esv")},
            **{key: c[key] for key in ("label", "ed_frame", "es_frame", "population", "kind")},
            "mask": f"Masks/{c['name']}.npz",
            "spacing": [round(c["spacing"], 6)] * 2,
            "view": "A4C",
        }
        out[keys[c["split"]]].append(row)
    normal_only = settings["normal_only_pretraining"]
    out["pretraining"] = [r for r in out["training"] if r["label"] == 0 or not normal_only]
    return out


def _claim(root: Path, settings: dict[str, Any]) -> None:
    """Makes sure that the folder is new, empty, or holds a phantom of the same settings."""
    stamp = root / "phantom.json"
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root.name} is a file; name a folder for the phantom")
    if stamp.exists():
        earlier = json.loads(stamp.read_text())
        if earlier != settings:
            different = sorted(k for k in settings if earlier.get(k) != settings[k])
            raise ValueError(
                f"{root.name} holds a phantom of other settings ({', '.join(different)} differ); "
                "name another folder, or remove this one"
            )
        return
    if root.exists() and any(not f.name.startswith(".phantom.") for f in root.iterdir()):
        raise ValueError(
            f"{root.name} holds files that are not a phantom's; name a new or empty folder"
        )
    root.mkdir(parents=True, exist_ok=True)
    write_text(stamp, json.dumps(settings, indent=1))


def _check(settings: dict[str, Any]) -> None:
    clips, frames, size = (settings[key] for key in ("num_clips", "num_frames", "size"))
    if clips < 1 or frames < 16 or size < 32 or size % 2:
        raise ValueError(
            f"num_clips={clips}, num_frames={frames}, size={size}: need at least 1 clip "
            "of 16 frames and an even size of at least 32"
        )
    if settings["population"] not in (None, *POPULATIONS):
        raise ValueError(f"unknown population {settings['population']!r}; use one of {POPULATIONS}")


def write_phantom_dataset(
    root: str | os.PathLike[str],
    *,
    num_clips: int = 300,
    num_frames: int = 96,
    seed: int = 0,
    size: int = 112,
    workers: int | None = None,
    normal_only_pretraining: bool = True,
    population: str | None = None,
    gain: float = 0.0,
    depth: float = 1.0,
    progress: bool = True,
) -> Path:
    """Writes a phantom data set in EchoNet-Dynamic's layout, with masks and a datalist.

    A folder that holds ``datalist.json`` is complete and a second call returns at once; an
    interrupted one is finished by calling again. Call it under ``if __name__ == "__main__":`` in
    scripts, since the worker processes are spawned.

    Args:
        root: folder to write; new, empty, or a phantom of the same settings.
        num_clips: how many clips.
        num_frames: frames of each clip, at least 16.
        seed: everything follows from it.
        size: pixels per side, even, at least 32.
        workers: processes; None for one per core, 0 or 1 for none beside this one.
        normal_only_pretraining: whether the list "pretraining" leaves abnormal hearts out.
        population: "adult", "paediatric" or "fetal" only; None for a mixture.
        gain, depth: as in :func:`build_scanner`, for a data set that differs from another.
        progress: whether to show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: for senseless settings, or a folder that holds something else.
    """
    root = Path(root)
    settings: dict[str, Any] = {
        "phantom": VERSION, "num_clips": num_clips, "num_frames": num_frames, "seed": seed,
        "size": size, "normal_only_pretraining": normal_only_pretraining,
        "population": population, "gain": gain, "depth": depth,
    }  # fmt: skip
    _check(settings)
    _claim(root, settings)
    if (root / "datalist.json").exists():
        return root
    for name in ("Videos", "Masks"):
        (root / name).mkdir(exist_ok=True)
    jobs = [(str(root), settings, plan) for plan in plan_dataset(seed, num_clips)]
    workers = min((os.cpu_count() or 1) if workers is None else workers, num_clips)
    results = _map(jobs, workers)
    clips = list(tqdm(results, total=num_clips, desc="phantom", disable=not progress))
    _write_tables(root, clips, settings)
    write_text(root / "datalist.json", json.dumps(_datalist(clips, settings), indent=1))
    return root


def ensure_demo_data(dataset_dir: str | Path, demo_dir: str | Path, **phantom: Any) -> None:
    """Makes the phantom data set if ``dataset_dir`` is the demo folder and it is not there."""
    if Path(dataset_dir).resolve() != Path(demo_dir).resolve():
        return
    if not rank() and not (Path(demo_dir) / "datalist.json").exists():
        print("Making the demo data: a beating-heart phantom (once)", flush=True)
        write_phantom_dataset(demo_dir, **phantom)
    barrier()
