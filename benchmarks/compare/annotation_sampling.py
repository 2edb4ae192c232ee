"""Which cine to label next, on phantoms: the sampling part of annotation.py.

Each repeat simulates patients of its own and deals them to a pool, a validation section (the same
for all strategies; it only chooses the epoch) and held-out cines. A linear head on frozen tokens is
trained anew after every few labels. Labels are those of ED and ES.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discovr_monai.data.clips.normalise import PrepareClip
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists.datalist import Datalist
from discovr_monai.data.lists.scan import load_datalist
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder
from discovr_monai.evaluation.heads.segmenter import Segmenter
from discovr_monai.evaluation.report.results import Results
from discovr_monai.inference.model import load_model
from discovr_monai.inference.reading import CineReader
from discovr_monai.label.learn.acquisition import STRATEGIES, choose, mean_entropy
from discovr_monai.label.learn.finetuning import PartlyLabelled
from discovr_monai.phantom.dataset import write_phantom_dataset

POOL, VALIDATION, HELD = 60, 10, 30  # cines
STEPS = (2, 4, 6, 8, 12, 16, 24)  # labelled cines at which a head is trained
FIRST_SEED = 800
AS_RANDOM = 16  # the aim: what random choice reaches with so many labels
STRUCTURES = ("lv_cavity", "myocardium", "left_atrium")


class Repeat:
    """A pool, and what the frozen encoder sees of it.

    Args:
        number: of the repeat.
        model_file: with a segmentation head, whose encoder is used.
        folder: for the simulated cines; what is there is used again.
    """

    def __init__(self, number: int, model_file: Path, folder: Path) -> None:
        data = folder / f"pool{number}"
        total = POOL + VALIDATION + HELD
        options = {"size": 64, "num_frames": 64, "workers": 1, "progress": False}
        write_phantom_dataset(data, num_clips=total, seed=FIRST_SEED + number, **options)
        self.number, self.model = number, load_model(model_file)
        branch = self.model.heads["segmentation"]["branch"]
        self.encoder = EvaluatedEncoder(model_file, branch)
        self.loader = LoadCined(root=data, size=self.encoder.image_size)
        datalist = load_datalist(data, loader=self.loader, output_dir=folder / "report")
        rows = [r for n in ("training", "validation", "test") for r in datalist.rows(n)]
        order = np.random.default_rng(number).permutation(sorted({r["patient"] for r in rows}))
        place = {p: i for i, p in enumerate(order)}
        rows.sort(key=lambda r: (place[r["patient"]], r["image"]))  # patients stay together
        ends = [_end(rows, HELD), _end(rows, HELD + VALIDATION)]
        self.sections = {"held out": rows[: ends[0]], "validation": rows[ends[0] : ends[1]]}
        self.pool = rows[ends[1] :]
        reader = CineReader(self.loader, self.model.clip_shape[1], self.model.about["clip"], 1, 0.5)
        clip = self.model.about["clip"]
        prepare = PrepareClip(clip["mean"], clip["std"])
        self.clips = [
            prepare({"image": torch.from_numpy(reader(row)["seen"].clips)}) for row in self.pool
        ]
        looks = [self.model.look(clips)["embedding"].mean(0).numpy() for clips in self.clips]
        self.features = np.stack(looks)

    def trained(self, labelled: Sequence[int]) -> tuple[Segmenter, float]:
        """A head of these labels, and its Dice on the held-out cines."""
        rows = {"training": [self.pool[i] for i in labelled], **self.sections}
        with tempfile.TemporaryDirectory() as folder:
            training = PartlyLabelled(
                self.encoder,
                Datalist(rows),
                self.loader,
                Results("segmentation", folder),
                structures=STRUCTURES,
                test=["held out"],
                every_frame=False,
                batch_size=16,
                seed=self.number,
            )
            network = training.tuned()
            return network, training.scores(network)["dice_mean"]

    def curve(self, strategy: str) -> list[float]:
        """Dice at each of STEPS."""
        labelled: list[int] = []
        unsure, dices = np.zeros(len(self.pool)), []
        for step in STEPS:
            way = "random" if strategy == "uncertainty" and not labelled else strategy
            labelled += choose(
                way,
                self.features,
                labelled,
                step - len(labelled),
                uncertainty=unsure,
                seed=100 * self.number + step,
            )
            network, score = self.trained(labelled)
            dices.append(score)
            if strategy in ("uncertainty", "both"):
                unsure = np.array([mean_entropy(network, clips) for clips in self.clips])
        return dices


def _end(rows: Sequence[Any], count: int) -> int:
    """The first place from ``count`` on where another patient begins."""
    while rows[count]["patient"] == rows[count - 1]["patient"]:
        count += 1
    return count


def run(
    repeats: int,
    model_file: Path,
    folder: Path,
    known: list[dict[str, Any]],
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Adds what is missing to ``known``: a row for each repeat and strategy."""
    for number in range(repeats):
        done = {r["strategy"] for r in known if r["repeat"] == number}
        left = [s for s in STRATEGIES if s not in done]
        repeat = Repeat(number, model_file, folder) if left else None
        for strategy in left:
            assert repeat is not None
            dices = repeat.curve(strategy)
            known.append({"repeat": number, "strategy": strategy, "dice": dices})
            keep(known)
            print(number, strategy, [round(d, 3) for d in dices], flush=True)


def labels_needed(dices: Sequence[float], aim: float) -> float:
    """Labels at which a curve first reaches the aim, between steps linearly; NaN if it does not."""
    for place, value in enumerate(dices):
        if value >= aim:
            if place == 0:
                return float(STEPS[0])
            before, step = dices[place - 1], STEPS[place] - STEPS[place - 1]
            return STEPS[place - 1] + step * (aim - before) / (value - before)
    return float("nan")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: Dice at each step, and labels needed for the random choice's Dice."""
    by = {(r["repeat"], r["strategy"]): r["dice"] for r in rows}
    whole = sorted({n for n, _ in by if all((n, s) in by for s in STRATEGIES)})
    head = " | ".join(str(s) for s in STEPS)
    lines = [
        f"{len(whole)} repeats, each with a pool, validation and held-out patients of its own.",
        "Mean Dice on the held-out cines with so many labelled cines, and labels needed for the",
        f"Dice that random choice reaches with {AS_RANDOM} (mean and range over the repeats that",
        "reach it).",
        "",
        f"| strategy | {head} | labels needed |",
        "| --- |" + " --- |" * (len(STEPS) + 1),
    ]
    place = STEPS.index(AS_RANDOM)
    for strategy in STRATEGIES:
        curves = np.array([by[n, strategy] for n in whole])
        needed = np.array([labels_needed(by[n, strategy], by[n, "random"][place]) for n in whole])
        reached = needed[np.isfinite(needed)]
        told = "never" if not len(reached) else f"{reached.mean():.1f} [{reached.min():.1f}, "
        told += f"{reached.max():.1f}] ({len(reached)} of {len(whole)})" if len(reached) else ""
        cells = " | ".join(f"{v:.3f}" for v in curves.mean(0))
        lines.append(f"| {strategy} | {cells} | {told} |")
    return "\n".join(lines)
