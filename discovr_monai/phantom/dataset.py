"""A beating-heart phantom: clips with known truth, and a data set in EchoNet-Dynamic's layout.

:func:`simulate_cine` makes one clip, :func:`write_phantom_dataset` a whole folder. Everything
follows from a seed: the heart from (seed, patient), the probe and the timing from (seed, patient,
clip), so the result does not depend on how many processes work on it.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from discovr_monai.base.distributed import barrier, rank
from discovr_monai.base.files import save_atomic, write_text
from discovr_monai.phantom.heart import DISCS, POPULATIONS, Heart, draw_beat, draw_heart
from discovr_monai.phantom.ultrasound import Scanner, draw_probe

VERSION = 1
SPLITS = ("TRAIN", "VAL", "TEST")
FILE_LIST = "FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split"
TRACINGS = "FileName,X1,Y1,X2,Y2,Frame"
TRUTH = "FileName,patient,population,kind,label,heart_rate,ed_frame,es_frame"


@dataclass(frozen=True)
class PhantomCine:
    """One simulated clip and its truth.

    Attributes:
        frames: (T, H, W) uint8, 0 outside the sector.
        fps: frames per second.
        masks: (T, H, W) uint8: 0 background, 1 LV cavity, 2 LV myocardium, 3 left atrium.
        ef: percent; edv, esv: mL, of the drawn cavity by 20 single-plane discs.
        ed_frame, es_frame: end diastole and the end systole that follows it.
        heart_rate: beats per minute.
        population, kind: see phantom_heart; label: 0 normal, 1 abnormal.
        ed_chords, es_chords: (21, 4) x1, y1, x2, y2 in pixels: the long axis from apex to base,
            then 20 chords from apex to mitral plane.
        sector: (H, W) bool.
        volumes: (T,) mL, the drawn LV volume of each frame.
    """

    frames: np.ndarray
    fps: float
    masks: np.ndarray
    ef: float
    edv: float
    esv: float
    ed_frame: int
    es_frame: int
    heart_rate: float
    population: str
    kind: str
    label: int
    ed_chords: np.ndarray
    es_chords: np.ndarray
    sector: np.ndarray
    volumes: np.ndarray


def build_scanner(
    seed: int,
    *,
    num_frames: int = 96,
    size: int = 112,
    population: str | None = None,
    kind: str | None = None,
    patient: int = 0,
    clip: int = 0,
    gain: float = 0.0,
    depth: float = 1.0,
) -> Scanner:
    """Heart, timing and probe of one clip, ready to be drawn.

    Args:
        seed: of the data set.
        num_frames, size: of the clip: frames (at least 16), pixels per side (at least 32).
        population, kind: fix these instead of drawing them.
        patient, clip: clips of one patient share the heart.
        gain: dB added to what is drawn; depth: factor on what is drawn (another machine's habits).

    Returns:
        The scanner: ``cine()``, ``mask(frame)`` and ``material(frame)``.
    """
    if num_frames < 16 or size < 32:
        raise ValueError(
            f"num_frames={num_frames}, size={size}: a phantom needs at least 16 frames of 32 pixels"
        )
    if not 0.5 <= depth <= 2:
        raise ValueError(f"depth={depth}: the factor on the depth must lie in 0.5..2")
    heart = Heart(draw_heart(np.random.default_rng([seed, patient]), population, kind))
    rng = np.random.default_rng([seed, patient, clip + 1])
    beat = draw_beat(heart.parameters, num_frames, rng)
    probe = draw_probe(heart, rng)
    probe = replace(probe, gain=probe.gain + gain, depth=probe.depth * depth)
    return Scanner(heart, probe, beat, size)


def chords(scanner: Scanner, frame: int) -> np.ndarray:
    """(21, 4) float64 x1, y1, x2, y2 in pixels: long axis, then 20 chords from apex to base."""
    share = np.concatenate([[0.0, 1.0], (np.arange(DISCS) + 0.5) / DISCS])
    y, left, right = scanner.heart.contour(scanner.activation[frame], share).T
    left, right = left.copy(), right.copy()
    left[:2] = right[:2] = 0
    x1, y1 = scanner.to_pixels(left, y, frame)
    x2, y2 = scanner.to_pixels(right, y, frame)
    rows = np.stack([x1, y1, x2, y2], axis=1)
    axis = np.concatenate([rows[0, :2], rows[1, :2]])
    return np.concatenate([axis[None], rows[2:]])


def simpson(tracing: np.ndarray, pixel: float = 1.0) -> float:
    """Single-plane volume of a (21, 4) tracing; mL where ``pixel`` is its size in mm."""
    ends = tracing * pixel
    lengths = np.hypot(ends[:, 2] - ends[:, 0], ends[:, 3] - ends[:, 1])
    return float(np.pi / 4 * (lengths[1:] ** 2).sum() * lengths[0] / (len(ends) - 1) / 1000)


def _simulate(scanner: Scanner) -> PhantomCine:
    """Draw a clip and gather its truth."""
    beat, heart, parameters = scanner.beat, scanner.heart, scanner.heart.parameters
    volumes = heart.volumes(scanner.activation) * scanner.probe.foreshorten
    edv, esv = float(volumes[beat.ed_frame]), float(volumes[beat.es_frame])
    return PhantomCine(
        frames=scanner.cine(),
        fps=beat.fps,
        masks=np.stack([scanner.mask(t) for t in range(len(volumes))]),
        ef=100 * (1 - esv / edv),
        edv=edv,
        esv=esv,
        ed_frame=beat.ed_frame,
        es_frame=beat.es_frame,
        heart_rate=parameters.heart_rate,
        population=parameters.population,
        kind=parameters.kind,
        label=parameters.label,
        ed_chords=chords(scanner, beat.ed_frame),
        es_chords=chords(scanner, beat.es_frame),
        sector=scanner.sector,
        volumes=volumes,
    )


def simulate_cine(
    seed: int,
    *,
    num_frames: int = 96,
    size: int = 112,
    population: str | None = None,
    kind: str | None = None,
) -> PhantomCine:
    """Simulate one clip; see :func:`build_scanner` for the arguments."""
    return _simulate(
        build_scanner(seed, num_frames=num_frames, size=size, population=population, kind=kind)
    )


@dataclass(frozen=True)
class _Plan:
    """One clip of a data set: which heart, which files."""

    name: str
    patient: int
    clip: int
    split: str


def plan_dataset(seed: int, num_clips: int) -> list[_Plan]:
    """Share clips among patients (1 to 3 each) and patients among splits (75/12.5/12.5 %)."""
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


def encode_avi(frames: np.ndarray, fps: float, path: Path) -> None:
    """Write grey frames as MJPEG in AVI with neutral chroma."""
    import av

    with av.open(str(path), "w", format="avi") as container:
        stream: Any = container.add_stream("mjpeg", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuvj420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        stream.codec_context.thread_count = 1
        chroma = np.full((frames.shape[1] // 2, frames.shape[2]), 128, np.uint8)
        for grey in frames:
            picture = av.VideoFrame.from_ndarray(np.concatenate([grey, chroma]), "yuvj420p")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _make_clip(job: tuple[str, dict[str, Any], _Plan]) -> dict[str, Any]:
    """Worker: write one clip's movie and masks unless they are there; return its truth."""
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
    beat, p = scanner.beat, scanner.heart.parameters
    volumes = scanner.heart.volumes(scanner.activation) * scanner.probe.foreshorten
    edv, esv = float(volumes[beat.ed_frame]), float(volumes[beat.es_frame])
    return {
        **asdict(plan),
        "ef": 100 * (1 - esv / edv),
        "edv": edv,
        "esv": esv,
        "fps": beat.fps,
        "ed_frame": beat.ed_frame,
        "es_frame": beat.es_frame,
        "heart_rate": p.heart_rate,
        "population": p.population,
        "kind": p.kind,
        "label": p.label,
        "spacing": scanner.pixel,
        "chords": (chords(scanner, beat.es_frame), chords(scanner, beat.ed_frame)),
    }


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


def _table(header: str, rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header.split(","))
    writer.writerows(rows)
    return text.getvalue()


def _write_tables(root: Path, clips: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the three CSV files."""
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
        (f"{c['name']}.avi", *(round(float(v), 4) for v in row), c[frame])
        for c in clips
        for frame, tracing in zip(("es_frame", "ed_frame"), c["chords"], strict=True)
        for row in tracing
    ]
    truth = [
        (
            *(c["name"], f"P{c['patient']:04d}", c["population"], c["kind"], c["label"]),
            *(round(c["heart_rate"], 2), c["ed_frame"], c["es_frame"]),
        )
        for c in clips
    ]
    write_text(root / "FileList.csv", _table(FILE_LIST, listing))
    write_text(root / "VolumeTracings.csv", _table(TRACINGS, tracings))
    write_text(root / "Phantom.csv", _table(TRUTH, truth))


def _datalist(clips: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """The MONAI Decathlon style list, patients apart."""
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
    """Make sure that the folder is ours: new, empty, or a phantom of the same settings."""
    stamp = root / "phantom.json"
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root.name} is a file; name a folder for the phantom")
    if stamp.exists():
        found = json.loads(stamp.read_text())
        if found != settings:
            different = sorted(k for k in settings if found.get(k) != settings[k])
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
    """Write a phantom data set in EchoNet-Dynamic's layout, with masks and a datalist.

    A folder that holds ``datalist.json`` is complete and a second call returns at once; an
    interrupted one is finished by calling again. Call it under ``if __name__ == "__main__":`` in
    scripts, since the worker processes are spawned.

    Args:
        root: folder to write; new, empty, or a phantom of the same settings.
        num_clips: clips; num_frames: frames of each; size: pixels per side (even).
        seed: everything follows from it.
        workers: processes; None for one per core, 0 or 1 for none beside this one.
        normal_only_pretraining: whether the list "pretraining" leaves abnormal hearts out.
        population: "adult", "paediatric" or "fetal" only; None for a mixture.
        gain, depth: as in :func:`build_scanner`, for a data set that differs from another.
        progress: whether to show a progress bar.

    Returns:
        The folder.
    """
    root = Path(root)
    if num_clips < 1 or num_frames < 16 or size < 32 or size % 2:
        raise ValueError(
            f"num_clips={num_clips}, num_frames={num_frames}, size={size}: need at least 1 clip "
            "of 16 frames and an even size of at least 32"
        )
    if population not in (None, *POPULATIONS):
        raise ValueError(f"unknown population {population!r}; use one of {POPULATIONS}")
    settings = {
        "phantom": VERSION,
        "num_clips": num_clips,
        "num_frames": num_frames,
        "seed": seed,
        "size": size,
        "normal_only_pretraining": normal_only_pretraining,
        "population": population,
        "gain": gain,
        "depth": depth,
    }
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
        from discovr_monai.phantom.dataset import write_phantom_dataset

        print("Making the demo data: a beating-heart phantom (once)", flush=True)
        write_phantom_dataset(demo_dir, **phantom)
    barrier()
