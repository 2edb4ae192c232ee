"""From the contours of one or two frames to every frame of a cine.

The video encoder's tokens say, frame by frame, where the heart stands between the drawn frames;
shapes are mixed accordingly as signed distances, at the cine's own resolution. Frames beyond what
was drawn (all of them, where there is one contour only) are moved by optical flow, held to one
change of shape along the phase.
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

    Args:
        encoder: the video encoder (or the image encoder, which sees each frame alone).
        prepare: {"image": (B, C, T, S, S) uint8} -> the network's input.
        cine: (C, T, S, S) uint8.
        batch_size: clips at once; there is one for each frame.

    Returns:
        (T, h w d) float32: the mean of the middle tokens of a clip of stride 1 around the frame.
        The frame is always in the clip's middle, where the cine's ends repeat if need be: tokens
        differ more by their place in a clip than hearts do by their beat.
    """
    length, count = cine.shape[1], encoder.clip_shape[1]
    around = np.arange(length)[:, None] + np.arange(count) - count // 2
    around = around.clip(0, length - 1)  # (T, num_frames)
    middle = slice((encoder.grid[0] - 1) // 2, encoder.grid[0] // 2 + 1)  # one or two tubelets
    found = []
    for first in range(0, length, batch_size):
        chunk = [np.asarray(cine[:, steps]) for steps in around[first : first + batch_size]]
        tokens = encoder.tokens(prepare({"image": torch.from_numpy(np.stack(chunk))}))
        found.append(tokens[:, middle].mean(1).flatten(1).float().cpu().numpy())  # (B, h w d)
    return np.concatenate(found)


def mixture(features: np.ndarray, drawn: Sequence[int]) -> np.ndarray:
    """The shares of the drawn frames in every frame: its nearest point in their convex hull.

    Args:
        features: (T, D).
        drawn: K different frames.

    Returns:
        (T, K), not negative, sums 1; a drawn frame is itself alone.
    """
    corners = features[list(drawn)].astype(np.float64)  # (K, D)
    count = len(drawn)
    out = np.ones((len(features), count)) / count
    # distances within the hull depend on its own K - 1 dimensions only
    _, sizes, axes = np.linalg.svd(corners - corners.mean(0), full_matrices=False)
    axes = axes[sizes > 1e-9 * max(sizes[0], 1e-12)]
    if len(axes):
        places = (corners - corners.mean(0)) @ axes.T  # (K, k)
        frames = (features - corners.mean(0)) @ axes.T  # (T, k)
        heavy = 1e4 * np.abs(places).max()  # the sum of 1 as one more, heavy equation
        system = np.vstack((places.T, np.full(count, heavy)))
        out = np.stack([nnls(system, np.append(f, heavy))[0] for f in frames])
        out /= out.sum(1, keepdims=True)
    out[list(drawn)] = np.eye(count)
    return out


def phase(features: np.ndarray) -> np.ndarray:
    """(T, D) -> (T,) the first principal component, of unit deviation: how far a beat has come."""
    centred = features - features.mean(0)
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))  # T is small
    if values[-1] <= 0:  # all frames look the same
        return np.zeros(len(features))
    score = vectors[:, -1]
    return np.asarray(score / max(score.std(), 1e-12))


def signed_distances(labels: np.ndarray, classes: int) -> np.ndarray:
    """(H, W) labels -> (classes + 1, H, W) float32 pixels, positive inside.

    First that of everything labelled, then each label's; for a missing label minus H + W.
    """
    parts = [labels > 0, *(labels == value for value in range(1, classes + 1))]
    out = np.full((classes + 1, *labels.shape), -float(sum(labels.shape)), np.float32)
    for number, part in enumerate(parts):
        if part.any():
            inside = ndimage.distance_transform_edt(part)
            out[number] = inside - ndimage.distance_transform_edt(~part)
    return out


def thinnest(shapes: np.ndarray) -> int:
    """The label whose parts are nowhere thick, of (K, classes + 1, h, w) signed distances.

    Walls: between two of a wall's places far enough apart, the mean of its distances is nowhere
    positive. It is what the other labels leave of the whole.
    """
    depth = shapes[:, 1:].max((0, 2, 3))
    return 1 + int(np.where(depth > 0, depth, np.inf).argmin())


def labels_of(distances: np.ndarray, wall: int) -> np.ndarray:
    """Undoes :func:`signed_distances`: (classes + 1, H, W) -> (H, W) uint8.

    Args:
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
        flow: see :func:`lucas_kanade`, which it is if None.

    Returns:
        (T, H, W) uint8; the drawn frames are as they were drawn.

    Raises:
        ValueError: if nothing is drawn, or elsewhere than in the cine.
    """
    known = _checked(frames, drawn)
    classes = max(int(m.max()) for m in known.values())
    rows, columns = _around(known, frames.shape[1:])
    cut = frames[:, rows, columns]
    shapes = np.stack([signed_distances(m[rows, columns], classes) for m in known.values()])
    wall, shares = thinnest(shapes), mixture(features, list(known))
    moved = phase(features)
    ends = moved[list(known)]
    beyond = moved - moved.clip(ends.min(), ends.max())
    tracked: dict[int, np.ndarray] = {}
    if np.abs(beyond).max() > BEYOND:
        tracked = _beyond(cut, list(known), shapes, shares, beyond, flow or lucas_kanade)
    out = np.zeros(frames.shape, np.uint8)
    for t, share in enumerate(shares):
        found = tracked.get(t)
        mixed = np.tensordot(share.astype(np.float32), shapes, 1) if found is None else found
        out[t, rows, columns] = labels_of(mixed, wall)
    for t, labels in known.items():
        out[t] = labels
    return out


def propagate_by_flow(
    frames: np.ndarray, drawn: Mapping[int, np.ndarray], flow: Flow | None = None
) -> np.ndarray:
    """The baseline: each frame's contours are the nearest drawn ones, moved by optical flow.

    Args, returns, raises: as :func:`propagate`.
    """
    known = _checked(frames, drawn)
    classes = max(int(m.max()) for m in known.values())
    rows, columns = _around(known, frames.shape[1:])
    cut = frames[:, rows, columns]
    shapes = {t: signed_distances(m[rows, columns], classes) for t, m in known.items()}
    wall = thinnest(np.stack(list(shapes.values())))
    out = np.zeros(frames.shape, np.uint8)
    for t in range(len(frames)):
        nearest = min(known, key=lambda k: abs(k - t))
        if t in known:
            out[t] = known[t]
            continue
        moved = _moved(shapes[nearest], cut[t], cut[nearest], flow or lucas_kanade)
        out[t, rows, columns] = labels_of(moved, wall)
    return out


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


def _checked(frames: np.ndarray, drawn: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """What is drawn, in order; frames with nothing in them are not drawn."""
    found = {int(t): np.asarray(m) for t, m in sorted(drawn.items()) if np.any(m)}
    if not found:
        raise ValueError("nothing is drawn in any frame: draw a contour, best at end diastole")
    for t, labels in found.items():
        if not 0 <= t < len(frames) or labels.shape != frames.shape[1:]:
            raise ValueError(
                f"frame {t} is drawn as {labels.shape}, the cine is {len(frames)} frames of "
                f"{frames.shape[1:]}: draw on the cine's own frames"
            )
    return found


def _around(known: Mapping[int, np.ndarray], size: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of what is drawn, a third of its extent more on every side."""
    found = []
    for axis, length in enumerate(size):
        there = np.flatnonzero(np.any([m.any(1 - axis) for m in known.values()], 0))
        margin = 2 + (there[-1] - there[0] + 1) // 3
        found.append(slice(max(0, int(there[0] - margin)), min(length, int(there[-1] + margin))))
    return found[0], found[1]


def _moved(shape: np.ndarray, target: np.ndarray, source: np.ndarray, flow: Flow) -> np.ndarray:
    """(n, h, w) signed distances of the source frame, on the target frame."""
    step = max(1, -(-max(target.shape) // FLOW_SIDE))  # speckle is coarser than large pixels
    small = [ndimage.uniform_filter(f / np.float32(255), step)[::step, ::step]
             for f in (target, source)]  # fmt: skip
    fine = flow(small[0], small[1]) * step
    if step > 1:
        places = np.indices(target.shape) / step
        fine = np.stack([ndimage.map_coordinates(f, places, order=1, mode="nearest") for f in fine])
    places = np.indices(target.shape) + fine
    warped = [ndimage.map_coordinates(s, places, order=1, mode="nearest") for s in shape]
    return np.stack(warped).astype(np.float32)


def _beyond(
    frames: np.ndarray,
    known: Sequence[int],
    shapes: np.ndarray,
    shares: np.ndarray,
    beyond: np.ndarray,
    flow: Flow,
) -> dict[int, np.ndarray]:
    """Signed distances of the frames that lie beyond the drawn ones.

    The mean of what the frame's own flow says, and of one change per unit of phase that is fitted
    to the flow of the farthest frames: the first errs from frame to frame, the second where a
    heart does not move along a line.
    """
    there = [int(t) for t in np.flatnonzero(beyond)]
    mixed = {t: np.tensordot(shares[t].astype(np.float32), shapes, 1) for t in there}
    moved = {}
    for t in there:
        nearest = int(shares[t].argmax())
        moved[t] = _moved(shapes[nearest], frames[t], frames[known[nearest]], flow)
    farthest = sorted(there, key=lambda t: -abs(beyond[t]))[:FITTED]
    change = sum(beyond[t] * (moved[t] - mixed[t]) for t in farthest)
    change = change / sum(beyond[t] ** 2 for t in farthest)
    return {t: (mixed[t] + beyond[t] * change + moved[t]) / 2 for t in there}
