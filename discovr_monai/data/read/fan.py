"""A geometric fan fitted to what moves in a cine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, optimize
from scipy.spatial import ConvexHull, QhullError

MOVES = 14  # grey levels between a pixel's darkest and brightest frame; JPEG noise stays below
STIRS = 3  # the same where nothing outside stirs, as in files without lossy compression
COST = 0.15  # what a black, unmoved pixel inside the fan costs against one that moves
LIT, GLOW = (
    12,
    0.3,
)  # a pixel brighter than LIT that stands still (clutter at the probe) is worth GLOW
TILTED = 1.1  # how much better a tilted fan must fit than an upright one: dark sides are commoner
COARSE, FINE = 96, 320  # larger side in pixels on which the fan is fitted


@dataclass(frozen=True)
class Fan:
    """A sector: lines from an apex, two arcs, and the image's own edges.

    Attributes:
        x, y: apex in pixels (column, row), usually above or at the top of the sector.
        half_angle: radians between the middle beam and each edge.
        near, far: radii in pixels.
        tilt: radians of the middle beam from straight down, positive to the right.
        box: (x0, y0, x1, y1) pixels that cut the fan, inclusive.
    """

    x: float
    y: float
    half_angle: float
    near: float
    far: float
    tilt: float
    box: tuple[float, float, float, float]

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        """(H, W) bool."""
        row, column = np.ogrid[: shape[0], : shape[1]]
        dx, dy = column - self.x, row - self.y
        distance = np.hypot(dx, dy)
        inside = np.abs(np.arctan2(dx, dy) - self.tilt) <= self.half_angle
        inside &= (distance >= self.near) & (distance <= self.far)
        x0, y0, x1, y1 = self.box
        inside &= (column >= x0) & (column <= x1) & (row >= y0) & (row <= y1)
        return np.asarray(inside)


# ---- what moves --------------------------------------------------------------------------


def moving_part(frames: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """The largest part of a cine that moves.

    Pixels whose grey changes, without thin bridges to traces and clocks. Dark parts of a sector
    only stir: where the rest of the screen is still, stirring counts as well.

    Args:
        frames: (T, H, W) uint8.

    Returns:
        Three (H, W) bool: what moves or stirs, its largest connected part, and what is never
        black; (H, W) uint8, how far each pixel's grey changes. None when nothing moves.
    """
    sample = frames[np.linspace(0, len(frames) - 1, min(len(frames), 64)).astype(int)]
    darkest = sample.min(0)
    change = sample.max(0) - darkest
    sure = _largest(_dense(change > MOVES))
    if sure is None:
        return None
    stirring = change > STIRS
    away = ~ndimage.binary_dilation(hull(sure), iterations=8)
    if not away.any() or stirring[away].mean() < 0.02:
        moving = _dense(stirring)
    else:
        moving = _dense(change > MOVES)
        corner = max(4, min(change.shape) // 12)  # no fan reaches the corners above it
        tops = stirring[:corner, :corner], stirring[:corner, -corner:]
        if max(top.mean() for top in tops) < 0.1:
            moving |= _beside(_dense(stirring) & away, sure)
    largest = _largest(moving)
    return moving, sure if largest is None else largest, darkest > LIT, change


def _beside(stirring: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """The parts that stir and begin where the sure part ends: its dark sides, not the ECG."""
    labels, _ = ndimage.label(stirring)
    near = ndimage.binary_dilation(hull(sure), iterations=12)
    touching = np.unique(labels[near & stirring])
    return np.asarray(np.isin(labels, touching[touching > 0]))


def _dense(moving: np.ndarray) -> np.ndarray:
    """A place counts where most of its neighbourhood moves: speckle does, letters do not."""
    dense = ndimage.uniform_filter(moving.astype(np.float32), 5) > 0.5
    return np.asarray(ndimage.binary_opening(dense, iterations=2))


def _largest(mask: np.ndarray) -> np.ndarray | None:
    labels, count = ndimage.label(mask)
    if not count:
        return None
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(labels == sizes.argmax())


def hull(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool, the convex hull of a mask."""
    points = np.argwhere(mask)
    try:
        planes = ConvexHull(points).equations  # (E, 3): normal . (row, column) + offset <= 0
    except QhullError:  # a line or a point
        return mask
    row, column = np.ogrid[: mask.shape[0], : mask.shape[1]]
    inside = np.ones(mask.shape, bool)
    for a, b, c in planes:
        inside &= a * row + b * column + c <= 0.5
    return inside


# ---- the fan -----------------------------------------------------------------------------


def fit_fan(
    moving: np.ndarray, largest: np.ndarray, lit: np.ndarray, change: np.ndarray
) -> Fan | None:
    """The fan that holds most of what moves and least of what does not.

    Each pixel inside is worth 1 if it moves, ``GLOW`` if it is lit, and costs ``COST`` in any
    case. The two edges lie the same way off the middle beam and the image's cuts are symmetric
    about the apex, so that a dark side takes after the bright one.

    Args:
        moving, largest, lit, change: of :func:`moving_part`.

    Returns:
        The fan; None where no fan explains what moves (linear probes, M-mode, whole frames).
    """
    rows, columns = _extent(largest, 1), _extent(largest, 0)
    if rows is None or columns is None:
        return None
    (y0, y1), (x0, x1) = rows, columns
    if y1 - y0 < 16 or x1 - x0 < 16:
        return None
    value = np.zeros(moving.shape, np.float32)  # what moves elsewhere is a trace or a clock
    box = np.s_[: y1 + 1]
    value[box] = np.maximum(moving[box] & (np.arange(y1 + 1) >= y0)[:, None], GLOW * lit[box])
    starts = [
        _polish(value, _edges(value, s, COARSE), COARSE) for s in _starts(value, (x0, y0, x1, y1))
    ]
    best = min(starts, key=lambda start: _Worth(value, COARSE, start[1])(start[0]))
    best = _polish(value, _edges(value, best, FINE), FINE)
    fan = _complete(best, change)
    inside = fan.mask(moving.shape)
    held = (inside & largest).sum() / largest.sum()
    filled = (inside & moving).sum() / max(inside.sum(), 1)
    return fan if held > 0.93 and filled > 0.5 else None


def _extent(mask: np.ndarray, axis: int) -> tuple[int, int] | None:
    """First and last place along an axis where more than a few pixels are set."""
    count = mask.sum(axis)
    lines = np.flatnonzero(count > max(3, 0.01 * mask.shape[axis]))
    return (int(lines[0]), int(lines[-1])) if len(lines) else None


def _shrunk(value: np.ndarray, side: int) -> tuple[np.ndarray, int]:
    step = max(1, -(-max(value.shape) // side))
    height, width = (n // step * step for n in value.shape)
    blocks = value[:height, :width].reshape(height // step, step, width // step, step)
    return blocks.mean((1, 3), dtype=np.float32), step


class _Worth:
    """Value of fans on a map shrunk by ``step``; places are in full pixels."""

    def __init__(self, value: np.ndarray, side: int, box: tuple[float, ...]) -> None:
        density, step = _shrunk(value, side)
        self.value = density - np.float32(COST)
        self.row = ((np.arange(density.shape[0], dtype=np.float32) + 0.5) * step - 0.5)[:, None]
        self.column = ((np.arange(density.shape[1], dtype=np.float32) + 0.5) * step - 0.5)[None]
        self.box, self.step = box, step

    def __call__(self, parameters: np.ndarray) -> float:
        """Minus the worth of (x, y, half angle, near, far, tilt); edges are a pixel soft."""
        x, y, half, near, far, tilt = parameters
        if not 0.1 < half < 1.6 or far <= near or near < 0:
            return 0.0
        dx, dy = self.column - np.float32(x), self.row - np.float32(y)
        distance = np.sqrt(dx * dx + dy * dy)
        across = (np.float32(half) - np.abs(np.arctan2(dx, dy) - np.float32(tilt))) * distance
        margin = np.minimum(across, np.float32(far) - distance)
        np.minimum(margin, distance - np.float32(near), out=margin)
        x0, _, x1, _ = self.box
        reach = max(x - x0, x1 - x)
        np.minimum(margin, np.float32(reach + 0.5) - np.abs(dx), out=margin)
        soft = np.clip(margin / self.step + 0.5, 0, 1)
        return -float((soft * self.value).sum())


def _starts(value: np.ndarray, box: tuple[int, int, int, int], count: int = 3) -> list[tuple]:
    """The best apexes of a coarse grid, each with its best angle."""
    x0, y0, x1, y1 = box
    worth = _Worth(value, COARSE, box)
    height, width = y1 - y0, x1 - x0
    # the top of the sector is about the apex's column
    head = value[y0 : y0 + max(4, height // 8), x0 : x1 + 1]
    columns = np.flatnonzero((head > GLOW).any(0))
    middle = x0 + float(columns.mean()) if len(columns) else (x0 + x1) / 2
    starts = []
    for x in sorted({middle, (x0 + x1) / 2, x0 + 0.35 * width, x0 + 0.65 * width}):
        for above in (0.0, 0.1, 0.25, 0.45):
            tries = [
                np.array([x, y0 - above * height, half, above * height, (1 + above) * height, 0.0])
                for half in np.deg2rad((20, 28, 36, 44, 52))
            ]
            values = [worth(t) for t in tries]
            starts.append((min(values), tries[int(np.argmin(values))]))
    starts.sort(key=lambda pair: pair[0])
    return [(start, box) for _, start in starts[:count]]


def _edges(value: np.ndarray, start: tuple, side: int) -> tuple:
    """The best angle and radii for an apex, by running sums: no start is too far away."""
    (x, y, half, near, far, tilt), box = start
    worth = _Worth(value, side, box)
    dx, dy = worth.column - x, worth.row - y
    distance, angle = np.hypot(dx, dy), np.abs(np.arctan2(dx, dy) - tilt)
    off, reach = np.abs(dx) + 0 * dy, max(x - box[0], box[2] - x)
    for _ in range(2):
        ring = (off <= reach + 0.5) & (angle <= half)
        profile = np.bincount((distance[ring] / worth.step).astype(int), weights=worth.value[ring])
        first, last = _best_run(profile)
        near, far = first * worth.step if first > 1 else 0.0, (last + 1) * worth.step
        ring = (distance >= near) & (distance <= far)
        wedge = ring & (off <= reach + 0.5)
        bins = np.bincount((angle[wedge] * 512).astype(int), weights=worth.value[wedge])
        half = (int(np.argmax(np.cumsum(bins))) + 1) / 512
        wedge = ring & (angle <= half)  # of any width: dark sides are not joined to the rest
        bins = np.bincount((off[wedge] / worth.step).astype(int), weights=worth.value[wedge])
        reach = (int(np.argmax(np.cumsum(bins))) + 0.5) * worth.step
    box = (x - reach, box[1], x + reach, box[3])
    return np.array([x, y, half, near, far, tilt]), box


def _best_run(profile: np.ndarray) -> tuple[int, int]:
    """First and last place of the run with the largest sum."""
    total = np.concatenate([[0.0], np.cumsum(profile)])
    lowest = np.minimum.accumulate(total)[:-1]
    last = int(np.argmax(total[1:] - lowest))
    return int(np.argmin(total[: last + 1])), last


def _polish(value: np.ndarray, start: tuple, side: int) -> tuple:
    """Downhill simplex from a start; a tilt is taken only where it gains much."""
    parameters, box = start
    worth = _Worth(value, side, box)
    scale = 0.06 if side == COARSE else 0.015
    size = max(box[2] - box[0], box[3] - box[1])
    steps = np.array([size, size, 1.0, size, size, 0.5]) * scale

    def search(first: np.ndarray, free: int) -> tuple[np.ndarray, float]:
        def of(part: np.ndarray) -> float:
            return worth(np.concatenate([part, first[free:]]))

        simplex = np.concatenate([first[None, :free], first[:free] + np.diag(steps[:free])])
        optimum = optimize.minimize(
            of,
            first[:free],
            method="Nelder-Mead",
            options={"initial_simplex": simplex, "maxfev": 260, "xatol": 0.05, "fatol": 0.5},
        )
        return np.concatenate([optimum.x, first[free:]]), float(optimum.fun)

    upright, cost = search(parameters, 5)
    tilted, other = search(upright, 6)
    return (tilted if other < cost * TILTED else upright), box


def _complete(fit: tuple, change: np.ndarray) -> Fan:
    """The fan, a pixel inside its edges: better to lose a pixel than to keep a letter.

    A cut at the sides is kept only where stillness begins at it; where the sector just fades,
    its dark corners belong to it.
    """
    x, y, half, near, far, tilt = (float(v) for v in fit[0])
    x0, _, x1, y1 = fit[1]
    reach = float(max(x - x0, x1 - x))
    whole = Fan(x, y, half, near, far, tilt, (-np.inf, -np.inf, np.inf, y1)).mask(change.shape)
    off = np.abs(np.arange(change.shape[1]) - x)
    beyond = whole & ((off > reach + 3) & (off < 1.15 * reach + 6))
    elsewhere = ~ndimage.binary_dilation(whole, iterations=4)
    if beyond.any():
        rest = float(np.median(change[elsewhere])) if elsewhere.any() else 0.0
        if float(change[beyond].mean()) > rest + 1:
            reach = float(max(change.shape))
    return Fan(
        x=float(x),
        y=float(y),
        half_angle=float(half - 1 / far),
        near=max(float(near), 0.0),
        far=float(far) - 1,
        tilt=float(tilt),
        box=(float(x - reach), 0.0, float(x + reach), float(y1)),
    )
