"""Many prepared cines in few large files: sequential reads, shared out without overlap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from discovr_monai.base.files import save_atomic, write_text
from discovr_monai.base.types import CineError, DatalistRow


def pack(
    prepared: str | Path, out: str | Path, *, gb: float = 1.0, seed: int = 0, progress: bool = True
) -> int:
    """Packs the cines of a prepared datalist into shards, shuffled once.

    A shard is a .npy of (sum of T, H, W) uint8; a row of the new datalist says where its cine
    begins ("first") and how long it is ("num_frames"). Interrupted, it goes on with the first
    missing shard.

    Args:
        prepared: folder with datalist.json and .npy cines of one size.
        out: new folder, or one of the same call.
        gb: size of a shard in 10^9 bytes.
        seed: of the order.
        progress: whether to show a bar.

    Returns:
        How many shards there are.

    Raises:
        ValueError: no prepared datalist, a senseless size, another call's folder.
        CineError: a cine that is missing or of another size.
    """
    source, out = Path(prepared), Path(out)
    if gb <= 0:
        raise ValueError(f"gb {gb} must be above 0")
    try:
        content = json.loads((source / "datalist.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source.name!r} holds no datalist.json that can be read: run discovr-monai prepare"
        ) from error
    sections: dict[str, list[DatalistRow]] = {
        k: v for k, v in content.items() if isinstance(v, list)
    }
    first = next((r for rows in sections.values() for r in rows), None)
    if first is None:
        raise ValueError(f"{source.name!r} holds no cine")
    size = np.load(source / first["image"], mmap_mode="r", allow_pickle=False).shape[1:]
    frames = max(1, int(gb * 1e9 / np.prod(size)))
    plan = _plan(sections, frames, seed)
    _claim(out, {"gb": gb, "seed": seed, "rows": sum(map(len, sections.values()))})
    moved: dict[str, list[dict[str, Any]]] = {name: [] for name in sections}
    for section, name, rows in tqdm(plan, desc="packing", unit="shard", disable=not progress):
        _write_shard(out / name, [source / r["image"] for r in rows], rows, size)
        position = 0
        for row in rows:
            moved[section].append({**row, "image": name, "first": position})
            position += row["num_frames"]
    about = {k: v for k, v in content.items() if not isinstance(v, list)}
    write_text(out / "datalist.json", json.dumps({**about, **moved}))
    return len(plan)


def _plan(
    sections: dict[str, list[DatalistRow]], frames: int, seed: int
) -> list[tuple[str, str, list[DatalistRow]]]:
    """(section, shard's name, rows) for every shard."""
    plan = []
    for number, (section, rows) in enumerate(sections.items()):
        order = np.random.default_rng([seed, number]).permutation(len(rows))
        part: list[DatalistRow] = []
        parts: list[list[DatalistRow]] = []
        for row in (rows[i] for i in order):
            if part and sum(r["num_frames"] for r in part) + row["num_frames"] > frames:
                parts.append(part)
                part = []
            part.append(row)
        parts += [part] if part else []
        plan += [(section, f"{section}-{i:06d}.npy", p) for i, p in enumerate(parts)]
    return plan


def _claim(out: Path, settings: dict[str, Any]) -> None:
    stamp = out / "shards.json"
    if stamp.is_file():
        if json.loads(stamp.read_text()) != settings:
            raise ValueError(f"{out.name!r} holds shards of other settings. Name a new folder")
        for left in out.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out.name!r} holds other files. Name a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(stamp, json.dumps(settings))


def _write_shard(
    path: Path, files: Sequence[Path], rows: Sequence[DatalistRow], size: tuple[int, ...]
) -> None:
    if path.exists():
        return
    total = sum(r["num_frames"] for r in rows)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as shard:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total, *size)}
            np.lib.format.write_array_header_1_0(shard, header)
            for source, row in zip(files, rows, strict=True):
                shard.write(_frames_of(source, row, size).tobytes())

    save_atomic(write, path)


def _frames_of(source: Path, row: DatalistRow, size: tuple[int, ...]) -> np.ndarray:
    try:
        cine = np.load(source, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CineError(row["image"], "it is missing or damaged", "Prepare it again") from error
    if cine.shape != (row["num_frames"], *size) or cine.dtype != np.uint8:
        raise CineError(
            row["image"], f"it is {cine.dtype} of {cine.shape}, not of {size}",
            "Prepare the archive again",
        )  # fmt: skip
    return np.asarray(cine)
