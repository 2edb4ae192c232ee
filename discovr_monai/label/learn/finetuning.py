"""A new version of the segmentation model from the labels so far, and what it is worth.

In a labelled frame every structure that the head knows must be drawn, because what is not drawn
counts as background. Patients are dealt to training and held-out labels by their salted id, once
and for all: no version was ever trained on the labels by which versions are scored, however many
labels follow.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from discovr_monai.base.types import DatalistRow
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists.datalist import Datalist
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder, read_about
from discovr_monai.evaluation.features.extract import Features, patients_of
from discovr_monai.evaluation.heads.contours import dice
from discovr_monai.evaluation.heads.saved import fit_familiarity
from discovr_monai.evaluation.heads.segmenter import Segmenter
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.tasks.segmentation import Labelled, Segmentation
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.label.learn.runs import tracked_training
from discovr_monai.label.learn.versions import Versions, better
from discovr_monai.weights.files import DESCRIPTION, CheckpointError, description_tensor

PARTS = {"head": "linear", "decoder": "conv", "blocks": "linear"}  # part -> kind of a new head
FRAMES_PER_CINE = 12  # trained and scored on; more propagated neighbours add little
FAMILIAR_CINES = 20  # with fewer, it cannot be said which cines are unlike them


@dataclass(frozen=True)
class FinetuningSettings:
    """How to fine-tune.

    Attributes:
        part: "head", "decoder" (a small convolutional head), or "blocks" (the head and the last
            blocks of the encoder).
        blocks: how many last blocks, for "blocks".
        epochs, lr, batch_size, seed: of the training.
        held_out: share of the patients whose labels score the versions, above 0 and below 1.

    Raises:
        ValueError: naming the value that is out of range.
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
        version: the new version's number.
        promoted: whether it serves now.
        reason: one sentence.
        scores: Dice of the new version on the held-out labels: "dice_mean", and "dice_NAME" of
            each structure.
        serving: the same of the version that served before.
    """

    version: int
    promoted: bool
    reason: str
    scores: dict[str, float]
    serving: dict[str, float]


def deal(rows: Sequence[DatalistRow], held_out: float) -> dict[str, list[DatalistRow]]:
    """Deals cines to "training", "validation" (which chooses the epoch) and "held out".

    A hash of the patient decides, so that a patient stays where it is when others follow.

    Args:
        rows: with "patient"; a cine without is a patient of its own.
        held_out: expected share of the patients that are held out.

    Raises:
        ValueError: there are too few patients for the three.
    """
    owners = patients_of(rows)
    place = {p: int(hashlib.sha256(p.encode()).hexdigest()[:12], 16) / 16**12 for p in owners}
    rest = sorted((p for p in place if place[p] >= held_out), key=lambda p: -place[p])
    validation = set(rest[: max(1, len(rest) // 5)])
    sections: dict[str, list[DatalistRow]] = {"training": [], "validation": [], "held out": []}
    for row, owner in zip(rows, owners, strict=True):
        training = "validation" if owner in validation else "training"
        sections["held out" if place[owner] < held_out else training].append(row)
    if not all(sections.values()):
        counts = ", ".join(f"{name}: {len(part)} cines" for name, part in sections.items())
        raise ValueError(
            f"labels of {len(place)} patients are too few to train and to judge ({counts}): "
            "label cines of more patients"
        )
    return sections


class PartlyLabelled(Segmentation):
    """Segmentation of cines that are labelled in some frames, or in all by propagation."""

    def _labelled(self, rows: Sequence[DatalistRow]) -> list[Labelled]:
        """Evenly spread labelled frames of each cine."""
        items: list[Labelled] = []
        for row in rows:
            drawn = super()._labelled([row]) if self._masks(row).any() else []
            count = min(FRAMES_PER_CINE, len(drawn))
            items += [drawn[i] for i in np.linspace(0, len(drawn) - 1, count).round().astype(int)]
        if not items:
            raise ValueError("no frame is labelled: there is nothing to train on")
        return items

    def tuned(self) -> Segmenter:
        """Trains; the network of the epoch that does best on the validation cines."""
        parts = (self._inputs(self._labelled(self.rows[s])) for s in (self.train, self.validation))
        return self._fit(*parts)

    def scores(self, network: Segmenter) -> dict[str, float]:
        """Dice over a cine's labelled frames, averaged over the held-out cines."""
        cine_dices: dict[str, list[float]] = {name: [] for name in self.structures}
        rows = [row for row in self.rows[self.test[0]] if self._masks(row).any()]
        if not rows:
            raise ValueError("no held-out cine has a contour: label cines of more patients")
        for case in self._cases(network, rows, "held out"):
            for value, name in enumerate(self.structures, 1):
                pairs = zip(case.truth, case.predicted, strict=True)
                dices = [dice(t == value, p == value) for t, p in pairs if (t == value).any()]
                if dices:
                    cine_dices[name].append(float(np.mean(dices)))
        means = {f"dice_{name}": float(np.mean(v)) for name, v in cine_dices.items() if v}
        return {"dice_mean": float(np.mean(list(means.values()))), **means}


def finetune(
    versions: Versions,
    loader: LoadCined,
    rows: Sequence[DatalistRow],
    settings: FinetuningSettings = FinetuningSettings(),
    *,
    device: torch.device | str = "cpu",
    tracking_uri: str | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
) -> Outcome:
    """Trains from the serving version; if the new one is better on held-out labels, it serves.

    Args:
        versions: where the serving version is, and the new one goes.
        loader: reads the cines, at the size that the network takes.
        rows: each with "id", "image", "mask" (labels of the image; 0 in frames that nobody
            labelled), and "view" and "patient" where known.
        settings: how.
        device: where.
        tracking_uri: MLflow's store, None for none.
        after_epoch: is told how many epochs are done, and the loss on the validation cines.

    Raises:
        ValueError, CineError, CheckpointError: with what to do; the serving version goes on.
    """
    sections = deal(rows, settings.held_out)
    _check_blocks(settings, sections["training"])
    served = versions.current
    file = versions.checked_path(served)
    model = load_model(file).to(device)
    head = _tunable(model, settings, file.name)
    encoder = EvaluatedEncoder(file, head["branch"], device=device)
    counts = {f"cines_{name.replace(' ', '_')}": len(part) for name, part in sections.items()}
    parameters = {**asdict(settings), **counts, "from_version": served, "branch": head["branch"]}
    tracked = tracked_training(tracking_uri, parameters, versions.folder)
    with tracked as log, TemporaryDirectory() as folder:
        epoch = 0

        def log_epoch(loss: float) -> None:
            nonlocal epoch
            epoch += 1
            log({"validation_loss": loss}, epoch)
            if after_epoch is not None:
                after_epoch(epoch, loss)

        training = PartlyLabelled(
            encoder,
            Datalist(sections),
            loader,
            Results("segmentation", folder),
            **_options(settings, model),
            after_epoch=log_epoch,
        )
        serving = training.scores(model.segmenter())
        network = training.tuned()
        outcome = _judge(versions, served, settings, training, network, serving)
        log({**outcome.scores, "promoted": float(outcome.promoted)}, epoch)
        log({f"serving_{k}": v for k, v in serving.items()}, epoch)
    return outcome


# ---- parts ---------------------------------------------------------------------------------


def _check_blocks(settings: FinetuningSettings, rows: Sequence[DatalistRow]) -> None:
    """A changed encoder sees all cines anew, so enough of them, of known views, are needed.

    Raises:
        ValueError: it could not be said which cines and views are familiar to it.
    """
    if settings.part != "blocks":
        return
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


def _tunable(model: EchoModel, settings: FinetuningSettings, name: str) -> dict[str, Any]:
    """What the model says of its segmentation head.

    Raises:
        CheckpointError: there is none, or blocks are to be trained that serve another head too.
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


def _options(settings: FinetuningSettings, model: EchoModel) -> dict[str, Any]:
    """Of :class:`PartlyLabelled`; a head of the wanted kind is trained on, another begins anew."""
    head, kind = model.heads["segmentation"], PARTS[settings.part]
    goes_on = settings.part == "blocks" or kind == head["head"]
    return {
        "structures": head["structures"],
        "test": ["held out"],
        "head": head["head"] if goes_on else kind,
        "start": model.segmentation if goes_on else None,
        "blocks": settings.blocks if settings.part == "blocks" else 0,
        "every_frame": False,
        "epochs": settings.epochs,
        "lr": settings.lr,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }


def _judge(
    versions: Versions,
    served: int,
    settings: FinetuningSettings,
    training: PartlyLabelled,
    network: Segmenter,
    serving: dict[str, float],
) -> Outcome:
    """Scores what was trained, adds it as a version, and promotes it if it is better."""
    scores = training.scores(network)
    tensors = _with_head(versions.path(served), training, network)
    about = {
        "origin": "annotation",
        "from": served,
        "settings": asdict(settings),
        "scores": scores,
        "serving": serving,
        "cines": {name: len(rows) for name, rows in training.rows.items()},
    }
    version = versions.add(lambda path: torch.save(tensors, path), about)
    new, old = scores["dice_mean"], serving["dice_mean"]
    if not better(scores, serving):
        reason = f"held-out Dice {new:.3f} is not above the serving version's {old:.3f}"
        return Outcome(version, False, reason, scores, serving)
    versions.promote(version)
    return Outcome(version, True, f"held-out Dice {new:.3f}, before {old:.3f}", scores, serving)


def _with_head(file: Path, training: PartlyLabelled, network: Segmenter) -> dict[str, torch.Tensor]:
    """The serving model's tensors, with the new head, its encoder and what is familiar to it."""
    state = read_about(file)
    about = copy.deepcopy(state["about"])
    head = about["heads"]["segmentation"]
    cines = len(training.rows[training.train])
    head |= {"head": training.head, "cines": cines}
    new = {f"segmentation.{k}": v for k, v in network.head.state_dict().items()}
    if cines >= FAMILIAR_CINES:  # with fewer, the head stays silent where it was silent
        sections = (training.train, training.validation)
        rows = [row for name in sections for row in training.rows[name]]
        views = {str(row["view"]) for row in rows if row.get("view")}
        head["views"] = sorted(views if training.blocks else views | {*head["views"]})
        training.encoder.module = network.encoder
        file = training.results.folder / "features.npz"
        seen = Features(training.encoder, training.data, training.loader, sections, file)
        familiar = fit_familiarity(*(seen[section] for section in sections))
        new |= {f"segmentation_familiarity.{k}": v for k, v in familiar.state_dict().items()}
    if training.blocks:
        prefix = "encoder.encoder."  # of the segmenter's encoder and its wrapper
        for key, value in network.state_dict().items():
            if key.startswith(prefix):
                new[f"{head['branch']}.{key.removeprefix(prefix)}"] = value
    kept = {k: v for k, v in state["network"].items() if not k.startswith("segmentation.")}
    copies = {k: v.detach().cpu().contiguous().clone() for k, v in new.items()}
    return {**kept, **copies, DESCRIPTION: description_tensor(about)}
