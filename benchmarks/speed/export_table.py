"""Exported networks against the one they came from: size, time of a clip, accuracy.

    python benchmarks/speed/export_table.py MODEL.pt --dataset_dir DATA --docs
    python benchmarks/speed/export_table.py --random S        random weights: size and time
    python benchmarks/speed/export_table.py --random B --quick   tiny sizes, to try it out

The ways to run the embedding take turns in one process; times are medians over the rounds.
Accuracy is of the datalist's section: EF averaged over the windows that inference takes, Dice of
the LV cavity on labelled frames, each on all cines with that label, whether or not the head would
speak of them. --docs puts the tables into docs/export.md. Measure on a quiet machine.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from step_setup import CONFIGS, QUICK, SIZES
from torch import Tensor
from tqdm import tqdm

from discovr_monai.data.clips.normalise import IMAGENET_MEAN, IMAGENET_STD, PrepareClip
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.read.masks import read_masks, window_masks
from discovr_monai.evaluation.heads.contours import dice
from discovr_monai.evaluation.heads.segmenter import clip_stride, cover, label_frames
from discovr_monai.inference.export import ExportError, Part, check_clips, export_model
from discovr_monai.inference.formats import FORMATS, open_exported
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.inference.plan import find_cines
from discovr_monai.inference.reading import CineReader, Seen

sys.path.append(str(Path(__file__).parents[1]))
from shared import busy_warning, machine, write_between_markers

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
WAYS = {  # row -> format of its file; None: torch itself
    "torch, fp32": None,
    "torch, bf16 (autocast)": None,
    "TorchScript": "torchscript",
    "torch.export": "program",
    "ONNX Runtime, fp32": "onnx",
    "ONNX Runtime, int8": "int8",
}
Run = Callable[[Tensor], tuple[Tensor, ...]]


def main() -> None:
    """Measures what the command line asks for."""
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = Path(options.model) if options.model else random_model(options, folder)
        export_model(file, folder, tuple(FORMATS), ("embedding",))
        model = load_model(file)
        lines = [*about(model, options), "", *speed(model, folder, options)]
        if options.dataset_dir:
            lines += ["", *accuracy(model, file, folder, options)]
    text = "\n".join(lines)
    print(text)
    if options.docs:
        write_between_markers(DOCS, text, "speed/export_table.py")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="models/model.pt, or any checkpoint of ours")
    parser.add_argument("--random", choices=list(SIZES), help="random weights of this size instead")
    parser.add_argument("--quick", action="store_true", help="tiny, with --random")
    parser.add_argument("--dataset_dir", help="labelled cines with a datalist.json")
    parser.add_argument("--section", default="test", help="of the datalist (test)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="clips (1 16)")
    parser.add_argument("--rounds", type=int, default=7, help="after one to warm up (7)")
    parser.add_argument("--docs", action="store_true", help="tables into docs/export.md")
    options = parser.parse_args()
    if (options.model is None) == (options.random is None):
        parser.error("give a model, or --random S or B")
    if options.random and options.dataset_dir:
        parser.error("random weights have no accuracy: leave --dataset_dir out")
    if options.quick and not options.random:
        parser.error("--quick goes with --random")
    if min(options.batches) < 1 or options.rounds < 1:
        parser.error("--batches and --rounds must be at least 1")
    return options


def random_model(options: argparse.Namespace, folder: Path) -> Path:
    """A file of an untrained encoder of the size of a config."""
    parser = ConfigParser()
    parser.read_config(
        [str(CONFIGS / "train.yaml"), str(CONFIGS / f"{SIZES[options.random]}.yaml")]
    )
    for key, value in (QUICK if options.quick else {}).items():
        parser[key] = value
    torch.manual_seed(0)
    clip = {"stride": parser["stride"], "duration": None, "pad_mode": "loop", "default_fps": None}
    clip |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    settings = parser.get_parsed_content("video_def").settings
    model = EchoModel({"video": settings, "image": None, "clip": clip})
    torch.save(model.state_dict(), folder / "random.pt")
    return folder / "random.pt"


def about(model: EchoModel, options: argparse.Namespace) -> list[str]:
    """What was measured, and where."""
    where, settings = machine(torch.device("cpu")), model.about["video"]
    _, frames, side, _ = model.clip_shape
    name = "random weights" if options.random else f"model {model.sha256[:8]}"
    lines = [
        f"{where['cpu']}{' with AMX' if where['amx'] else ''}, {where['threads']} threads, PyTorch "
        f"{where['torch']}. Width {settings['embed_dim']}, {settings['depth']} blocks, {name}; "
        f"clips of {frames} frames of {side} x {side}; median of {options.rounds} rounds [lowest, "
        "highest]."
    ]
    if options.quick:
        lines += ["", "**--quick: tiny sizes. These figures mean nothing.**"]
    lines += busy_warning(where["busy_cores"])
    return lines


# ---- size and time -----------------------------------------------------------------------


def ways(model: EchoModel, folder: Path) -> dict[str, Run]:
    """Row -> how it computes embeddings."""
    part = Part(model, "embedding")

    @torch.no_grad()
    def fp32(clip: Tensor) -> tuple[Tensor, ...]:
        return (part(clip),)

    def bf16(clip: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return fp32(clip)

    runs: dict[str, Run] = dict(zip(WAYS, (fp32, bf16), strict=False))
    for row, name in WAYS.items():
        if name is not None:
            runs[row] = open_exported(folder / f"embedding{FORMATS[name]}", name)
    return runs


def speed(model: EchoModel, folder: Path, options: argparse.Namespace) -> list[str]:
    """The table of sizes and times."""
    runs, three = ways(model, folder), check_clips(model)
    right = runs["torch, fp32"](three)[0]
    seconds: dict[tuple[str, int], list[float]] = {}
    for number in range(options.rounds + 1):
        for batch in options.batches:
            clips = three.repeat(-(-batch // 3), 1, 1, 1, 1)[:batch]
            for row in list(runs)[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                runs[row](clips)
                if number:
                    spent = (time.perf_counter() - start) / batch
                    seconds.setdefault((row, batch), []).append(spent)
    heads = "".join(f" ms a clip, batch {batch} |" for batch in options.batches)
    lines = [f"| embedding by | MB |{heads} cosine with torch, fp32 |"]
    lines.append("| --- | --- |" + " --- |" * len(options.batches) + " --- |")
    for row, run in runs.items():
        cells = [_spread(seconds[row, batch]) for batch in options.batches]
        cosine = torch.cosine_similarity(run(three)[0].float(), right).min()
        size = f"{_bytes(model, folder, row) / 1e6:.1f}"
        lines.append(f"| {' | '.join([row, size, *cells, f'{float(cosine):.5f}'])} |")
    return lines


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def _bytes(model: EchoModel, folder: Path, row: str) -> int:
    name = WAYS[row]
    if name is not None:
        return (folder / f"embedding{FORMATS[name]}").stat().st_size
    content = io.BytesIO()
    torch.save(Part(model, "embedding").state_dict(), content)
    return content.tell()


# ---- accuracy ----------------------------------------------------------------------------


class Labeller:
    """An exported segmentation where :func:`label_frames` wants a network."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def every_frame(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> logits (B, T, classes, h, w)."""
        return self.run(clip)[0]


def accuracy(model: EchoModel, file: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """The table of accuracies, ONNX in fp32 and int8."""
    root, rows = find_cines(options.dataset_dir, None, options.section)
    loader = LoadCined(root=root, size=model.clip_shape[2])
    reader = CineReader(loader, model.clip_shape[1], model.about["clip"], 3, 0.5)
    exported_runs: dict[str, dict[str, Any]] = {"onnx": {}, "int8": {}}
    for kind in model.heads:
        try:
            export_model(file, folder, tuple(exported_runs), (kind,))
        except ExportError as error:
            print(error)
    for name, runs in exported_runs.items():
        for kind in ("embedding", *model.heads):
            if (exported := folder / f"{kind}{FORMATS[name]}").is_file():
                runs[kind] = open_exported(exported, name)
    scores: dict[str, dict[str, list[float]]] = {n: {"ef": [], "dice": []} for n in exported_runs}
    cosines = []
    for number, row in enumerate(tqdm(rows, desc=options.section, unit="cine")):
        seen = reader({**row, "id": str(number)}).get("seen")
        if seen is None:
            continue
        embeddings = [_mean(runs["embedding"], model, seen) for runs in exported_runs.values()]
        cosines.append(float(torch.cosine_similarity(*embeddings, 0)))
        for name, runs in exported_runs.items():
            if "ef" in runs and row.get("ef") is not None:
                ef = float(_mean(runs["ef"], model, seen).clamp(0, 100))
                scores[name]["ef"].append(abs(ef - row["ef"]))
            if "segmentation" in runs and row.get("mask"):
                scores[name]["dice"].append(_dice(runs["segmentation"], model, seen, root))
    lines = ["| ONNX | LVEF: mean absolute error, % | Dice of the LV | cosine with fp32 [lowest] |"]
    lines.append("| --- | --- | --- | --- |")
    for name, score in scores.items():
        ef, overlap = (_mean_of(score[key], digits) for key, digits in (("ef", 2), ("dice", 4)))
        near = f"{np.mean(cosines):.5f} [{min(cosines):.5f}]" if name == "int8" else "1"
        lines.append(f"| {'fp32' if name == 'onnx' else name} | {ef} | {overlap} | {near} |")
    return [*lines, "", f"{len(cosines)} cines of the section {options.section!r}."]


def _mean_of(values: Sequence[float], digits: int) -> str:
    known = [v for v in values if np.isfinite(v)]
    return f"{np.mean(known):.{digits}f} ({len(known)} cines)" if known else "none"


def _prepare(model: EchoModel) -> PrepareClip:
    return PrepareClip(model.about["clip"]["mean"], model.about["clip"]["std"])


def _mean(run: Run, model: EchoModel, seen: Seen) -> Tensor:
    """First output, averaged over a cine's windows, one at a time."""
    clips = _prepare(model)({"image": torch.from_numpy(seen.clips)})
    return torch.stack([run(clip[None])[0][0] for clip in clips]).mean(0)


def _dice(run: Run, model: EchoModel, seen: Seen, root: Path) -> float:
    """Of the LV cavity, over a cine's labelled frames."""
    frames, row = seen.cine.shape[1], seen.row
    stride = clip_stride(model.about["clip"], model.clip_shape[1], seen.fps, row["image"])
    whole = np.arange(model.clip_shape[1])
    clips = [(c, whole) for c in cover(frames, model.clip_shape[1], max(1, round(stride)))]
    truth = read_masks(root, row["mask"], (frames, *seen.window[:2]))
    truth = window_masks(truth, seen.window)
    labels = label_frames(Labeller(run), seen.cine, clips, truth.shape[-1], _prepare(model), 1)  # type: ignore[arg-type]
    known = [row.get(key) for key in ("ed_frame", "es_frame") if row.get(key) is not None]
    known = known or np.flatnonzero(truth.any((1, 2))).tolist()
    dices = [dice(truth[frame] == 1, labels[frame] == 1) for frame in known]
    return float(np.mean(dices)) if dices else float("nan")


if __name__ == "__main__":
    main()
