"""The network of inference: frozen encoders of a checkpoint, and the heads that it carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discovr_monai.evaluation.features.encoders import (
    TRAINED,
    FrozenEncoder,
    pool_tokens,
    pooled,
    read_about,
)
from discovr_monai.evaluation.features.extract import POOLINGS
from discovr_monai.evaluation.heads.saved import EFHead, Familiarity, familiar_features
from discovr_monai.evaluation.heads.segmenter import SegmentationHead, Segmenter
from discovr_monai.networks.vit import VisionTransformer
from discovr_monai.weights.files import (
    DESCRIPTION,
    CheckpointError,
    description_tensor,
    load_strict,
)


class EchoModel(nn.Module):
    """Encoders and heads of one file.

    Its parameters have the names that they have in the file, so MONAI's own tools load it.

    Attributes:
        about: of the file: "video", "image", "clip", "heads".
        encoders: branch -> :class:`FrozenEncoder`.
        sha256: of the file, 16 digits; "" before weights are loaded.

    Args:
        about: see above.
        branch: whose embedding :meth:`forward` gives.
        pooling: of the embedding: "cls", "mean", "both" or "motion".
    """

    def __init__(
        self, about: Mapping[str, Any], branch: str = "video_teacher", pooling: str = "cls"
    ) -> None:
        super().__init__()
        if branch not in TRAINED:
            raise ValueError(f"branch {branch!r} must be one of {', '.join(TRAINED)}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} must be one of {', '.join(POOLINGS)}")
        self.about, self.branch, self.pooling, self.sha256 = dict(about), branch, pooling, ""
        self.heads: dict[str, Any] = dict(about.get("heads", {}))
        self.encoders: dict[str, FrozenEncoder] = {}  # the same modules, not registered twice
        for name in dict.fromkeys((branch, *(h["branch"] for h in self.heads.values()))):
            settings = about[name.split("_")[0]]
            if settings is None:
                raise CheckpointError(
                    f"the checkpoint has no {name.replace('_', ' ')}: use branch video_teacher"
                )
            encoder = VisionTransformer(**settings)
            self.add_module(name, encoder)
            self.encoders[name] = FrozenEncoder(encoder, about["video"]["num_frames"])
        if "ef" in self.heads:
            self.ef = EFHead(self.heads["ef"]["width"])
        if "segmentation" in self.heads:
            head, like = self.heads["segmentation"], self.encoders[self._of("segmentation")]
            self.segmentation = SegmentationHead(
                like.token_dim, len(head["structures"]) + 1, like.tubelet_size, head["head"]
            )
        for kind in self.heads:
            width = 2 * self.encoders[self._of(kind)].token_dim
            self.add_module(f"{kind}_familiarity", Familiarity(width))
        self.description: Tensor  # the file's own, so that the state dict is the file
        self.register_buffer(DESCRIPTION, description_tensor(self.about))
        self.requires_grad_(False).eval()

    def _of(self, kind: str) -> str:
        return str(self.heads[kind]["branch"])

    def train(self, mode: bool = True) -> EchoModel:
        """Stays in evaluation."""
        return super().train(False)

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(3, T, H, W) of a clip."""
        return self.encoders[self.branch].clip_shape

    @property
    def structures(self) -> list[str]:
        """Names of labels 1, 2, ..., if there is a segmentation head."""
        return list(self.heads.get("segmentation", {}).get("structures", ()))

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) normalised -> (B, D)."""
        encoder = self.encoders[self.branch]
        return pooled(pool_tokens(encoder(clip), encoder.grid), self.pooling)

    @torch.no_grad()
    def look(self, clip: Tensor) -> dict[str, Tensor]:
        """What is averaged over a cine's windows, each branch seen once.

        Args:
            clip: (B, 3, T, H, W) normalised.

        Returns:
            "embedding" (B, D); for each head "KIND_seen" (B, 2 d), what its familiarity looks at,
            and "ef_features" (B, D') for an EF head.
        """
        seen = {
            name: pool_tokens(e(clip), e.grid) for name, e in self.encoders.items()
        }  # branch -> poolings
        out = {"embedding": pooled(seen[self.branch], self.pooling)}
        for kind in self.heads:
            features = seen[self._of(kind)]
            out[f"{kind}_seen"] = familiar_features(features["mean"], features["motion"])
        if "ef" in self.heads:
            out["ef_features"] = pooled(seen[self._of("ef")], self.heads["ef"]["pooling"])
        return out

    def unfamiliarity(self, kind: str, seen: Tensor) -> Tensor:
        """(B, 2 d) "KIND_seen" -> (B,); a head may be used up to 1."""
        distance: Tensor = getattr(self, f"{kind}_familiarity")(seen)
        return distance

    def segmenter(self) -> Segmenter:
        """Encoder and head for label maps of every frame."""
        return Segmenter(self.encoders[self._of("segmentation")], self.segmentation)


def load_model(
    ckpt: str | Path,
    branch: str = "video_teacher",
    pooling: str = "cls",
    expect: Mapping[str, Any] | None = None,
) -> EchoModel:
    """The model that a file describes, with its weights.

    Args:
        ckpt: models/model.pt, a training's checkpoint or a converted file.
        branch, pooling: see :class:`EchoModel`.
        expect: see :func:`read_about`.

    Raises:
        CheckpointError, ValueError: with what to do.
    """
    state = read_about(ckpt, expect)
    model = EchoModel(state["about"], branch, pooling)
    if not any(key.startswith(f"{branch}.") for key in state["network"]):
        what = branch.replace("_", " ")
        raise CheckpointError(f"{Path(ckpt).name} has no {what}: choose another branch")
    wanted = {key.split(".")[0] for key in model.state_dict()}
    tensors = {k: v for k, v in state["network"].items() if k.split(".")[0] in wanted}
    tensors[DESCRIPTION] = model.description
    load_strict(model, tensors, Path(ckpt).name)
    model.sha256 = state["sha256"]
    return model
