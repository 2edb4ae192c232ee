"""Heads that leave an evaluation for inference: what they hold, and when they may speak.

A head belongs to one checkpoint, to the views that it was trained on, and to cines like those:
its :class:`Familiarity` says how unlike its training a cine is.
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
from discovr_monai.evaluation.features.extract import Section
from discovr_monai.weights.files import DESCRIPTION, CheckpointError, describe, read_safetensors

FORMAT = 1
KINDS = ("ef", "segmentation")
FAMILIAR = 0.99  # share of held-out cines that count as familiar
ENOUGH, FOLDS = 50, 5  # held-out cines that say what is familiar; parts, where there are fewer


class LinearHead(nn.Module):
    """Pooled features to EF in percent, and the half-width of its conformal interval.

    Args:
        width: D of the features.
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
        """(B, D) -> (B,) percent."""
        return features @ self.weight + self.bias


class Familiarity(nn.Module):
    """How far features lie from those of a head's training cines.

    Mahalanobis distance per dimension, with Ledoit and Wolf's covariance (2004): about 1 for a
    training cine. Above ``limit``, which 99 % of held-out cines keep, a head says nothing.

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
        """(B, D) -> (B,) distances; not above 1: familiar."""
        apart = features.double() - self.mean.double()
        square = torch.einsum("bi,ij,bj->b", apart, self.precision.double(), apart)
        return ((square / len(self.mean)).clamp_min(0).sqrt() / self.limit).float()

    @classmethod
    def fit(cls, train: np.ndarray, held_out: np.ndarray) -> Familiarity:
        """From the features (M, D) of training cines and of others like them.

        Few others say little of the limit: with under ENOUGH, it is that of all cines, each a
        stranger to the distribution that it is measured by (cross-validation).
        """
        if len(held_out) >= ENOUGH:
            self = cls._of(train)
            distances = self(torch.from_numpy(held_out).float()).numpy()
        else:
            train = np.concatenate((train, held_out))
            self = cls._of(train)
            fold = np.arange(len(train)) % FOLDS
            distances = np.concatenate([
                cls._of(train[fold != k])(torch.from_numpy(train[fold == k]).float()).numpy()
                for k in range(min(FOLDS, len(train)))
            ])  # fmt: skip
        self.limit.fill_(float(np.quantile(distances, FAMILIAR)))
        return self

    @classmethod
    def _of(cls, train: np.ndarray) -> Familiarity:
        """Without a limit."""
        found = LedoitWolf().fit(train.astype(np.float64))
        self = cls(train.shape[1])
        self.mean.copy_(torch.from_numpy(found.location_))
        self.precision.copy_(torch.from_numpy(found.get_precision()))
        return self


def familiar_features(mean: Tensor, motion: Tensor) -> Tensor:
    """What familiarity looks at: how a cine's tokens are, and how they change.

    Args:
        mean: (B, d); motion: (B, d P) of P places; see
            :func:`discovr_monai.evaluation.features.encoders.pool_tokens`.

    Returns:
        (B, 2 d).
    """
    return torch.cat((mean, motion.unflatten(1, (mean.shape[1], -1)).mean(-1)), 1)


def fit_familiarity(train: Section, held_out: Section) -> Familiarity:
    """From the features of a head's training cines, and of others like them."""
    both = (
        familiar_features(torch.from_numpy(s.mean), torch.from_numpy(s.motion)).numpy()
        for s in (train, held_out)
    )
    return Familiarity.fit(*both)


def views_of(rows: Sequence[DatalistRow], view: str | None) -> list[str]:
    """The views that a head is trained on.

    Args:
        view: of the rows that do not name theirs.

    Raises:
        ValueError: if some row's view is unknown: such a head could not be used safely.
    """
    found = {str(r.get("view") or view or "") for r in rows}
    if "" in found:
        raise ValueError(
            "the view of some training cines is unknown, and a head is only used on the views "
            'that it was trained on: name them in the datalist ("view"), or all at once by --view'
        )
    return sorted(found)


def write_head(path: str | Path, about: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> None:
    """Writes a head's modules as safetensors, ``about`` in its header."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, module in parts.items()
        for key, value in module.state_dict().items()
    }
    header = {"format": str(FORMAT), "head": json.dumps(dict(about), sort_keys=True)}
    save_atomic(lambda temporary: save_file(tensors, temporary, header), Path(path))


def read_head(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write_head` wrote: about, tensors.

    Raises:
        CheckpointError: if it is something else.
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
    """A training's teachers and heads in one file, for inference.

    Args:
        checkpoint: last.pt or best.pt of a training, or a converted file.
        heads: files of :func:`write_head`, at most one of a kind, made from this checkpoint.
        output: models/model.pt of the bundle, say.

    Raises:
        CheckpointError: if a head was made from another checkpoint.
    """
    from discovr_monai.evaluation.features.encoders import read_about

    state = read_about(checkpoint)
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path in heads:
        about, parts = read_head(path)
        if about["checkpoint"] != state["sha256"]:
            raise CheckpointError(
                f"head {Path(path).name} was made from another checkpoint than "
                f"{Path(checkpoint).name}: evaluate this one with --save_head"
            )
        if about["kind"] in found:
            raise CheckpointError(f"two heads for {about['kind']}: give one of each kind")
        found[about["kind"]] = about
        tensors |= parts
    branches = {"video_teacher", *(h["branch"] for h in found.values())}
    for key, value in state["network"].items():
        if key.split(".")[0] in branches:
            tensors[key] = value.contiguous()
    settings = {**state["about"], "heads": found}
    if not any(branch.startswith("image") for branch in branches):
        settings["image"] = None
    tensors[DESCRIPTION] = describe(settings)
    save_atomic(lambda temporary: torch.save(tensors, temporary), Path(output))
