"""Heads that an evaluation saves for inference, and when they may be used.

A head belongs to one checkpoint, to the views that it was trained on, and to cines like those: its
:class:`Familiarity` says how unlike its training cines another one is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn

from discovr_monai.base.files import save_atomic
from discovr_monai.base.types import DatalistRow
from discovr_monai.evaluation.features.extract import Section, patients_of
from discovr_monai.weights.files import (
    DESCRIPTION,
    CheckpointError,
    description_tensor,
    read_safetensors,
)

FORMAT = 1
KINDS = ("ef", "segmentation")
FAMILIAR = 0.99  # share of held-out cines that count as familiar
ENOUGH = 50  # held-out cines from which on they alone set the limit
FOLDS = 5  # of the cross-validation where there are fewer


class EFHead(nn.Module):
    """A linear layer from pooled features to the EF, with the half-width of its interval.

    Args:
        width: D, the number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.radius: Tensor
        self.register_buffer("weight", torch.zeros(width))
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("radius", torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B,) EF in percent, which may lie outside of 0..100."""
        return features @ self.weight + self.bias


class Familiarity(nn.Module):
    """How far features lie from those of the cines that a head was trained on.

    The measure is the Mahalanobis distance divided by the square root of the number of
    dimensions, with the covariance of Ledoit and Wolf (2004): about 1 for a training cine. It is
    given as a share of ``limit``, below which 99 % of held-out cines lie. Above 1, the head must
    not be used.

    Args:
        width: D of :func:`familiar_features`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.precision: Tensor
        self.limit: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("precision", torch.eye(width))
        self.register_buffer("limit", torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B,) distances as a share of the limit; up to 1 a cine is familiar."""
        offset = features.double() - self.mean.double()
        square = torch.einsum("bi,ij,bj->b", offset, self.precision.double(), offset)
        return ((square / len(self.mean)).clamp_min(0).sqrt() / self.limit).float()

    @classmethod
    def fit(
        cls, train: np.ndarray, held_out: np.ndarray, patients: Sequence[str] | None = None
    ) -> Familiarity:
        """Learns the distribution of the training cines, and the limit from the held-out ones.

        A few held-out cines say little about the limit. With fewer than ENOUGH of them it comes
        from cross-validation over all cines instead: each one is measured by the distribution of
        the folds that it is not in. A patient's cines stay in one fold, because a cine would look
        too familiar beside others of its own patient.

        Args:
            train, held_out: (M, D) features.
            patients: whose cine each row is, those of ``train`` first; None if all differ.
        """
        if len(held_out) >= ENOUGH:
            self = cls._without_limit(train)
            distances = self._distances(held_out)
        else:
            rows = np.concatenate((train, held_out))
            owners = np.arange(len(rows)) if patients is None else np.asarray(patients)
            self = cls._without_limit(rows)
            names, numbers = np.unique(owners, return_inverse=True)
            fold = numbers % FOLDS
            distances = np.concatenate([
                cls._without_limit(rows[fold != k])._distances(rows[fold == k])
                for k in range(min(FOLDS, len(names)))
            ])  # fmt: skip
        self.limit.fill_(float(np.quantile(distances, FAMILIAR)))
        return self

    @classmethod
    def _without_limit(cls, train: np.ndarray) -> Familiarity:
        """The distribution of (M, D) features, its limit still 1."""
        covariance = LedoitWolf().fit(train.astype(np.float64))
        self = cls(train.shape[1])
        self.mean.copy_(torch.from_numpy(covariance.location_))
        self.precision.copy_(torch.from_numpy(covariance.get_precision()))
        return self

    def _distances(self, features: np.ndarray) -> np.ndarray:
        distances: np.ndarray = self(torch.from_numpy(features).float()).numpy()
        return distances


def familiar_features(mean: Tensor, motion: Tensor) -> Tensor:
    """What familiarity looks at: how a cine's tokens are, and how they change over time.

    Args:
        mean: (B, d) and
        motion: (B, d P) with P places, both of
            :func:`discovr_monai.evaluation.features.encoders.pool_tokens`.

    Returns:
        (B, 2 d): the mean, and the motion averaged over the places.

    >>> familiar_features(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0, 5.0, 5.0]]))
    tensor([[1., 2., 2., 5.]])
    """
    return torch.cat((mean, motion.unflatten(1, (mean.shape[1], -1)).mean(-1)), 1)


def fit_familiarity(train: Section, held_out: Section) -> Familiarity:
    """The familiarity of a head, from its training cines and from others like them."""
    x, held = (
        familiar_features(torch.from_numpy(s.mean), torch.from_numpy(s.motion)).numpy()
        for s in (train, held_out)
    )
    return Familiarity.fit(x, held, patients_of([*train.rows, *held_out.rows]))


def views_of(rows: Sequence[DatalistRow], view: str | None) -> list[str]:
    """The sorted views that a head is trained on.

    Args:
        view: of the rows that do not name theirs.

    Raises:
        ValueError: if some row's view is unknown: such a head could not be used safely.

    >>> views_of([{"view": "A4C"}, {}, {"view": "A4C"}], "A2C")
    ['A2C', 'A4C']
    """
    views = {str(r.get("view") or view or "") for r in rows}
    if "" in views:
        raise ValueError(
            "the view of some training cines is unknown, and a head is only used on the views "
            'that it was trained on: name them in the datalist ("view"), or all at once by --view'
        )
    return sorted(views)


def check_all_labels(label_fractions: Sequence[float]) -> None:
    """Refuses to save a head if no part of the evaluation trains on all labels."""
    if 1 not in label_fractions:
        raise ValueError("save_head needs 1.0 among the label_fractions: a head has all labels")


def write_head(path: str | Path, about: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> None:
    """Writes a head's modules by name as one safetensors file, with ``about`` in its header."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, module in parts.items()
        for key, value in module.state_dict().items()
    }
    header = {"format": str(FORMAT), "head": json.dumps(dict(about), sort_keys=True)}
    save_atomic(lambda temporary: save_file(tensors, temporary, header), Path(path))


def read_head(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a file of :func:`write_head`: its ``about``, and the tensors as "MODULE.NAME".

    Raises:
        CheckpointError: if the file is missing, damaged or something else.
    """
    path = Path(path)
    remedy = "make it with --save_head in configs/lvef.yaml or segmentation.yaml"
    if not path.is_file():
        raise CheckpointError(f"head {path.name} does not exist: {remedy}")
    try:
        header, tensors = read_safetensors(path)
        about = json.loads(header["head"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path.name} is not a head, or damaged: {remedy}") from error
    if header.get("format") != str(FORMAT) or about.get("kind") not in KINDS:
        raise CheckpointError(f"{path.name} is a head of another version: {remedy}")
    return about, tensors


def bundle_heads(checkpoint: str | Path, heads: Sequence[str | Path], output: str | Path) -> None:
    """Writes one file for inference with a checkpoint's encoders and its heads.

    The file holds the video teacher and the branches that the heads look through.

    Args:
        checkpoint: last.pt or best.pt of a training, or a converted file.
        heads: files of :func:`write_head`, at most one of a kind, made from this checkpoint.
        output: the file, such as models/model.pt of the bundle.

    Raises:
        CheckpointError: if a head was made from another checkpoint.
    """
    from discovr_monai.evaluation.features.encoders import read_about

    state = read_about(checkpoint)
    abouts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path in heads:
        about, parts = read_head(path)
        if about["checkpoint"] != state["sha256"]:
            raise CheckpointError(
                f"head {Path(path).name} was made from another checkpoint than "
                f"{Path(checkpoint).name}: evaluate this one with --save_head"
            )
        if about["kind"] in abouts:
            raise CheckpointError(f"two heads for {about['kind']}: give one of each kind")
        abouts[about["kind"]] = about
        tensors |= parts
    branches = {"video_teacher", *(about["branch"] for about in abouts.values())}
    for key, value in state["network"].items():
        if key.split(".")[0] in branches:
            tensors[key] = value.contiguous()
    settings = {**state["about"], "heads": abouts}
    if not any(branch.startswith("image") for branch in branches):
        settings["image"] = None
    tensors[DESCRIPTION] = description_tensor(settings)
    save_atomic(lambda temporary: torch.save(tensors, temporary), Path(output))
