"""Augmentation for ultrasound: what another hand, probe or knob would have made of a clip.

MONAI dictionary transforms on (C, T, H, W) uint8 clips. One draw holds for all frames of a clip.
Depth runs from the top; the apex is taken to be the middle of the top edge, where sector
isolation puts it. Label maps under ``mask_keys`` (C, T, H, W) follow every change of place and
time. The paper uses none of these.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import Compose, MapTransform, RandomizableTransform
from torch import Tensor


class _ClipTransform(RandomizableTransform, MapTransform):
    """Draws parameters once per call, changes the images by them and moves the masks alike.

    Args:
        strength: 0 changes nothing; what more means is up to the subclass.
        limit: the largest strength that makes sense.
        keys: of (C, T, H, W) uint8 clips.
        mask_keys: of (C, T, H, W) label maps; keys that a row lacks are passed over.
        prob: how often a clip is changed at all, 0..1.
    """

    def __init__(
        self,
        strength: float,
        limit: float,
        keys: KeysCollection = "image",
        mask_keys: Sequence[str] = ("mask",),
        prob: float = 1.0,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if not 0 <= strength <= limit:
            kind = type(self).__name__
            raise ValueError(f"{kind}: strength {strength} must lie in 0..{limit:g}")
        self.strength, self.mask_keys = float(strength), tuple(mask_keys)

    def draw(self, clip: Tensor) -> Any:
        """This call's parameters, from ``self.R``."""
        raise NotImplementedError

    def image(self, clip: Tensor, drawn: Any) -> Tensor:
        """(C, T, H, W) uint8 to the same."""
        raise NotImplementedError

    def mask(self, labels: Tensor, drawn: Any) -> Tensor:
        """(C, T, H, W) labels, moved like the image."""
        return labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        row = dict(data)
        self.randomize(None)
        if not self._do_transform or not self.strength:
            return row
        drawn = None
        for key in self.key_iterator(row):
            clip = torch.as_tensor(row[key])
            drawn = self.draw(clip) if drawn is None else drawn
            row[key] = self.image(clip, drawn)
        for key in self.mask_keys:
            # a datalist's own "mask" is a file's name until something has loaded it
            if drawn is not None and isinstance(row.get(key), Tensor | np.ndarray):
                row[key] = self.mask(torch.as_tensor(row[key]), drawn)
        return row


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).byte()


def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """(H, W) sideways in -1..1 and depth in 0..2, both in units of half the width."""
    y = (torch.arange(height) + 0.5) * 2 / width
    x = (torch.arange(width) + 0.5) * 2 / width - 1
    return x[None, :].expand(height, width), y[:, None].expand(height, width)


def _polar(height: int, width: int) -> tuple[Tensor, Tensor]:
    """(H, W) angle from straight down in radians and distance from the apex."""
    x, y = _places(height, width)
    return torch.atan2(x, y), torch.hypot(x, y)


def _warp(clip: Tensor, scale: float, angle: float, mode: str) -> Tensor:
    """Zooms by ``scale`` and turns by ``angle`` (radians) about the apex."""
    height, width = clip.shape[-2:]
    x, y = _places(height, width)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    source_x, source_y = cos * x + sin * y, -sin * x + cos * y
    grid = torch.stack([source_x, source_y * width / height - 1], -1)  # grid_sample's -1..1
    flat = clip.flatten(0, 1)[:, None].float()  # (C T, 1, H, W)
    grid = grid.expand(len(flat), -1, -1, -1).float()
    moved = F.grid_sample(flat, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return moved[:, 0].unflatten(0, clip.shape[:2])


class RandSectorRotated(_ClipTransform):
    """Turns the whole sector about its apex, as another placement on the screen would.

    Args:
        strength: largest angle in degrees, 0..45.
        keys, mask_keys, prob: see the module.
    """

    def __init__(self, strength: float = 10.0, **options: Any) -> None:
        super().__init__(strength, 45, **options)

    def draw(self, clip: Tensor) -> float:
        """Radians."""
        return float(np.deg2rad(self.R.uniform(-self.strength, self.strength)))

    def image(self, clip: Tensor, drawn: float) -> Tensor:
        return _bytes(_warp(clip, 1.0, drawn, "bilinear"))

    def mask(self, labels: Tensor, drawn: float) -> Tensor:
        return _warp(labels, 1.0, drawn, "nearest").to(labels.dtype)


class RandTiltd(RandSectorRotated):
    """Turns the anatomy about the apex under a sector that stays, as rocking the probe does."""

    def image(self, clip: Tensor, drawn: float) -> Tensor:
        sector = (clip > 0).any(1, keepdim=True)
        return super().image(clip, drawn) * sector


class RandDepthd(_ClipTransform):
    """Another imaging depth: zooms about the apex.

    Args:
        strength: s draws a factor of 1 / (1 + s) to 1 + s, log-uniform; 0..1.
    """

    def __init__(self, strength: float = 0.2, **options: Any) -> None:
        super().__init__(strength, 1, **options)

    def draw(self, clip: Tensor) -> float:
        """The factor on sizes."""
        return float(np.exp(self.R.uniform(-1, 1) * np.log1p(self.strength)))

    def image(self, clip: Tensor, drawn: float) -> Tensor:
        return _bytes(_warp(clip, drawn, 0.0, "bilinear"))

    def mask(self, labels: Tensor, drawn: float) -> Tensor:
        return _warp(labels, drawn, 0.0, "nearest").to(labels.dtype)


class RandGaind(_ClipTransform):
    """Gain and time gain compensation: a smooth curve over depth is added to what is not black.

    Args:
        strength: largest change as share of the grey scale (images are logarithmic, so a gain
            in dB adds), 0..1.
    """

    def __init__(self, strength: float = 0.15, **options: Any) -> None:
        super().__init__(strength, 1, **options)

    def draw(self, clip: Tensor) -> np.ndarray:
        """(4,) shifts at 0, 1/3, 2/3 and all of the depth."""
        return self.R.uniform(-self.strength, self.strength, 4)

    def image(self, clip: Tensor, drawn: np.ndarray) -> Tensor:
        height, width = clip.shape[-2:]
        depth = _polar(height, width)[1].numpy() / 2
        curve = np.interp(depth, np.linspace(0, 1, 4), drawn)
        shift = torch.from_numpy(255 * curve).float()
        return _bytes(clip + shift * (clip > 0))


class RandSpeckled(_ClipTransform):
    """Speckle drawn anew: a grainy field that stays with the image multiplies it.

    Args:
        strength: relative deviation of the field, 0..1.
    """

    def __init__(self, strength: float = 0.2, **options: Any) -> None:
        super().__init__(strength, 1, **options)

    def draw(self, clip: Tensor) -> Tensor:
        """(H, W) factors."""
        height, width = clip.shape[-2:]
        noise = torch.from_numpy(self.R.standard_normal((1, 1, height + 2, width + 2))).float()
        smooth = F.avg_pool2d(noise, 3, stride=1)[0, 0] * 3  # unit deviation, grains of 3 pixels
        return (1 + self.strength * smooth).clamp(min=0)

    def image(self, clip: Tensor, drawn: Tensor) -> Tensor:
        return _bytes(clip * drawn)


class RandHazed(_ClipTransform):
    """Near-field clutter that stands still: brightens what is not black, most at the top.

    Args:
        strength: largest share of the way to white, 0..1.
    """

    def __init__(self, strength: float = 0.3, **options: Any) -> None:
        super().__init__(strength, 1, **options)

    def draw(self, clip: Tensor) -> tuple[float, float, Tensor]:
        """Share, reach as share of the depth, (h, w) coarse pattern."""
        pattern = torch.from_numpy(self.R.uniform(0.4, 1.0, (1, 1, 6, 6))).float()
        return float(self.R.uniform(0, self.strength)), float(self.R.uniform(0.15, 0.6)), pattern

    def image(self, clip: Tensor, drawn: tuple[float, float, Tensor]) -> Tensor:
        share, reach, pattern = drawn
        height, width = clip.shape[-2:]
        field = F.interpolate(pattern, (height, width), mode="bicubic")[0, 0].clamp(0, 1)
        depth = _polar(height, width)[1] / 2
        veil = share * field * torch.exp(-depth / reach)
        sector = (clip > 0).any(1, keepdim=True)
        return _bytes(clip + veil * (255 - clip.float()) * sector)


class RandShadowd(_ClipTransform):
    """A rib's or the lung's shadow: a beam that fades from some depth on.

    Args:
        strength: largest share of the brightness that is lost, 0..1.
    """

    def __init__(self, strength: float = 0.7, **options: Any) -> None:
        super().__init__(strength, 1, **options)

    def draw(self, clip: Tensor) -> tuple[float, float, float, float]:
        """Loss, angle, width, first depth."""
        return (
            float(self.R.uniform(0.3, 1) * self.strength),
            float(self.R.uniform(-0.7, 0.7)),
            float(self.R.uniform(0.05, 0.2)),
            float(self.R.uniform(0, 1)),
        )

    def image(self, clip: Tensor, drawn: tuple[float, float, float, float]) -> Tensor:
        loss, centre, width, start = drawn
        angle, distance = _polar(*clip.shape[-2:])
        beam = torch.exp(-0.5 * ((angle - centre) / width) ** 2)
        onset = ((distance - start) / 0.2).clamp(0, 1)
        return _bytes(clip * (1 - loss * beam * onset))


class RandFanCutoutd(_ClipTransform):
    """Blackens one piece of the fan: a range of angles and of depths.

    Args:
        strength: largest share of the angles and of the depths, 0..1.
    """

    def __init__(self, strength: float = 0.3, **options: Any) -> None:
        super().__init__(strength, 1, **options)

    def draw(self, clip: Tensor) -> tuple[float, float, float, float]:
        """First and last angle (radians), first and last distance."""
        wide, deep = self.R.uniform(0.3, 1, 2) * self.strength
        first, top = self.R.uniform(-0.75, 0.75 - 1.5 * wide), self.R.uniform(0.2, 2 - 1.8 * deep)
        return float(first), float(first + 1.5 * wide), float(top), float(top + 1.8 * deep)

    def image(self, clip: Tensor, drawn: tuple[float, float, float, float]) -> Tensor:
        low, high, near, far = drawn
        angle, distance = _polar(*clip.shape[-2:])
        piece = (angle >= low) & (angle <= high) & (distance >= near) & (distance <= far)
        return clip * ~piece


class RandReversed(_ClipTransform):
    """Runs the clip backwards.

    Args:
        strength: how often, 0..1.
    """

    def __init__(self, strength: float = 0.5, **options: Any) -> None:
        super().__init__(strength, 1, prob=strength, **options)

    def draw(self, clip: Tensor) -> bool:
        """Nothing more to draw."""
        return True

    def image(self, clip: Tensor, drawn: bool) -> Tensor:
        return clip.flip(1)

    def mask(self, labels: Tensor, drawn: bool) -> Tensor:
        return labels.flip(1)


AUGMENTATIONS = {
    "rotation": RandSectorRotated,
    "tilt": RandTiltd,
    "depth": RandDepthd,
    "gain": RandGaind,
    "speckle": RandSpeckled,
    "haze": RandHazed,
    "shadow": RandShadowd,
    "cutout": RandFanCutoutd,
    "reverse": RandReversed,
}


def ultrasound_augmentation(
    strengths: Mapping[str, float], keys: KeysCollection = "image"
) -> Compose:
    """The transforms whose strength is above 0, in a fixed order.

    Args:
        strengths: by name, see ``AUGMENTATIONS``.
        keys: of the clips.

    Raises:
        ValueError: for an unknown name or a senseless strength.
    """
    unknown = sorted(set(strengths) - set(AUGMENTATIONS))
    if unknown:
        names = ", ".join(AUGMENTATIONS)
        raise ValueError(f"augmentation {unknown[0]!r} is unknown; there are {names}")
    chosen = [
        kind(strengths[name], keys=keys)
        for name, kind in AUGMENTATIONS.items()
        if strengths.get(name)
    ]
    return Compose(chosen)
