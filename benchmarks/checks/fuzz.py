"""Damages files of every kind we read, and checks that each gets a verdict.

    python benchmarks/checks/fuzz.py                          20,000 files, the release run
    python benchmarks/checks/fuzz.py --files 300 --seed 1     as in CI

A verdict is a cine of the right kind or one clear CineError (for tables: a datalist or one clear
error). A crash, another exception, over 10 s or over 1 GB more memory is a failure.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import av
import itk  # noqa: F401
import nibabel
import numpy as np
import pydicom
from tqdm import tqdm

from discovr_monai.base.engine import run_isolated
from discovr_monai.base.types import CineError
from discovr_monai.data.lists.catalogue import build_datalist
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.masks import read_masks
from discovr_monai.data.read.sector import prepare_cine
from discovr_monai.data.write.dicom import write_dicom
from discovr_monai.phantom.cine import encode_avi, simulate_cine
from discovr_monai.phantom.layouts import write_layout

SECONDS, GIGABYTE = 10.0, 1e9


def seeds(folder: Path) -> list[Path]:
    """One small valid file of each kind; a table stands for its data set."""
    folder.mkdir()
    frames = simulate_cine(1, num_frames=16, size=64).frames
    encode_avi(frames, 50, folder / "a.avi")
    for name, codec in (("b.mp4", "libx264"), ("c.mkv", "libx264")):
        with av.open(str(folder / name), "w") as out:
            stream = out.add_stream(codec, rate=30)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
            out.mux(stream.encode())
    write_dicom(folder / "d.dcm", frames, fps=50, spacing=(0.3, 0.3))
    real = pydicom.dcmread(pydicom.examples.get_path("ybr_color"))  # JPEG inside
    real.save_as(folder / "e.dcm")
    volume = nibabel.Nifti1Image(frames.T.copy(), np.diag([0.3, 0.3, 1, 1]))
    nibabel.save(volume, folder / "f.nii")
    nibabel.save(volume, folder / "g.nii.gz")
    (folder / "h.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nElementSpacing = 0.3 0.3 1\n"
        "DimSize = 64 64 16\nElementType = MET_UCHAR\nElementDataFile = h.raw\n"
    )
    (folder / "h.raw").write_bytes(frames.tobytes())
    np.save(folder / "i.npy", frames)
    for name, table in (
        ("echonet-dynamic", "FileList.csv"),
        ("echonet-dynamic", "VolumeTracings.csv"),
        ("camus", "database_nifti/patient0001/Info_4CH.cfg"),
        ("hmc-qu", "HMC_QU.xlsx"),
    ):
        tree = folder / "sets" / name
        if not tree.exists():
            write_layout(name, tree, patients=4)
        (folder / f"{name}={table.replace('/', '+')}").write_bytes((tree / table).read_bytes())
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix != ".raw")


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """A few of the ways in which files break."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        kind = int(rng.integers(8))
        # headers matter more than pixels
        reach = len(data) if rng.random() < 0.5 else min(len(data), 600)
        at = int(rng.integers(max(reach, 1)))
        if kind == 0 and data:  # bits
            data[at % len(data)] ^= 1 << int(rng.integers(8))
        elif kind == 1:  # a run of bytes
            data[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 2:  # cut short
            del data[int(rng.integers(len(data) + 1)) :]
        elif kind == 3:  # a piece is missing
            del data[at : at + int(rng.integers(1, 400))]
        elif kind == 4:  # a piece comes twice
            data[at:at] = data[at : at + int(rng.integers(1, 400))]
        elif kind == 5:  # extreme numbers
            value = int(rng.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
            size = 2 if value < 0x10000 and rng.random() < 0.5 else 4
            order = "little" if rng.random() < 0.5 else "big"
            data[at : at + size] = value.to_bytes(size, order)
        elif kind == 6:  # numbers in text
            numbers = list(re.finditer(rb"\d+", bytes(data[:4000])))
            if numbers:
                match = numbers[int(rng.integers(len(numbers)))]
                other = (b"0", b"-1", b"99999999", b"1e999", b"nan", b"", b"../..", b"=1+1")
                data[match.start() : match.end()] = other[int(rng.integers(len(other)))]
        else:  # zeros
            data[at : at + 200] = b"\0" * min(200, len(data) - at)
    return bytes(data)


def _peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def trial(job: tuple[str, int], folder: Path, work: Path, seed: int) -> dict[str, Any]:
    """Mutates and reads one file; never raises."""
    name, number = job
    rng = np.random.default_rng([seed, number])
    content = mutate((folder / name).read_bytes(), rng)
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
    before, start = _peak(), time.monotonic()
    try:
        verdict = (_table if "=" in name else _cine)(name, content, folder, work, number)
    except Exception as error:  # what the test is about
        verdict = f"FAILURE {type(error).__name__}: {str(error)[:200]}"
    seconds, grown = time.monotonic() - start, _peak() - before
    if seconds > SECONDS:
        verdict = f"FAILURE took {seconds:.0f} s"
    elif grown > GIGABYTE:
        verdict = f"FAILURE took {grown / 1e9:.1f} GB"
    return {"verdict": verdict, "seconds": seconds, "bytes": grown}


def _cine(name: str, content: bytes, folder: Path, work: Path, number: int) -> str:
    path = work / f"{number}-{name}"
    path.write_bytes(content)
    raw = path.with_name("h.raw")
    if name.endswith(".mhd") and not raw.exists():
        raw.write_bytes((folder / "h.raw").read_bytes())
    try:
        cine = read_cine(path, name=path.name)
        done = prepare_cine(cine, 32, "auto", color=False, name=path.name)
    except CineError as error:
        text = str(error)
        clear = text.startswith(path.name) and str(work) not in text and "\n" not in text
        return "set aside" if clear else f"FAILURE unclear error {text!r}"
    finally:
        path.unlink()
    good = done.frames.shape == (len(cine.frames), 32, 32) and done.frames.dtype == np.uint8
    fine = cine.fps is None or 1 <= cine.fps < 1000
    return "read" if good and fine else f"FAILURE shape {done.frames.shape}, fps {cine.fps}"


def _table(name: str, content: bytes, folder: Path, work: Path, number: int) -> str:
    kind, table = name.split("=")
    # a set of our own that shares the files
    root = work / f"{number}-{kind}"
    tree, table = folder / "sets" / kind, table.replace("+", "/")
    for path in tree.rglob("*"):
        if path.is_file() and path != tree / table:
            place = root / path.relative_to(tree)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.hardlink_to(path)
    (root / table).write_bytes(content)
    try:
        datalist = build_datalist(kind, root)
        for rows in datalist.sections.values():
            for row in rows:
                if not 0 <= row.get("ef", 50.0) <= 100:
                    return f"FAILURE EF {row['ef']}"
                if "mask" in row:
                    shape = read_cine(root / row["image"], color="grey").frames.shape
                    try:
                        read_masks(root, row["mask"], shape)
                    except CineError:
                        continue
        return "read"
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return f"FAILURE names a path: {text!r}" if str(work) in text else "refused"
    finally:
        shutil.rmtree(root)


def main() -> int:
    """Runs, prints a table, returns 1 on any failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", type=Path, help="a Markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, work = Path(place) / "seeds", Path(place) / "work"
        work.mkdir()
        names = [p.name for p in seeds(folder)]
        # tables build whole data sets, so there are fewer of them
        weights = [1 if "=" in n else 5 for n in names]
        cycle = [n for n, w in zip(names, weights, strict=True) for _ in range(w)]
        jobs = ((cycle[i % len(cycle)], i) for i in range(options.files))
        run = partial(trial, folder=folder, work=work, seed=options.seed)
        counts: dict[str, Counter] = {n: Counter() for n in names}
        worst = {n: [0.0, 0.0] for n in names}
        failures = []
        results = run_isolated(run, jobs, workers=options.workers, timeout=3 * SECONDS)
        for job, result, failure in tqdm(results, total=options.files, unit="file"):
            name, number = job
            verdict = f"FAILURE {failure[1]}" if failure else result["verdict"]
            if verdict.startswith("FAILURE"):
                failures.append(f"{name}, number {number}: {verdict}")
                verdict = "FAILURE"
            counts[name][verdict] += 1
            if result:
                worst[name] = [
                    max(worst[name][0], result["seconds"]), max(worst[name][1], result["bytes"])
                ]  # fmt: skip
    heads = ("kind", "files", "still read", "set aside", "failures", "longest", "most memory")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name, count in counts.items():
        aside = count["set aside"] + count["refused"]
        seconds, grown = worst[name]
        kind = name.split("=")[-1].split("+")[-1] if "=" in name else Path(name).name[2:]
        lines.append(
            f"| {kind} | {count.total()} | {count['read']} | {aside} | {count['FAILURE']} | "
            f"{seconds:.1f} s | {grown / 1e6:.0f} MB |"
        )
    print("\n".join([*lines, *failures[:40]]))
    print(f"{options.files} files, seed {options.seed}: {len(failures)} failures")
    if options.report:
        options.report.write_text("\n".join(lines) + "\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
