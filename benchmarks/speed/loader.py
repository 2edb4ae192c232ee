"""Does loading keep up with training? See also video_backend.py, for decoding.

    python benchmarks/speed/loader.py                 all parts, about 5 minutes
    python benchmarks/speed/loader.py store memory    some of them

store   a 64-frame clip from a prepared cine and from a shard, against decoding the AVI
wait    loading a paper-size batch with the default settings, against the cheapest part of the step
gpu     clips a second of one loading process, and the processes and disk that 500 clips/s need
memory  resident memory over an epoch of 100,000 clips
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Compose

from discovr_monai import LoadCined, SampleClipd, VisionTransformer
from discovr_monai.data.archive.shards import pack
from discovr_monai.data.clips.dataset import ClipDataset, EpochSampler
from discovr_monai.data.clips.transforms import RandScaleCropd
from discovr_monai.data.read.store import CineStore
from discovr_monai.phantom.cine import encode_avi, simulate_cine

CINES, FRAMES, CLIP, STRIDE = 24, 192, 64, 3


def archive(root: Path) -> list[dict]:
    """AVI of 192 frames, the same cines prepared, and shards of them."""
    rows = []
    base = simulate_cine(0, num_frames=96)
    for i in range(CINES):
        frames = np.roll(np.concatenate([base.frames, base.frames]), i, axis=0)
        (root / "videos").mkdir(exist_ok=True)
        (root / "prepared").mkdir(exist_ok=True)
        encode_avi(frames, 50, root / "videos" / f"{i}.avi")
        np.save(root / "prepared" / f"{i}.npy", frames)
        rows.append({"image": f"{i}.npy", "patient": str(i), "num_frames": FRAMES, "fps": 50.0})
    (root / "prepared" / "datalist.json").write_text(json.dumps({"training": rows}))
    pack(root / "prepared", root / "shards", gb=0.02, progress=False)
    return rows


def transform(folder: Path, crop: bool = False, store: CineStore | None = None) -> Compose:
    """Row to clip, as in train.yaml."""
    steps = [
        LoadCined(root=folder, size=112, store=store),
        SampleClipd(num_frames=CLIP, stride=STRIDE, random=True),
    ]
    return Compose(steps + [RandScaleCropd()] * crop)


def alternated(ways: dict[str, Callable[[int], object]], rounds: int = 60) -> dict[str, np.ndarray]:
    """Seconds of each call; the ways take turns."""
    timings: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(i)
            timings[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in timings.items()}


def show(seconds: np.ndarray) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = np.percentile(1000 * seconds, [25, 50, 75])
    return f"{middle:8.2f} ms [{low:.2f}, {high:.2f}]"


def store(root: Path, rows: list[dict]) -> None:
    """Prints how much faster than from AVI a clip comes from prepared cines, shards, a cache."""
    shards = json.loads((root / "shards" / "datalist.json").read_text())["training"]
    decode = transform(root / "videos")
    ready, packed = transform(root / "prepared"), transform(root / "shards")
    cached = transform(root / "videos", store=CineStore(root / "cache"))
    names = [{"image": f"{i}.avi"} for i in range(CINES)]
    for row in names:
        cached(dict(row))
    timings = alternated(
        {
            "decoded AVI": lambda i: decode(dict(names[i % CINES])),
            "cached by training": lambda i: cached(dict(names[i % CINES])),
            "prepared cine": lambda i: ready(dict(rows[i % CINES])),
            "shard": lambda i: packed(dict(shards[i % CINES])),
        }
    )
    print(f"a clip of {CLIP} frames (stride {STRIDE}) of a cine of {FRAMES}, 112 x 112:")
    for name, seconds in timings.items():
        ratio = float(np.median(timings["decoded AVI"] / seconds))
        print(f"  {name:20s}{show(seconds)}  {ratio:6.1f} x as fast as decoding")


def wait(root: Path, rows: list[dict]) -> None:
    """Loading in the training process (workers: 0) against the video teacher's forward alone."""
    torch.manual_seed(0)
    size = {"image_size": 112, "num_frames": 64, "patch_size": 8, "tubelet_size": 2}
    teacher = VisionTransformer(**size, embed_dim=384, depth=12, num_heads=6).eval()
    clips = ClipDataset(rows, transform(root / "prepared", crop=True))
    batch = torch.randn(2, 3, 64, 112, 112)

    def forward(_: int) -> None:
        with torch.inference_mode():
            teacher(batch)

    timings = alternated(
        {"load": lambda i: [clips[(0, (2 * i + k) % CINES)] for k in range(2)], "teacher": forward},
        rounds=3,
    )
    share = float(np.median(timings["load"] / timings["teacher"]))
    print("a batch of 2 clips at paper size, loaded by the training process itself:")
    print(f"  loading          {show(timings['load'])}")
    print(f"  teacher's forward{show(timings['teacher'])}  (ViT-S, fp32; the step does far more)")
    print(f"  loading is {100 * share:.2f} % of this one part of the step")


def gpu(root: Path, rows: list[dict]) -> None:
    """Prints how many processes and how much disk 500 clips/s need."""
    shards = json.loads((root / "shards" / "datalist.json").read_text())["training"]
    plain = transform(root / "shards")
    cropped = transform(root / "shards", crop=True)
    timings = alternated(
        {
            "clip": lambda i: plain(dict(shards[i % CINES])),
            "clip and crop": lambda i: cropped(dict(shards[i % CINES])),
        },
        rounds=120,
    )
    print("one loading process, from shards:")
    for name, seconds in timings.items():
        rate = 1 / float(np.median(seconds))
        print(
            f"  {name:14s}{show(seconds)}  {rate:6.0f} clips/s, 500 need {500 / rate:.1f} processes"
        )
    clip = CLIP * 112 * 112
    handed, read = 500 * clip / 1e6, 500 * STRIDE * clip / 1e6
    print(
        f"  500 clips/s hand over {handed:.0f} MB/s; with stride {STRIDE} and read-ahead the disk"
    )
    print(f"  may read {read:.0f} MB/s, in order within the open shards")


def memory(root: Path, rows: list[dict], clips: int = 100_000) -> None:
    """Prints how private memory grows over an epoch of 100,000 clips."""
    shards = json.loads((root / "shards" / "datalist.json").read_text())["training"]
    many = [shards[i % CINES] for i in range(clips)]
    steps = [
        LoadCined(root=root / "shards", size=112),
        SampleClipd(num_frames=16, stride=STRIDE, random=True),
    ]
    data = ClipDataset(many, Compose(steps))
    order = EpochSampler(clips, 8, shards=[r["image"] for r in many], window=2)
    marks = []
    for position, item in enumerate(order):
        data[item]
        if position % (clips // 10) == clips // 20:
            fields = Path("/proc/self/statm").read_text().split()
            anonymous = (int(fields[1]) - int(fields[2])) * 4096  # without mapped files
            marks.append(anonymous / 1e6)
    print(f"private memory during {clips} clips, MB: {', '.join(f'{m:.0f}' for m in marks)}")
    print(f"  growth from a tenth on: {marks[-1] - marks[1]:+.1f} MB")


def main() -> None:
    """Runs the parts."""
    parts = {"store": store, "wait": wait, "gpu": gpu, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(parts), help=", ".join(parts))
    chosen = parser.parse_args().parts
    with tempfile.TemporaryDirectory() as folder:
        rows = archive(Path(folder))
        for name in chosen:
            parts[name](Path(folder), rows)


if __name__ == "__main__":
    main()
