"""The heart of the phantom: who it belongs to, how it is built and how it moves.

Everything lives in the *heart frame*: millimetres, ``y`` along the left ventricle's long axis
(0 at the endocardial apex of the reference shape, growing towards the base), ``x`` across it
(negative on the septal side). The reference shape is end diastole. A beat is an analytic
deformation with one parameter, the activation ``a`` in 0 (end diastole) .. 1 (end systole):

* along the axis everything between the epicardial apex (fixed) and the mitral plane shrinks by
  ``stretch = 1 - eps_l * a`` and the atria are drawn out to fill the gap;
* across the axis the endocardium at level ``Y`` goes to ``r = r0 * (1 - eps_r * w(Y) * a)`` and the
  wall follows so that its volume of revolution is conserved:
  ``R^2 - r0^2 = (rho^2 - r^2) * stretch``.

The inverse of this map gives each place in space its material point, which is what carries the
scatterers in :mod:`discovr_monai.phantom.ultrasound`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.interpolate import PchipInterpolator

POPULATIONS = ("adult", "paediatric", "fetal")
KINDS = ("normal", "reduced_ef", "dilated", "hypertrophy", "akinetic", "effusion")
DISCS = 20
_TABLE_STEP = 0.002  # of the long axis
_BELLY = 0.62  # where along the long axis the ventricle is widest
# EchoNet-Dynamic's EF distribution: mean 55.8, sd 12.4, 9.4 % under 35, 22.4 % under 50.
_EF_QUANTILES = (
    (0.0, 0.02, 0.0945, 0.126, 0.224, 0.306, 0.50, 0.75, 0.90, 0.975, 1.0),
    (10.0, 20.0, 35.0, 40.0, 50.0, 55.0, 59.3, 63.8, 67.5, 72.5, 80.0),
)


@dataclass(frozen=True)
class HeartParameters:
    """One patient's heart; lengths in mm at end diastole.

    Attributes:
        population, kind: see POPULATIONS and KINDS.
        ef: ejection fraction in percent, 10..80.
        heart_rate: beats per minute.
        length, width: of the LV cavity: long axis, half-width at the belly.
        wall: myocardial thickness at the belly; atrium: length of the left atrium.
        rv_width: widest distance from the septum to the RV free wall.
        effusion: thickness of the pericardial fluid, 0 without.
        akinetic: (side, level, half-height): side -1 septal or +1 lateral, level and height as
            shares of the long axis; side 0 without.
        texture_seed: seed of the scatterers.
    """

    population: str
    kind: str
    ef: float
    heart_rate: float
    length: float
    width: float
    wall: float
    atrium: float
    rv_width: float
    effusion: float
    akinetic: tuple[int, float, float]
    texture_seed: int

    @property
    def label(self) -> int:
        """0 normal, 1 abnormal (a kind other than normal, or EF under 50)."""
        return int(self.kind != "normal" or self.ef < 50)


def _kind_for(ef: float, rng: np.random.Generator) -> str:
    """A kind that fits an EF: normal hearts have an EF of 50 or more."""
    if ef < 50:
        return str(rng.choice(("reduced_ef", "dilated", "akinetic"), p=(0.5, 0.25, 0.25)))
    kinds = ("normal", "hypertrophy", "effusion", "akinetic")
    return str(rng.choice(kinds, p=(0.76, 0.09, 0.09, 0.06)))


def draw_heart(
    rng: np.random.Generator, population: str | None = None, kind: str | None = None
) -> HeartParameters:
    """Draw a heart; the EF of undirected draws follows EchoNet-Dynamic.

    Args:
        rng: source of chance.
        population, kind: fix these (EF is then drawn conditionally on the kind).

    Returns:
        The heart's parameters.
    """
    if population is not None and population not in POPULATIONS:
        raise ValueError(f"unknown population {population!r}; use one of {POPULATIONS}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; use one of {KINDS}")
    drawn = str(rng.choice(POPULATIONS, p=(0.6, 0.25, 0.15)))
    population = population or drawn
    while True:  # a fixed kind keeps the joint law of EF and kind
        ef = float(np.interp(rng.random(), *_EF_QUANTILES))
        drawn_kind = _kind_for(ef, rng)
        if kind in (None, drawn_kind):
            break
    scale, rate = {
        "adult": (rng.normal(1.0, 0.06), rng.normal(70, 12)),
        "paediatric": (rng.uniform(0.45, 0.85), rng.normal(98, 14)),
        "fetal": (rng.uniform(0.24, 0.32), rng.normal(142, 9)),
    }[population]
    limits = {"adult": (48, 105), "paediatric": (65, 140), "fetal": (115, 170)}[population]
    length, width = rng.normal(84, 4), rng.normal(23.5, 1.6)
    wall, effusion, akinetic = rng.normal(9.5, 0.9), 0.0, (0, 0.0, 0.0)
    length *= 1 + 0.002 * (55 - min(ef, 55))  # weak hearts dilate a little
    width *= 1 + 0.004 * (55 - min(ef, 55))
    extremes = rng.uniform(0, 1, 4)
    if drawn_kind == "dilated":
        width, length, wall = width * (1.18 + 0.2 * extremes[0]), length * 1.06, wall * 0.9
    elif drawn_kind == "hypertrophy":
        wall, width = wall * (1.45 + 0.5 * extremes[0]), width * 0.9
    elif drawn_kind == "effusion":
        effusion = 7 + 9 * extremes[0]
    elif drawn_kind == "akinetic":
        side = 1 if extremes[3] < 0.5 else -1
        akinetic = (side, 0.3 + 0.4 * extremes[1], 0.14 + 0.1 * extremes[2])
    return HeartParameters(
        population=population,
        kind=drawn_kind,
        ef=ef,
        heart_rate=float(np.clip(rate, *limits)),
        length=float(length * scale),
        width=float(width * scale),
        wall=float(np.clip(wall, 7, 20) * scale),
        atrium=float(rng.normal(46, 4) * scale),
        rv_width=float(rng.normal(30, 3) * scale),
        effusion=float(effusion * scale),
        akinetic=akinetic,
        texture_seed=int(rng.integers(2**31)),
    )


def _bullet(share: np.ndarray) -> np.ndarray:
    """Half-width, 0..1, of a truncated ellipse at shares 0 (apex) .. 1 (base) of its axis."""
    return np.sqrt(np.maximum(1 - ((np.clip(share, 0, 1) - _BELLY) / _BELLY) ** 2, 0))


def _smooth(value: np.ndarray) -> np.ndarray:
    """Smoothstep: 0 below 0, 1 above 1."""
    value = np.clip(value, 0, 1)
    return value * value * (3 - 2 * value)


class Heart:
    """Geometry and motion of one heart (see the module's text for the frame and the map)."""

    def __init__(self, parameters: HeartParameters) -> None:
        self.parameters = p = parameters
        self.cap = 0.8 * p.wall  # apical thickness, mm
        self.roof = p.length + p.atrium
        self.step = _TABLE_STEP * p.length
        self.far = 0.3 * p.length  # motion outside the heart dies out over this distance
        self._origin = -self.cap - self.far
        levels = np.arange(self._origin, self.roof + self.far, self.step)
        self.levels = levels.astype(np.float32)
        inside = (levels >= 0) * _bullet(levels / p.length)
        outside = (levels >= -self.cap) * _bullet((levels + self.cap) / (p.length + self.cap))
        self.endo = (p.width * inside).astype(np.float32)
        self.epi = np.maximum((p.width + p.wall) * outside, self.endo).astype(np.float32)
        climb = np.clip((levels / p.length - 0.22) / 0.62, 0, 1)
        self.rv = (p.rv_width * climb**0.75).astype(np.float32)
        fade = 1 - _smooth((levels - 0.85 * p.length) / (0.15 * p.length + 0.3 * p.atrium)) * 1.0
        self._activity = np.stack([fade, fade]).astype(np.float32)  # septal, lateral
        side, level, height = p.akinetic
        if side:
            scar = np.exp(-0.5 * (np.abs(levels / p.length - level) / height) ** 4)
            self._activity[(side + 1) // 2] *= 1 - 0.97 * scar
        self._beyond = _smooth((levels - p.length) / (0.25 * p.atrium))
        self._eps_l = 0.28 * p.ef / 100
        self._eps_r = self._solve_radial()

    def _volumes(self, activation: np.ndarray, eps_r: float) -> np.ndarray:
        """(A,) volumes in mL by 20 discs, for (A,) activations."""
        p = self.parameters
        rows = self.rows((np.arange(DISCS) + 0.5) / DISCS * p.length)
        shrink = 1 - eps_r * activation[:, None, None] * self._activity[:, rows]
        diameters = (self.endo[rows] * shrink).sum(axis=1)
        length = p.length * (1 - self._eps_l * activation)
        return np.pi / 4 * (diameters**2).sum(axis=1) * length / DISCS / 1000

    def _solve_radial(self) -> float:
        """The radial shortening that gives the wanted EF (bisection)."""
        low, high = 0.0, 0.98
        ends = np.array([0.0, 1.0])
        for _ in range(50):
            middle = 0.5 * (low + high)
            full, empty = self._volumes(ends, middle)
            if 100 * (1 - empty / full) < self.parameters.ef:
                low = middle
            else:
                high = middle
        return 0.5 * (low + high)

    def rows(self, level: np.ndarray) -> np.ndarray:
        """Indices into the level tables for material levels in mm."""
        index = ((level - self._origin) * (1 / self.step) + 0.5).astype(np.int32)
        return np.clip(index, 0, len(self.levels) - 1)

    def volumes(self, activation: np.ndarray) -> np.ndarray:
        """(A,) volumes in mL of the drawn cavity for (A,) activations 0..1."""
        return self._volumes(np.asarray(activation, np.float64), self._eps_r)

    @cached_property
    def _activation_table(self) -> tuple[np.ndarray, np.ndarray]:
        activation = np.linspace(0, 1, 257)
        return self.volumes(activation)[::-1], activation[::-1]

    def activation(self, filling: np.ndarray) -> np.ndarray:
        """(T,) activations that give (T,) fillings: 0 at end systole, 1 at end diastole."""
        volumes, activation = self._activation_table
        wanted = volumes[0] + filling * (volumes[-1] - volumes[0])
        return np.interp(wanted, volumes, activation)

    def stretch(self, activation: float) -> float:
        """Length of the long axis relative to end diastole."""
        return 1 - self._eps_l * activation

    def mitral(self, activation: float) -> float:
        """Where the mitral plane stands now, y in mm."""
        return -self.cap + (self.parameters.length + self.cap) * self.stretch(activation)

    def contour(self, activation: float, share: np.ndarray) -> np.ndarray:
        """(S, 3): y, septal x and lateral x in mm of the endocardium at axis shares 0..1."""
        rows = self.rows(np.asarray(share) * self.parameters.length)
        radii = self.endo[rows] * (1 - self._eps_r * activation * self._activity[:, rows])
        y = -self.cap + (self.levels[rows] + self.cap) * self.stretch(activation)
        return np.stack([y, -radii[0], radii[1]], axis=1)

    def material(
        self, x: np.ndarray, y: np.ndarray, activation: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Material coordinates of places in space.

        Args:
            x, y: float32 heart-frame coordinates in mm, any shape.
            activation: 0 (end diastole, where the map is the identity) .. 1 (end systole).

        Returns:
            (X, Y) in mm, float32, of the same shape.
        """
        p, stretch = self.parameters, self.stretch(activation)
        base = self.mitral(activation)
        ratio = (self.roof - p.length) / (self.roof - base)
        level = np.where(
            y < base, (y + self.cap) / stretch - self.cap, p.length + (y - base) * ratio
        )
        level = np.where((y < -self.cap) | (y > self.roof), y, level)
        rows = self.rows(level) * 2 + (x > 0)
        rho = np.abs(x)
        table = self._tables(activation, stretch)
        endo, inner, swell, epi, outer, rv, squeeze, tail = (column[rows] for column in table)
        wall = np.sqrt(np.maximum(endo**2 + (rho**2 - inner**2) * swell, 0))
        past = rho - outer
        side = np.where(past < rv * squeeze, past / squeeze, rv + (past - rv * squeeze) * tail)
        radius = np.where(rho < inner, rho * endo / np.maximum(inner, 1e-6), wall)
        radius = np.where(past > 0, epi + side, radius)
        still = rho > epi + rv + self.far
        radius = np.where(still, rho, radius)
        return np.copysign(radius, x), level.astype(np.float32, copy=False)

    def _tables(self, activation: float, stretch: float) -> list[np.ndarray]:
        """Per level and side (interleaved): the radii that the inverse map needs."""
        shrink = 1 - self._eps_r * activation * self._activity.T  # (levels, sides)
        endo, epi = self._padded
        inner = endo * shrink
        swell = (stretch + (1 - stretch) * self._beyond)[:, None] * np.ones(2)
        swell = np.where(self.levels[:, None] < -self.cap, 1.0, swell)
        outer = np.sqrt(inner**2 + (epi**2 - endo**2) / swell)
        rv = self.rv[:, None] * np.array([1.0, 0.0])
        effort = 0.3 * min(self.parameters.ef / 60, 1.2) * activation
        squeeze = 1 - effort * self._activity.T[:, :1] * np.array([1.0, 0.0])
        tail = self.far / (self.far + epi + rv - outer - rv * squeeze)
        columns = (endo, inner, swell, epi, outer, rv, squeeze, tail)
        return [np.broadcast_to(c, shrink.shape).astype(np.float32).ravel() for c in columns]

    @cached_property
    def _padded(self) -> tuple[np.ndarray, np.ndarray]:
        """Endocardial and epicardial radii, (levels, 2)."""
        return np.repeat(self.endo[:, None], 2, 1), np.repeat(self.epi[:, None], 2, 1)


@dataclass(frozen=True)
class Beat:
    """The timing of a clip.

    Attributes:
        filling: (T,) LV filling 0 (end systole) .. 1 (end diastole).
        opening: (T,) opening of the mitral valve 0..1.
        ed_frame, es_frame: frames that stand exactly at end diastole and end systole.
        fps: frames per second.
    """

    filling: np.ndarray
    opening: np.ndarray
    ed_frame: int
    es_frame: int
    fps: float


def filling_curve(phase: np.ndarray, systole: float, kick: float = 0.24) -> np.ndarray:
    """LV filling over the beat: ejection, isovolumic rest, rapid filling, diastasis, atrial kick.

    Args:
        phase: any shape, in beats since end diastole (taken modulo 1).
        systole: share of the beat from end diastole to end systole.
        kick: share of the stroke volume that the atrium adds.

    Returns:
        Filling 0..1 of the same shape: 1 at phase 0, 0 at phase ``systole``.
    """
    rest = 1 - systole
    knots = np.array([0, 0.12 * systole, 0.55 * systole, systole])
    values = [1.0, 0.985, 0.36, 0.0]
    early = systole + rest * np.array([0.09, 0.24, 0.40, 0.72, 0.94, 1.0])
    values += [0.012, 0.45, 0.93 - kick, 1.0 - kick, 0.99, 1.0]
    knots = np.concatenate([knots, early])
    return np.asarray(PchipInterpolator(knots, values)(np.mod(phase, 1.0)))


def draw_beat(parameters: HeartParameters, frames: int, rng: np.random.Generator) -> Beat:
    """Draw frame rate and start, so that one end diastole and its end systole fall on frames.

    Args:
        parameters: the heart.
        frames: T, at least 16.
        rng: source of chance.

    Returns:
        The clip's timing.
    """
    period = 60 / parameters.heart_rate
    share = float(np.clip(0.34 + 0.0012 * (parameters.heart_rate - 60), 0.3, 0.46))
    low = 60 if parameters.population == "fetal" else 30
    fps = float(np.clip(rng.normal(50, 8), low, 80))
    fps = min(fps, (frames - 4) / (share * period))  # a short clip still holds a systole
    fps = max(round(fps), 1)
    beat = period * fps
    systole = max(round(share * beat), 2)
    latest = min(frames - 1 - systole, int(beat))
    ed_frame = int(rng.integers(0, latest + 1))
    phase = (np.arange(frames) - ed_frame) / beat
    kick = rng.uniform(0.18, 0.28)
    filling = filling_curve(phase, systole / beat, kick)
    flow = filling_curve(phase + 0.01, systole / beat, kick) - filling
    diastole = _smooth((np.mod(phase, 1.0) - systole / beat) / 0.06) * (np.mod(phase, 1.0) < 0.97)
    opening = diastole * np.clip(0.3 + 0.7 * flow / 0.045, 0.2, 1.0)
    return Beat(filling, opening, ed_frame, ed_frame + systole, float(fps))
