"""What is evaluated: the frozen encoders of a checkpoint, or features that learn nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discovr_monai.data.clips.normalise import PrepareClip
from discovr_monai.networks.vit import VisionTransformer
from discovr_monai.weights.files import CheckpointError, load_strict, read_checkpoint

TRAINED = ("video_teacher", "video_student", "image_teacher", "image_student")
SIMPLE = ("mean_frame", "temporal_std", "pixel_pca")
BRANCHES = (*TRAINED, *SIMPLE)
PLACES = 4  # per side: the motion features keep at most 4 x 4 places of the token grid
THUMBNAIL = 32  # pixels per side of a simple feature's picture


class Backbone(nn.Module):
    """What every task sees of an encoder.

    Attributes:
        clip_shape: (3, T, H, W) of its clips.
        grid: (t, h, w) of a clip's tokens.
        tubelet_size: frames that a token covers.
        token_dim: d, the width of a token.
    """

    clip_shape: tuple[int, int, int, int]
    grid: tuple[int, int, int]
    tubelet_size: int
    token_dim: int

    def embed(self, clip: Tensor) -> dict[str, Tensor]:
        """(B, 3, T, H, W) -> "cls", "mean" and "motion", (B, D) each; see :func:`pool_tokens`."""
        raise NotImplementedError

    def tokens(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, t, h, w, token_dim)."""
        raise NotImplementedError


def pool_tokens(tokens: Tensor, grid: Sequence[int]) -> dict[str, Tensor]:
    """Features of a clip from its tokens.

    The tokens of a beating heart differ little from frame to frame, and their mean over time hides
    by how much. "motion" keeps just that: each feature's standard deviation over time, by place.

    Args:
        tokens: (B, g, 1 + n, d), the CLS token of each group of frames first. The video encoder
            has one group (g = 1), the image branch one for each frame.
        grid: (t, h, w) of all the clip's patch tokens, with t h w = g n.

    Returns:
        "cls" (B, d), the mean over the groups; "mean" (B, d), the mean over all patch tokens;
        "motion" (B, d min(h, 4) min(w, 4)), the deviation averaged onto at most 4 x 4 places.

    >>> features = pool_tokens(torch.zeros(2, 1, 1 + 4 * 8 * 8, 24), (4, 8, 8))
    >>> {name: tuple(x.shape) for name, x in features.items()}
    {'cls': (2, 24), 'mean': (2, 24), 'motion': (2, 384)}
    """
    patches = tokens[:, :, 1:]
    by_place = patches.reshape(tokens.shape[0], *grid, -1)  # (B, t, h, w, d)
    moving = (by_place.var(1, unbiased=False) + 1e-12).sqrt().permute(0, 3, 1, 2)  # (B, d, h, w)
    size = (min(grid[1], PLACES), min(grid[2], PLACES))
    motion = F.adaptive_avg_pool2d(moving, size).flatten(1)
    return {"cls": tokens[:, :, 0].mean(1), "mean": patches.mean((1, 2)), "motion": motion}


def pooled(features: Mapping[str, Tensor], pooling: str) -> Tensor:
    """One of :func:`pool_tokens`' results, or for "both" CLS and mean side by side."""
    if pooling == "both":
        return torch.cat((features["cls"], features["mean"]), -1)
    return features[pooling]


class FrozenEncoder(Backbone):
    """One branch of a trained network. The image branch looks at each frame by itself.

    Args:
        encoder: its weights are frozen.
        num_frames: frames of a clip.
    """

    def __init__(self, encoder: VisionTransformer, num_frames: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        _, frames, height, width = encoder.clip_shape
        self.by_frame = frames == 1 and num_frames > 1
        self.clip_shape = (3, num_frames, height, width)
        _, h, w = encoder.grid
        self.grid = (num_frames // encoder.tubelet_size, h, w)
        self.tubelet_size, self.token_dim = encoder.tubelet_size, encoder.embed_dim

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in evaluation."""
        return super().train(False)

    def forward(self, clip: Tensor) -> Tensor:
        """Tokens of normalised clips (B, 3, T, H, W), CLS first.

        Returns:
            (B, T, 1 + h w, d) of the image branch; (B, 1, 1 + t h w, d) of the video encoder,
            which has one CLS token for all tubelets.
        """
        if not self.by_frame:
            return self.encoder(clip)[:, None]
        frames = clip.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B T, 3, 1, H, W)
        return self.encoder(frames).unflatten(0, (clip.shape[0], -1))

    @torch.no_grad()
    def embed(self, clip: Tensor) -> dict[str, Tensor]:
        """See :class:`Backbone`."""
        return pool_tokens(self(clip), self.grid)

    @torch.no_grad()
    def tokens(self, clip: Tensor) -> Tensor:
        """See :class:`Backbone`."""
        return self(clip)[:, :, 1:].reshape(len(clip), *self.grid, -1)


class SimpleFeatures(Backbone):
    """Features that learn nothing, which every learned feature has to beat.

    * ``mean_frame``: the mean over time in 32 x 32 pixels; a token is its patch of the mean frame;
    * ``temporal_std``: the standard deviation over time, likewise;
    * ``pixel_pca``: 16 frames of 16 x 16 pixels, of which :class:`Features` keeps the first
      principal components of the first section; a token holds the pixels of its tubelet.

    Args:
        kind: one of the above.
        like: settings of the video encoder whose clips, patches and tubelets are used.
    """

    def __init__(self, kind: str, like: Mapping[str, Any]) -> None:
        super().__init__()
        self.kind, self.patch = kind, like["patch_size"]
        side = like["image_size"] // self.patch
        self.clip_shape = (3, like["num_frames"], like["image_size"], like["image_size"])
        self.tubelet_size = like["tubelet_size"]
        self.grid = (like["num_frames"] // self.tubelet_size, side, side)
        frames = self.tubelet_size if kind == "pixel_pca" else 1
        self.token_dim = frames * self.patch**2

    def _picture(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 1, H, W) mean or standard deviation over time."""
        grey = clip.mean(1)  # (B, T, H, W)
        value = grey.mean(1) if self.kind == "mean_frame" else grey.std(1)
        return value[:, None]

    @torch.no_grad()
    def embed(self, clip: Tensor) -> dict[str, Tensor]:
        """(B, 3, T, H, W) -> "cls", "mean" and "motion", each the same flattened picture."""
        if self.kind == "pixel_pca":
            small = F.adaptive_avg_pool3d(clip.mean(1, keepdim=True), (16, 16, 16))
        else:
            small = F.interpolate(self._picture(clip), (THUMBNAIL, THUMBNAIL), mode="area")
        flat = small.flatten(1)
        return {"cls": flat, "mean": flat, "motion": flat}

    @torch.no_grad()
    def tokens(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, t, h, w, token_dim)."""
        (t, h, w), p, u = self.grid, self.patch, self.tubelet_size
        if self.kind == "pixel_pca":
            x = clip.mean(1).reshape(-1, t, u, h, p, w, p).permute(0, 1, 3, 5, 2, 4, 6)
        else:
            x = self._picture(clip).reshape(-1, 1, h, p, w, p).permute(0, 1, 2, 4, 3, 5)
            x = x.expand(-1, t, -1, -1, -1, -1)
        return x.reshape(len(clip), t, h, w, -1)


def read_about(path: str | Path, expect: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a checkpoint and checks its description against what a config expects.

    Args:
        expect: settings of the video encoder or its clips that must hold, such as
            ``{"embed_dim": 384}``.

    Returns:
        The checkpoint's content, with "about" and "sha256" (16 digits of the file's hash).

    Raises:
        CheckpointError: if it has no description, or one that is not as expected.
    """
    state = read_checkpoint(path)
    name = Path(path).name
    about = state.get("about")
    if not about:
        raise CheckpointError(f"{name} does not say how its encoders are built: train anew")
    for key, value in (expect or {}).items():
        trained = about["video"].get(key, about["clip"].get(key))
        if trained != value:
            raise CheckpointError(
                f"{name} was trained with {key} {trained}, the config expects {value}: use the "
                "checkpoint that the config is for, or change expect"
            )
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {**state, "sha256": digest[:16]}


class EvaluatedEncoder:
    """An encoder together with how its clips are made, from one checkpoint.

    Attributes:
        module: :class:`FrozenEncoder` or :class:`SimpleFeatures`, on the device.
        clip: "stride", "duration", "pad_mode", "default_fps", "mean" and "std" of the training.
        sha256: the first 16 digits of the checkpoint's hash.
        training: how it was trained, as far as the checkpoint tells.
        branch: see below.
        prepare: (batch, device) -> normalised clips (B, 3, T, H, W), from uint8 under "image".

    Args:
        ckpt: last.pt or best.pt of a training.
        branch: one of BRANCHES; the simple ones take only the clips' settings from it.
        expect: see :func:`read_about`.
        device: where to run.

    Raises:
        CheckpointError, ValueError: with what to do.
    """

    def __init__(
        self,
        ckpt: str | Path,
        branch: str = "video_teacher",
        expect: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if branch not in BRANCHES:
            raise ValueError(f"branch {branch!r} must be one of {', '.join(BRANCHES)}")
        state = read_about(ckpt, expect)
        about = state["about"]
        self.branch, self.clip, self.sha256 = branch, dict(about["clip"]), state["sha256"]
        self.settings, self.training = about["video"], dict(about.get("training") or {})
        self.device = torch.device(device)
        if branch in SIMPLE:
            self.module: Backbone = SimpleFeatures(branch, about["video"])
        else:
            self.module = self._trained(state, Path(ckpt).name)
        self.module = self.module.to(self.device)
        self.prepare = PrepareClip(self.clip["mean"], self.clip["std"])

    def _trained(self, state: Mapping[str, Any], name: str) -> FrozenEncoder:
        settings = state["about"][self.branch.split("_")[0]]
        prefix = f"{self.branch}."
        weights = {
            k.removeprefix(prefix): v for k, v in state["network"].items() if k.startswith(prefix)
        }
        if settings is None or not weights:
            raise CheckpointError(
                f"{name} was trained without an image branch: use branch video_teacher"
            )
        encoder = VisionTransformer(**settings)
        load_strict(encoder, weights, name)
        return FrozenEncoder(encoder, self.settings["num_frames"])

    @property
    def image_size(self) -> int:
        """Side of a frame in pixels."""
        return int(self.settings["image_size"])

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return int(self.settings["num_frames"])

    @property
    def name(self) -> str:
        """The checkpoint's hash and the branch, for file names."""
        return f"{self.sha256[:8]}-{self.branch}"
