"""A new version of the segmentation model from the labels so far, and what it is worth.

All structures that the head knows must be drawn in a labelled frame: what is not drawn counts as
background. Patients are dealt to training and held-out labels by their salted id, once and for
all: whoever's labels score a version was never trained on by an earlier one, however many follow.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discovr_monai.base.types import DatalistRow
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists.datalist import Datalist
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder, read_about
from discovr_monai.evaluation.features.extract import Features, patients_of
from discovr_monai.evaluation.heads.contours import dice
from discovr_monai.evaluation.heads.saved import fit_familiarity, views_of
from discovr_monai.evaluation.heads.segmenter import Segmenter
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.tasks.segmentation import Labelled, Segmentation
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.label.learn.runs import TrackedTraining
from discovr_monai.label.learn.versions import Versions, better
from discovr_monai.weights.files import DESCRIPTION, CheckpointError, describe

PARTS = {"head": "linear", "decoder": "conv", "blocks": "linear"}  # part -> kind of a new head
FRAMES = 12  # of a cine that are trained and scored on; propagated neighbours add little
FAMILIAR_CINES = 20  # with fewer, it cannot be said what is unlike them


@dataclass(frozen=True)
class Settings:
    """How to fine-tune.

    Attributes:
        part: "head", "decoder" (a small convolutional head), or "blocks" (the head and the
            encoder's last blocks).
        blocks: how many, for "blocks".
        epochs, lr, batch_size, seed: of the training.
        held_out: share of the patients whose labels score the versions.
    """

    part: str = "head"
    blocks: int = 1
    epochs: int = 20
    lr: float = 1e-3
    batch_size: int = 16
    seed: int = 0
    held_out: float = 0.25

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part {self.part!r} must be one of {', '.join(PARTS)}")
        if not 1 <= self.epochs <= 1000 or not 1 <= self.batch_size <= 1024 or self.blocks < 1:
            raise ValueError(
                f"epochs {self.epochs} (1 to 1000), batch_size {self.batch_size} (1 to 1024) or "
                f"blocks {self.blocks} (at least 1) is out of range"
            )
        if not 0 < self.lr <= 1 or not 0 < self.held_out < 1:
            raise ValueError(f"lr {self.lr} and held_out {self.held_out} must lie between 0 and 1")


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        version: the new one's number.
        promoted: whether it serves now.
        scores, serving: Dice on the held-out labels, of the new version and of the one that
            served: "dice_mean", and "dice_NAME" of each structure.
        reason: one sentence.
    """

    version: int
    promoted: bool
    scores: dict[str, float]
    serving: dict[str, float]
    reason: str


def deal(rows: Sequence[DatalistRow], held_out: float) -> dict[str, list[DatalistRow]]:
    """Labelled cines into "training", "validation" (which chooses the epoch) and "held out".

    Args:
        rows: with "patient"; a cine without is a patient of its own.
        held_out: share of patients, see the module.

    Raises:
        ValueError: if there are too few patients for the three.
    """
    owners = patients_of(rows)
    place = {p: int(hashlib.sha256(p.encode()).hexdigest()[:12], 16) / 16**12 for p in owners}
    rest = sorted((p for p in place if place[p] >= held_out), key=lambda p: -place[p])
    watching = set(rest[: max(1, len(rest) // 5)])
    names = {
        p: "held out" if place[p] < held_out else "validation" if p in watching else "training"
        for p in place
    }
    out: dict[str, list[DatalistRow]] = {"training": [], "validation": [], "held out": []}
    for row, owner in zip(rows, owners, strict=True):
        out[names[owner]].append(row)
    if not all(out.values()):
        found = ", ".join(f"{name}: {len(part)} cines" for name, part in out.items())
        raise ValueError(
            f"labels of {len(place)} patients are too few to train and to judge ({found}): "
            "label cines of more patients"
        )
    return out


class PartlyLabelled(Segmentation):
    """Segmentation of cines that are labelled in some frames, or in all by propagation."""

    def _labelled(self, rows: Sequence[DatalistRow]) -> list[Labelled]:
        found: list[Labelled] = []
        for row in rows:
            mine = super()._labelled([row]) if self._masks(row).any() else []
            kept = np.linspace(0, len(mine) - 1, min(FRAMES, len(mine))).round().astype(int)
            found += [mine[i] for i in kept]
        if not found:
            raise ValueError("no frame is labelled: there is nothing to train on")
        return found

    def tuned(self) -> Segmenter:
        """The network of its best epoch."""
        parts = (self._inputs(self._labelled(self.rows[s])) for s in (self.train, self.validation))
        return self._fit(*parts)

    def scores(self, network: Segmenter) -> dict[str, float]:
        """Mean over the held-out cines of Dice over their labelled frames."""
        found: dict[str, list[float]] = {name: [] for name in self.structures}
        rows = [row for row in self.rows[self.test[0]] if self._masks(row).any()]
        if not rows:
            raise ValueError("no held-out cine has a contour: label cines of more patients")
        for case in self._cases(network, rows, "held out"):
            for value, name in enumerate(self.structures, 1):
                pairs = zip(case.truth, case.predicted, strict=True)
                dices = [dice(t == value, p == value) for t, p in pairs if (t == value).any()]
                if dices:
                    found[name].append(float(np.mean(dices)))
        out = {f"dice_{name}": float(np.mean(v)) for name, v in found.items() if v}
        return {"dice_mean": float(np.mean(list(out.values()))), **out}


def finetune(
    versions: Versions,
    loader: LoadCined,
    rows: Sequence[DatalistRow],
    settings: Settings | None = None,
    *,
    device: torch.device | str = "cpu",
    tracking_uri: str | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
) -> Outcome:
    """Trains from the serving version; what is better on held-out labels serves from then on.

    Args:
        versions: where the serving one is, and the new one goes.
        loader: reads the cines, as large as the network's.
        rows: with "image", "mask" (see :func:`~discovr_monai.data.read.masks.read_masks`; frames
            that nobody labelled are 0), "view", and "patient" where known; each with "id".
        settings: how.
        device: where.
        tracking_uri: MLflow's store, None for none.
        after_epoch: is told how many epochs are done, and the loss on the validation cines.

    Raises:
        ValueError, CineError, CheckpointError: with what to do; the serving version goes on.
    """
    settings = settings or Settings()
    sections = deal(rows, settings.held_out)
    if settings.part == "blocks":
        _check_blocks(sections["training"])
    served = versions.current
    serving_file = versions.checked_path(served)
    model = load_model(serving_file).to(device)
    about = _tunable(model, settings, serving_file.name)
    encoder = EvaluatedEncoder(serving_file, about["branch"], device=device)
    counts = {f"cines_{k.replace(' ', '_')}": len(v) for k, v in sections.items()}
    parameters = {**asdict(settings), **counts, "from_version": served, "branch": about["branch"]}
    with TrackedTraining(tracking_uri, parameters) as run, tempfile.TemporaryDirectory() as folder:
        done = 0

        def told(figure: float) -> None:
            nonlocal done
            done += 1
            run.log({"validation_loss": figure}, done)
            if after_epoch is not None:
                after_epoch(done, figure)

        goes_on = PARTS[settings.part] == about["head"] or settings.part == "blocks"
        training = PartlyLabelled(
            encoder,
            Datalist(sections),
            loader,
            Results("segmentation", folder),
            structures=about["structures"],
            train="training",
            validation="validation",
            test=["held out"],
            head=about["head"] if goes_on else PARTS[settings.part],
            blocks=settings.blocks if settings.part == "blocks" else 0,
            every_frame=False,
            epochs=settings.epochs,
            lr=settings.lr,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start=model.segmentation if goes_on else None,
            after_epoch=told,
        )
        serving = training.scores(model.segmenter())
        network = training.tuned()
        outcome = _judge(versions, served, training, network, serving, settings, Path(folder))
        run.log({**outcome.scores, "promoted": float(outcome.promoted)}, done)
        run.log({f"serving_{k}": v for k, v in outcome.serving.items()}, done)
    return outcome


# ---- parts ---------------------------------------------------------------------------------


def _check_blocks(rows: Sequence[DatalistRow]) -> None:
    """Another encoder sees everything anew: what is familiar, and of which view, must be known.

    Raises:
        ValueError: if it would not.
    """
    if len(rows) < FAMILIAR_CINES:
        raise ValueError(
            f"{len(rows)} cines are too few to train the encoder's blocks (at least "
            f"{FAMILIAR_CINES}): train the head, or label more"
        )
    if not all(row.get("view") for row in rows):
        raise ValueError(
            "the view of some labelled cines is unknown, and a head only speaks on views that it "
            "was trained on: start the server with --view, or name them in the datalist"
        )


def _tunable(model: EchoModel, settings: Settings, name: str) -> dict[str, Any]:
    """What is known of the segmentation head.

    Raises:
        CheckpointError: if there is none, or its encoder is another head's too.
    """
    head = model.heads.get("segmentation")
    if head is None:
        raise CheckpointError(f"{name} has no segmentation head: serve a model that has one")
    others = [k for k, h in model.heads.items() if h["branch"] == head["branch"]]
    if settings.part == "blocks" and others != ["segmentation"]:
        raise CheckpointError(
            f"the encoder {head['branch']} serves the heads {', '.join(others)}: its blocks cannot "
            "be trained for one of them. Train the head or a decoder"
        )
    return dict(head)


def _judge(
    versions: Versions,
    served: int,
    training: PartlyLabelled,
    network: Segmenter,
    serving: Mapping[str, float],
    settings: Settings,
    folder: Path,
) -> Outcome:
    """Scores what was trained; adds it as a version, and promotes it if it is better."""
    scores = training.scores(network)
    tensors = _with_head(versions.path(served), training, network, folder)
    about = {
        "origin": "annotation",
        "from": served,
        "settings": asdict(settings),
        "scores": scores,
        "serving": dict(serving),
        "cines": {name: len(rows) for name, rows in training.rows.items()},
    }
    version = versions.add(lambda path: torch.save(tensors, path), about)
    if not better(scores, serving):
        reason = f"not above the serving version's {serving['dice_mean']:.3f}"
        reason = f"held-out Dice {scores['dice_mean']:.3f} is {reason}"
        return Outcome(version, False, scores, dict(serving), reason)
    versions.promote(version)
    reason = f"held-out Dice {scores['dice_mean']:.3f}, before {serving['dice_mean']:.3f}"
    return Outcome(version, True, scores, dict(serving), reason)


def _with_head(
    file: Path, training: PartlyLabelled, network: Segmenter, folder: Path
) -> dict[str, torch.Tensor]:
    """The serving model's tensors with the new head, its encoder and its familiarity."""
    state = read_about(file)
    about, tensors = copy.deepcopy(state["about"]), dict(state["network"])
    head = about["heads"]["segmentation"]
    both = (training.train, training.validation)
    own = [row for name in both for row in training.rows[name]]
    named = [r for r in own if r.get("view")]
    views = views_of(named, None) if named else []
    head |= {"head": training.head, "cines": len(training.rows[training.train])}
    enough = len(training.rows[training.train]) >= FAMILIAR_CINES
    tensors = {k: v for k, v in tensors.items() if not k.startswith("segmentation.")}
    new = {f"segmentation.{k}": v for k, v in network.head.state_dict().items()}
    if enough:  # else the head stays silent where it was silent
        head["views"] = sorted({*views} if training.blocks else {*views, *head["views"]})
        training.encoder.module = network.encoder
        seen = Features(
            training.encoder, training.data, training.loader, both, folder / "features.npz"
        )
        familiar = fit_familiarity(*(seen[section] for section in both))
        new |= {f"segmentation_familiarity.{k}": v for k, v in familiar.state_dict().items()}
    if training.blocks:
        own_blocks = "encoder.encoder."  # of the segmenter's frozen encoder
        for key, value in network.state_dict().items():
            if key.startswith(own_blocks):
                new[f"{head['branch']}.{key.removeprefix(own_blocks)}"] = value
    tensors |= {k: v.detach().cpu().contiguous().clone() for k, v in new.items()}
    tensors[DESCRIPTION] = describe(about)
    return tensors
