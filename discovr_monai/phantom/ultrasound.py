"""The ultrasound of the phantom: anatomy, scatterers, probe and image formation.

A field of complex scatterers is fixed to the tissue in material coordinates and scaled by the
tissue's echo strength. For each frame the polar (range x beam) samples look up their material
point (:meth:`Heart.material`), read the field there, add blood (which is renewed from frame to
frame), the leaflets and static clutter, and pass through a point spread function whose lateral
width grows away from the focus. The envelope is the modulus of the complex sum; it is weakened by
shadows and attenuation, compressed to decibels and scan-converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from discovr_monai.phantom.heart import Beat, Heart

RANGES, BEAMS = 224, 112
GRID = 512  # material grid, cells per side
BLOOD, BACKGROUND = 0.055, 0.5


@dataclass(frozen=True)
class Probe:
    """How one clip was taken; none of it depends on the label. Lengths in mm, angles in radians.

    Attributes:
        depth: of the image; half_angle: of the sector.
        apex: (lateral, depth) place of the heart's apex (fetal: of the ventricle's middle).
        tilt: rotation of the long axis away from the beam.
        foreshorten: drawn length over true length, 0.84..1.
        gain: in dB; dynamic_range: in dB; attenuation: dB left uncorrected over the depth.
        haze: strength of the near-field clutter; noise: of the electronic noise.
        drift: (amplitude in mm, period in s, phase) of the breathing.
        shadows: (S, 4): beam angle as share of the half angle, width, strength in dB, start depth.
        focus: depth of the narrowest beam as share of the depth.
        seed: of clutter and noise.
    """

    depth: float
    half_angle: float
    apex: tuple[float, float]
    tilt: float
    foreshorten: float
    gain: float
    dynamic_range: float
    attenuation: float
    haze: float
    noise: float
    drift: tuple[float, float, float]
    shadows: np.ndarray
    focus: float
    seed: int


def draw_probe(heart: Heart, rng: np.random.Generator) -> Probe:
    """Draw the nuisance of one clip; of the heart only its population and size are used."""
    p = heart.parameters
    scale = p.length / 84
    fetal = p.population == "fetal"
    foreshorten = 1 - 0.16 * rng.random() ** 2
    if fetal:
        depth = rng.uniform(58, 80)
        apex = (rng.normal(0, 3), depth * rng.uniform(0.5, 0.6))
        tilt = rng.uniform(-np.pi, np.pi)
    else:
        top = rng.uniform(13, 24) * scale
        depth = (top + foreshorten * heart.roof) * rng.uniform(1.02, 1.16)
        apex = (rng.normal(7, 5) * scale, top)
        tilt = rng.normal(-0.07, 0.11)
    count = int(rng.integers(0, 3))
    shadows = np.stack(
        [
            rng.choice((-1, 1), count) * rng.uniform(0.35, 1.0, count),
            rng.uniform(0.05, 0.16, count),
            rng.uniform(6, 20, count),
            rng.uniform(0.0, 0.35, count),
        ],
        axis=1,
    )
    return Probe(
        depth=float(depth),
        half_angle=float(np.deg2rad(rng.uniform(35, 44))),
        apex=(float(apex[0]), float(apex[1])),
        tilt=float(tilt),
        foreshorten=float(foreshorten),
        gain=float(rng.normal(0, 3.5)),
        dynamic_range=float(rng.uniform(46, 58)),
        attenuation=float(rng.uniform(0, 12)),
        haze=float(rng.uniform(0.2, 1.0)),
        noise=float(rng.uniform(0.005, 0.03)),
        drift=(float(rng.uniform(0, 2.5) * scale), float(rng.uniform(3, 5)), float(rng.random())),
        shadows=shadows,
        focus=float(rng.uniform(0.4, 0.65)),
        seed=int(rng.integers(2**31)),
    )


def anatomy(heart: Heart, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Label and echo strength of each material point.

    Args:
        heart: the heart.
        cell: grid spacing in mm.

    Returns:
        Labels (GRID, GRID) uint8 (0 background, 1 LV cavity, 2 LV myocardium, 3 left atrium) and
        echo strength (GRID, GRID) float32 (myocardium about 1); rows are y, columns x, the grid's
        middle is the middle of the long axis.
    """
    p = heart.parameters
    scale = p.length / 84
    axis = ((np.arange(GRID) - GRID // 2) * cell).astype(np.float32)
    x, y = axis[None, :], (axis + 0.5 * p.length)[:, None]
    rows = heart.rows(y)
    endo, epi, rv = heart.endo[rows], heart.epi[rows], heart.rv[rows]
    body = y <= p.length
    cavity = (np.abs(x) < endo) & body & (y > 0)
    muscle = (np.abs(x) < epi) & body & (y > -heart.cap) & ~cavity

    base = float(heart.epi[heart.rows(np.asarray(p.length, np.float32))])
    left = _chamber(x, y, 1.5 * scale, 1.02 * p.width, p.length, heart.roof)
    right_middle = -base - 0.5 * p.rv_width - 2 * scale
    right = _chamber(x, y, right_middle, 0.68 * p.rv_width, 0.96 * p.length, heart.roof - 3 * scale)
    level = 0.96 * p.length
    ventricle = (x < -epi) & (x > -epi - rv) & (y < level) & ~muscle & (rv > 1.5 * scale)
    blood = cavity | left | right | ventricle
    near = ndimage.distance_transform_edt(~blood).astype(np.float32) * cell
    wall = ~blood & ~muscle & (near < 2.6 * scale)
    rv_wall = ~blood & ~muscle & (near < 4.0 * scale) & (y < level) & (x < 0)
    organ = ndimage.binary_closing(blood | muscle | wall | rv_wall, iterations=3)
    outside = ndimage.distance_transform_edt(~organ).astype(np.float32) * cell
    rng = np.random.default_rng(p.texture_seed)
    blotch = ndimage.gaussian_filter(
        rng.standard_normal((GRID, GRID), dtype=np.float32), 7.0 * scale / cell, truncate=2.5
    )
    blotch /= blotch.std()
    strength = BACKGROUND * np.exp(0.55 * blotch).astype(np.float32)
    strength[organ] = 0.9
    strength[muscle] = np.exp(0.18 * blotch[muscle])
    strength[wall] = 1.0
    strength[rv_wall] = 1.0
    fluid = outside <= p.effusion * np.clip((y - 0.05 * p.length) / (0.3 * p.length), 0.25, 1)
    fluid = fluid & ~organ & (y < 1.08 * p.length) & (p.effusion > 0)
    beyond = outside - np.where(y < 1.08 * p.length, p.effusion, 0)
    sac = ~organ & ~fluid & (beyond < 3.0 * scale)
    strength[sac] = 1.5 + 0.9 * np.clip(y / p.length, 0, 1).repeat(GRID, 1)[sac]
    strength[blood | fluid] = 0.0
    edge = muscle & (near < 1.3 * scale)
    strength[edge] *= 1.35
    rings = ((np.abs(x) - (endo + 1.5 * scale)) ** 2 + (y - p.length) ** 2) < (3.2 * scale) ** 2
    strength[rings & ~cavity] = 1.9
    labels = cavity + 2 * muscle.astype(np.uint8) + 3 * (left & ~cavity & ~muscle)
    return labels.astype(np.uint8), ndimage.gaussian_filter(strength, 0.6)


def _chamber(
    x: np.ndarray, y: np.ndarray, middle: float, half: float, top: float, bottom: float
) -> np.ndarray:
    """Where an atrium lies: from ``top`` to ``bottom``, at most ``half`` to each side, in mm."""
    share = (y - top) / (bottom - top)
    belly = np.where(share < 0.45, (0.45 - share) / 0.66, (share - 0.45) / 0.55)
    wide = half * np.sqrt(np.maximum(1 - belly**2, 0))
    return (np.abs(x - middle) < wide) & (share > 0) & (share < 1)


def complex_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Circular complex white noise of unit power, complex64."""
    noise = rng.standard_normal((*shape, 2), dtype=np.float32) * np.float32(np.sqrt(0.5))
    return noise.view(np.complex64)[..., 0]


def sample_field(field: np.ndarray, column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Read a (GRID, GRID) field between its cells, keeping the variance of white noise.

    Args:
        field: complex64, taken as periodic.
        column, row: float32 places in cells, any shape.

    Returns:
        complex64 of the places' shape.
    """
    left, top = np.floor(column), np.floor(row)
    u, v = column - left, row - top
    j, i = left.astype(np.int32) & (GRID - 1), top.astype(np.int32) & (GRID - 1)
    j2, i2 = (j + 1) & (GRID - 1), ((i + 1) & (GRID - 1)) * GRID
    i *= GRID
    flat = field.ravel()
    upper = flat[i + j] * (1 - u) + flat[i + j2] * u
    lower = flat[i2 + j] * (1 - u) + flat[i2 + j2] * u
    power = ((1 - u) ** 2 + u * u) * ((1 - v) ** 2 + v * v)
    return np.asarray((upper * (1 - v) + lower * v) / np.sqrt(power))


class PointSpread:
    """A separable complex blur, normalised to keep the power of white noise.

    Args:
        focus: depth of the narrowest beam as share of the depth.
        axial: Gaussian sigma in range samples.
    """

    def __init__(self, focus: float, axial: float = 1.25) -> None:
        share = (np.arange(RANGES) + 0.5) / RANGES
        sigma = 1.15 + 1.3 * np.abs(share - focus) + 0.35 * share  # beams
        taps = np.arange(-4, 5)
        lateral = np.exp(-0.5 * (taps / sigma[:, None]) ** 2)
        lateral /= np.sqrt((lateral**2).sum(axis=1, keepdims=True))
        self.lateral = lateral.astype(np.float32)
        pulse = np.exp(-0.5 * (np.arange(-3, 4) / axial) ** 2)
        self.axial = (pulse / np.sqrt((pulse**2).sum())).astype(np.float32)

    def __call__(self, field: np.ndarray) -> np.ndarray:
        """Blur a (RANGES, BEAMS) complex64 field."""
        return _taps(_taps(field, self.axial[:, None, None], 0), self.lateral.T[:, :, None], 1)


def _taps(field: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Sum of shifted copies; weights (taps, rows or 1, 1)."""
    half, size = len(weights) // 2, field.shape[axis]
    width = [(0, 0), (0, 0)]
    width[axis] = (half, half)
    padded = np.pad(field, width, mode="reflect")
    cut = (slice(None),) * axis
    total = padded[(*cut, slice(0, size))] * weights[0]
    for tap in range(1, len(weights)):
        total += padded[(*cut, slice(tap, tap + size))] * weights[tap]
    return total


class Scanner:
    """Sees one heart through one probe.

    Args:
        heart, probe: what and how.
        beat: the clip's timing.
        size: side of the square image in pixels.
    """

    def __init__(self, heart: Heart, probe: Probe, beat: Beat, size: int) -> None:
        self.heart, self.probe, self.beat, self.size = heart, probe, beat, size
        self.activation = heart.activation(beat.filling)
        self.cell = probe.depth / 230
        self.pixel = probe.depth / (0.975 * size)  # mm
        self.labels, strength = anatomy(heart, self.cell)
        rng = np.random.default_rng(heart.parameters.texture_seed + 1)
        scatterers = complex_noise(rng, (GRID, GRID))
        self.field = strength * scatterers
        self.leaflet_field = scatterers
        self.blur = PointSpread(probe.focus)
        self._polar()
        self._raster()

    def _polar(self) -> None:
        ranges = ((np.arange(RANGES) + 0.5) / RANGES * self.probe.depth).astype(np.float32)
        angles = np.linspace(-1, 1, BEAMS, dtype=np.float32) * self.probe.half_angle
        self.ranges, self.angles = ranges, angles
        lateral, deep = ranges[:, None] * np.sin(angles), ranges[:, None] * np.cos(angles)
        self.polar_x, self.polar_y = self.to_heart(lateral, deep)
        self.fall = self._attenuation()

    def _attenuation(self) -> np.ndarray:
        """(RANGES, BEAMS) factor for gain, uncorrected attenuation, edges and shadows."""
        p = self.probe
        share, beam = self.ranges[:, None] / p.depth, self.angles[None] / p.half_angle
        loss = p.attenuation * share - p.gain + 5 * np.abs(beam) ** 4
        for centre, width, strength, start in p.shadows:
            onset = np.clip((share - start) / 0.15, 0, 1)
            loss = loss + strength * np.exp(-0.5 * ((beam - centre) / width) ** 2) * onset
        return (10 ** (-loss / 20)).astype(np.float32)

    def _raster(self) -> None:
        """Bilinear weights of the scan conversion and the heart-frame place of each pixel."""
        p = self.probe
        steps = (np.arange(self.size) + 0.5).astype(np.float32)
        lateral = ((steps - self.size / 2) * self.pixel)[None, :]
        deep = ((steps - 0.0125 * self.size) * self.pixel)[:, None]
        distance, angle = np.hypot(lateral, deep), np.arctan2(lateral, deep)
        self.sector = (np.abs(angle) <= p.half_angle) & (distance <= p.depth) & (deep > 0)
        self.pixel_x, self.pixel_y = self.to_heart(lateral, deep)
        row = np.clip(distance / p.depth * RANGES - 0.5, 0, RANGES - 1.001)[self.sector]
        column = (angle / p.half_angle + 1) / 2 * (BEAMS - 1)
        column = np.clip(column, 0, BEAMS - 1.001)[self.sector]
        i, j = row.astype(np.int32), column.astype(np.int32)
        u, v = (column - j).astype(np.float32), (row - i).astype(np.float32)
        corner = i * BEAMS + j
        self._corners = np.stack([corner, corner + 1, corner + BEAMS, corner + BEAMS + 1])
        self._weights = np.stack([(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v])

    def _pivot(self) -> float:
        """The heart-frame y that the probe's ``apex`` names."""
        p = self.heart.parameters
        return 0.75 * p.length if p.population == "fetal" else -self.heart.cap

    def to_heart(self, lateral: np.ndarray, deep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heart-frame coordinates (without breathing) of places in the probe's frame, mm."""
        p = self.probe
        dx, dy = lateral - p.apex[0], deep - p.apex[1]
        c, s = np.cos(p.tilt), np.sin(p.tilt)
        x, y = c * dx + s * dy, (-s * dx + c * dy) / p.foreshorten + self._pivot()
        return x.astype(np.float32), y.astype(np.float32)

    def to_pixels(self, x: np.ndarray, y: np.ndarray, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Image coordinates (column, row; pixel centres are whole numbers) of heart places."""
        p = self.probe
        x, y = x + self.drift(frame)[0], y + self.drift(frame)[1]
        c, s = np.cos(p.tilt), np.sin(p.tilt)
        y = (y - self._pivot()) * p.foreshorten
        lateral, deep = c * x - s * y + p.apex[0], s * x + c * y + p.apex[1]
        column = lateral / self.pixel + self.size / 2 - 0.5
        return column, deep / self.pixel + 0.0125 * self.size - 0.5

    def drift(self, frame: int) -> tuple[float, float]:
        """Breathing shift of the heart in the heart frame, mm."""
        size, period, start = self.probe.drift
        wave = size * np.sin(2 * np.pi * (frame / self.beat.fps / period + start))
        return 0.4 * float(wave), float(wave)

    def material(self, frame: int, polar: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Material coordinates in mm of the image's pixels, or of the polar samples."""
        x, y = (self.polar_x, self.polar_y) if polar else (self.pixel_x, self.pixel_y)
        dx, dy = self.drift(frame)
        return self.heart.material(x - np.float32(dx), y - np.float32(dy), self.activation[frame])

    def cells(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(column, row) in the material grid of material points in mm."""
        middle = 0.5 * self.heart.parameters.length
        scale = np.float32(1 / self.cell)
        return x * scale + GRID // 2, (y - np.float32(middle)) * scale + GRID // 2

    def mask(self, frame: int) -> np.ndarray:
        """(size, size) uint8 labels of a frame, 0 outside the sector."""
        column, row = self.cells(*self.material(frame))
        j = np.clip(np.rint(column).astype(np.int32), 0, GRID - 1)
        i = np.clip(np.rint(row).astype(np.int32), 0, GRID - 1)
        return np.asarray(self.labels[i, j] * self.sector)

    def _leaflets(self, frame: int) -> np.ndarray:
        """(RANGES, BEAMS) echo strength of the mitral and tricuspid leaflets."""
        heart, p = self.heart, self.heart.parameters
        dx, dy = self.drift(frame)
        x, y = self.polar_x - np.float32(dx), self.polar_y - np.float32(dy)
        opening = float(self.beat.opening[frame])
        ring = heart.contour(self.activation[frame], np.array([0.99]))[0]
        base = heart.mitral(self.activation[frame])
        rv_left = ring[1] - p.wall - 0.85 * p.rv_width
        rv_right = ring[1] - p.wall
        hinges = [(ring[1], 1.0, ring[2]), (ring[2], -1.0, ring[2])]
        half = 0.5 * (rv_right - rv_left)
        hinges += [(rv_left, 1.0, half), (rv_right, -1.0, half)]
        total = np.zeros_like(x)
        thick = np.float32(1.1 * p.length / 84)
        for place, way, reach in hinges:
            swing = 0.18 + 1.1 * opening
            long = reach * (1.0 - 0.1 * opening)
            ex, ey = way * long * np.cos(swing), -long * np.sin(swing)
            ax, ay = x - np.float32(place), y - np.float32(base)
            along = np.clip((ax * ex + ay * ey) / (ex * ex + ey * ey), 0, 1)
            gap = (ax - along * ex) ** 2 + (ay - along * ey) ** 2
            total += np.exp(gap * (-0.5 / thick**2))
        return total

    def cine(self) -> np.ndarray:
        """(T, size, size) uint8 frames, 0 outside the sector."""
        p, frames = self.probe, len(self.activation)
        rng = np.random.default_rng(p.seed)
        pool = complex_noise(rng, (RANGES * 3, BEAMS * 2))
        share = self.ranges[:, None] / p.depth
        haze = p.haze * (1.6 * np.exp(-share / 0.07) + 0.07) * complex_noise(rng, (RANGES, BEAMS))
        hiss = (p.noise * (0.25 + 1.5 * share**2)).astype(np.float32)
        corners = rng.integers(0, (RANGES * 2, BEAMS), (2, frames, 2))
        blood = complex_noise(rng, (RANGES, BEAMS))
        out = np.zeros((frames, self.size, self.size), np.uint8)
        for t in range(frames):
            fresh, noise = (pool[i : i + RANGES, j : j + BEAMS] for i, j in corners[:, t])
            blood = np.float32(0.6) * blood + np.float32(0.8) * fresh
            column, row = self.cells(*self.material(t, polar=True))
            echo = sample_field(self.field, column, row)
            echo += (np.float32(1.1) * self._leaflets(t)) * blood
            echo += np.float32(BLOOD) * blood + haze
            envelope = np.abs(self.blur(echo) * self.fall + noise * hiss)
            out[t][self.sector] = self._display(envelope)
        return out

    def _display(self, envelope: np.ndarray) -> np.ndarray:
        """Compress a (RANGES, BEAMS) envelope and scan-convert it: (sector pixels,) uint8."""
        decibels = 20 * np.log10(envelope + np.float32(1e-6))
        grey = np.clip((decibels - 9) / self.probe.dynamic_range + 1, 0, 1).ravel()
        grey = (grey[self._corners] * self._weights).sum(axis=0)
        return np.asarray(np.rint(255 * grey**1.6), np.uint8)
