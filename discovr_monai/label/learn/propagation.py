"""From the contours of one or two frames to every frame of a cine.

The tokens of the video encoder say, frame by frame, where the heart stands between the drawn
frames. Shapes are mixed accordingly, as signed distances at the cine's own resolution. Frames
beyond what was drawn (all frames, where there is one contour only) are moved by optical flow,
which is held to one change of shape along the phase of the beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import nnls
from torch import Tensor

from discovr_monai.evaluation.features.encoders import Backbone

FITTED = 12  # frames whose flow says how shapes change with the phase
BEYOND = 0.5  # standard deviations of the phase that frames may lie beyond the drawn ones
FLOW_SIDE = 128  # pixels, the longer side of the frames that flow is estimated on

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]


@torch.no_grad()
def frame_features(
    encoder: Backbone,
    prepare: Callable[[dict[str, Any]], Tensor],
    cine: np.ndarray,
    batch_size: int = 16,
) -> np.ndarray:
    """What the encoder sees in each frame, amid its neighbours.

    There is one clip of stride 1 for each frame, with the frame in its middle; where the cine
    ends, its end frames repeat. A frame must not change its place in the clip, because tokens
    differ more by their place than hearts do by their beat.

    Args:
        encoder: the video encoder, or the image encoder, which sees each frame alone.
        prepare: {"image": (B, C, T, S, S) uint8} -> the network's input.
        cine: (C, T, S, S) uint8.
        batch_size: clips at once.

    Returns:
        (T, h w d) float32, the mean of the clip's middle tokens.
    """
    length, count = cine.shape[1], encoder.clip_shape[1]
    around = np.arange(length)[:, None] + np.arange(count) - count // 2
    around = around.clip(0, length - 1)  # (T, num_frames)
    middle = slice((encoder.grid[0] - 1) // 2, encoder.grid[0] // 2 + 1)  # one or two tubelets
    features = []
    for first in range(0, length, batch_size):
        clips = [np.asarray(cine[:, steps]) for steps in around[first : first + batch_size]]
        tokens = encoder.tokens(prepare({"image": torch.from_numpy(np.stack(clips))}))
        features.append(tokens[:, middle].mean(1).flatten(1).float().cpu().numpy())  # (B, h w d)
    return np.concatenate(features)


def mixture(features: np.ndarray, drawn: Sequence[int]) -> np.ndarray:
    """The shares of the drawn frames in every frame: its nearest point in their convex hull.

    >>> mixture(np.array([[0.0], [3.0], [4.0]]), [0, 2]).round(2)
    array([[1.  , 0.  ],
           [0.25, 0.75],
           [0.  , 1.  ]])

    Args:
        features: (T, D).
        drawn: K different frames.

    Returns:
        (T, K), not negative, with sums of 1; a drawn frame has a share in itself only.
    """
    corners = features[list(drawn)].astype(np.float64)  # (K, D)
    count, centre = len(drawn), corners.mean(0)
    shares = np.ones((len(features), count)) / count
    # Distances within the hull depend on its own K - 1 dimensions only.
    _, sizes, axes = np.linalg.svd(corners - centre, full_matrices=False)
    axes = axes[sizes > 1e-9 * max(sizes[0], 1e-12)]  # (k, D)
    if len(axes):
        places = (corners - centre) @ axes.T  # (K, k)
        frames = (features - centre) @ axes.T  # (T, k)
        heavy = 1e4 * np.abs(places).max()  # one more equation, so heavy that the sum becomes 1
        system = np.vstack((places.T, np.full(count, heavy)))
        shares = np.stack([nnls(system, np.append(f, heavy))[0] for f in frames])
        shares /= shares.sum(1, keepdims=True)
    shares[list(drawn)] = np.eye(count)
    return shares


def phase(features: np.ndarray) -> np.ndarray:
    """How far the beat has come in each frame: the first principal component, of deviation 1.

    Args:
        features: (T, D).

    Returns:
        (T,); zeros if all frames look the same.
    """
    centred = features - features.mean(0)
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))  # T is small
    if values[-1] <= 0:
        return np.zeros(len(features))
    component = vectors[:, -1]
    return np.asarray(component / max(component.std(), 1e-12))


def signed_distances(labels: np.ndarray, classes: int) -> np.ndarray:
    """Distances to the outlines of everything labelled, and of each label.

    Args:
        labels: (H, W).
        classes: the number of labels 1, 2, ...

    Returns:
        (classes + 1, H, W) float32 pixels, positive inside; minus H + W for a missing label.
    """
    parts = [labels > 0, *(labels == value for value in range(1, classes + 1))]
    distances = np.full((classes + 1, *labels.shape), -float(sum(labels.shape)), np.float32)
    for number, part in enumerate(parts):
        if part.any():
            inside = ndimage.distance_transform_edt(part)
            distances[number] = inside - ndimage.distance_transform_edt(~part)
    return distances


def thinnest(shapes: np.ndarray) -> int:
    """The label that is nowhere thick, usually a wall.

    It is drawn as what the other labels leave of the whole: where it lies at two places that are
    far enough apart, the mean of its own distances is positive nowhere.

    Args:
        shapes: (K, classes + 1, h, w) signed distances of K frames.
    """
    depth = shapes[:, 1:].max((0, 2, 3))
    return 1 + int(np.where(depth > 0, depth, np.inf).argmin())


def labels_of(distances: np.ndarray, wall: int) -> np.ndarray:
    """Undoes :func:`signed_distances`: (classes + 1, H, W) -> (H, W) uint8.

    Args:
        distances: of the whole and of each label.
        wall: the label of what lies inside the whole, but inside no other label.
    """
    others = distances[1:].copy()
    others[wall - 1] = 0.0  # wins where no other label reaches
    return np.where(distances[0] > 0, 1 + others.argmax(0), 0).astype(np.uint8)


def propagate(
    frames: np.ndarray,
    drawn: Mapping[int, np.ndarray],
    features: np.ndarray,
    flow: Flow | None = None,
) -> np.ndarray:
    """Label maps of every frame.

    Args:
        frames: (T, H, W) uint8.
        drawn: frame -> its label map (H, W).
        features: (T, D), see :func:`frame_features`.
        flow: optical flow; :func:`lucas_kanade` if None.

    Returns:
        (T, H, W) uint8; the drawn frames are as they were drawn.

    Raises:
        ValueError: nothing is drawn, or elsewhere than in the cine.
    """
    drawing = _Drawing(frames, drawn, flow or lucas_kanade)
    shares = mixture(features, drawing.times)
    moved = phase(features)
    ends = moved[drawing.times]
    beyond = moved - moved.clip(ends.min(), ends.max())
    tracked: dict[int, np.ndarray] = {}
    if np.abs(beyond).max() > BEYOND:
        tracked = _track(drawing, shares, beyond)
    return drawing.fill(lambda t: tracked[t] if t in tracked else drawing.mixed(shares[t]))


def propagate_by_flow(
    frames: np.ndarray, drawn: Mapping[int, np.ndarray], flow: Flow | None = None
) -> np.ndarray:
    """The baseline: each frame's contours are the nearest drawn ones, moved by optical flow.

    Arguments, result and errors are those of :func:`propagate`.
    """
    drawing = _Drawing(frames, drawn, flow or lucas_kanade)
    times = np.array(drawing.times)
    return drawing.fill(lambda t: drawing.moved(int(np.abs(times - t).argmin()), t))


def lucas_kanade(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Dense iterative Lucas-Kanade (Le Besnerais and Champagnat 2005), by scikit-image.

    Args:
        target, source: (H, W) float32 in 0..1.

    Returns:
        (2, H, W) pixels: where in ``source`` the target's (row, column) came from, less its place.
    """
    from skimage.registration import optical_flow_ilk

    return np.asarray(optical_flow_ilk(target, source, radius=7))


# ---- parts ---------------------------------------------------------------------------------


class _Drawing:
    """What is drawn of a cine, in a window around it; frames with nothing in them do not count."""

    def __init__(self, frames: np.ndarray, drawn: Mapping[int, np.ndarray], flow: Flow) -> None:
        self.labels = {int(t): np.asarray(m) for t, m in sorted(drawn.items()) if np.any(m)}
        if not self.labels:
            raise ValueError("nothing is drawn in any frame: draw a contour, best at end diastole")
        for t, labels in self.labels.items():
            if not 0 <= t < len(frames) or labels.shape != frames.shape[1:]:
                raise ValueError(
                    f"frame {t} is drawn as {labels.shape}, the cine is {len(frames)} frames of "
                    f"{frames.shape[1:]}: draw on the cine's own frames"
                )
        self.flow, self.size = flow, frames.shape
        self.times = list(self.labels)
        maps = np.stack(list(self.labels.values()))
        self.window = _around(maps.max(0) > 0)
        self.frames = frames[:, *self.window]  # (T, h, w)
        classes = int(maps.max())
        self.shapes = np.stack([signed_distances(m[self.window], classes) for m in maps])
        self.wall = thinnest(self.shapes)

    def mixed(self, share: np.ndarray) -> np.ndarray:
        """Signed distances of the drawn frames, mixed by their shares (K,)."""
        return np.tensordot(share.astype(np.float32), self.shapes, 1)

    def moved(self, number: int, t: int) -> np.ndarray:
        """Signed distances of a drawn frame (0 to K - 1), moved by flow to frame t."""
        target, source = self.frames[t], self.frames[self.times[number]]
        step = -(-max(target.shape) // FLOW_SIDE)  # speckle is coarser than the pixels of screens
        small = [ndimage.uniform_filter(f / np.float32(255), step)[::step, ::step]
                 for f in (target, source)]  # fmt: skip
        flow = self.flow(small[0], small[1]) * step
        if step > 1:
            flow = _resample(flow, np.indices(target.shape) / step)
        return _resample(self.shapes[number], np.indices(target.shape) + flow).astype(np.float32)

    def fill(self, distances: Callable[[int], np.ndarray]) -> np.ndarray:
        """(T, H, W) label maps: drawn frames as they are, the others by their signed distances."""
        filled = np.zeros(self.size, np.uint8)
        for t in range(len(filled)):
            if t in self.labels:
                filled[t] = self.labels[t]
            else:
                filled[t][self.window] = labels_of(distances(t), self.wall)
        return filled


def _around(drawn: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a mask (H, W), and a third of its extent more on every side."""
    slices = []
    for axis, length in enumerate(drawn.shape):
        inside = np.flatnonzero(drawn.any(1 - axis))
        margin = 2 + (inside[-1] - inside[0] + 1) // 3
        slices.append(slice(max(0, int(inside[0] - margin)), min(length, int(inside[-1] + margin))))
    return slices[0], slices[1]


def _resample(maps: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n, h, w) maps at places (2, H, W), linearly."""
    return np.stack([ndimage.map_coordinates(m, places, order=1, mode="nearest") for m in maps])


def _track(drawing: _Drawing, shares: np.ndarray, beyond: np.ndarray) -> dict[int, np.ndarray]:
    """Signed distances of the frames whose phase lies beyond the drawn ones.

    They are the mean of two: what the frame's own flow says, and one change of shape per unit of
    phase, fitted to the flow of the farthest frames. The first errs from frame to frame, the
    second where a heart does not move along a line.
    """
    times = [int(t) for t in np.flatnonzero(beyond)]
    mixed = {t: drawing.mixed(shares[t]) for t in times}
    moved = {t: drawing.moved(int(shares[t].argmax()), t) for t in times}
    farthest = sorted(times, key=lambda t: -abs(beyond[t]))[:FITTED]
    change = sum(beyond[t] * (moved[t] - mixed[t]) for t in farthest)
    change = change / sum(beyond[t] ** 2 for t in farthest)
    return {t: (mixed[t] + beyond[t] * change + moved[t]) / 2 for t in times}
