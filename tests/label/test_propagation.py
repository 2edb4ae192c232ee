"""Contours carried from a few frames to all: exact where it is drawn, close where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discovr_monai.evaluation.features.encoders import Backbone
from discovr_monai.evaluation.heads.contours import dice
from discovr_monai.label.learn.propagation import (
    frame_features,
    labels_of,
    mixture,
    phase,
    propagate,
    propagate_by_flow,
    signed_distances,
    thinnest,
)


def heart(radius: float, size: int = 48) -> np.ndarray:
    """A cavity (1) in a thin wall (2)."""
    y, x = np.ogrid[:size, :size]
    far = np.hypot(y - size / 2, x - size / 2)
    return np.where(far < radius, 1, np.where(far < radius + 2, 2, 0)).astype(np.uint8)


BEAT = np.cos(np.linspace(0, 2 * np.pi, 17)[:-1])  # ED at 0, ES at 8
TRUTH = np.stack([heart(13 + 4 * a) for a in BEAT])
FRAMES = (255 * (TRUTH == 2)).astype(np.uint8)
FEATURES = np.stack([BEAT, 2 * BEAT, 0.1 * np.sin(np.arange(16))], 1)


def no_flow(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    return np.zeros((2, *target.shape))


def forbidden(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    raise AssertionError("nothing lies beyond what was drawn")


def scaled(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The true flow between two rings."""
    sizes = [
        np.hypot(*(np.argwhere(f > 0.5) - np.array(f.shape) / 2).T).max() for f in (target, source)
    ]
    places = np.indices(target.shape) - (np.array(target.shape) / 2)[:, None, None]
    return places * (sizes[1] / sizes[0] - 1)


def test_with_every_frame_drawn_nothing_changes():
    drawn = dict(enumerate(TRUTH))
    for found in (propagate(FRAMES, drawn, FEATURES, forbidden), propagate_by_flow(FRAMES, drawn)):
        assert (found == TRUTH).all() and found.dtype == np.uint8


def test_ed_and_es_give_the_beat_and_its_thin_wall():
    found = propagate(FRAMES, {0: TRUTH[0], 8: TRUTH[8]}, FEATURES, forbidden)
    for value, least in ((1, 0.94), (2, 0.7)):
        scores = [dice(TRUTH[t] == value, found[t] == value) for t in range(16)]
        assert min(scores) > least
    assert (found[0] == TRUTH[0]).all() and (found[8] == TRUTH[8]).all()


def test_the_frame_between_is_not_the_nearest_one():
    found = propagate(FRAMES, {0: TRUTH[0], 8: TRUTH[8]}, FEATURES, forbidden)
    area = (found == 1).sum((1, 2))
    assert (np.diff(area[:9]) <= 0).all() and (np.diff(area[8:]) >= 0).all()
    assert len(np.unique(area[:9])) >= 7


@pytest.mark.parametrize("drawn", [[0], [8], [3, 5]])
def test_what_lies_beyond_follows_the_flow(drawn):
    found = propagate(FRAMES, {t: TRUTH[t] for t in drawn}, FEATURES, scaled)
    still = propagate(FRAMES, {t: TRUTH[t] for t in drawn}, FEATURES, no_flow)
    moved, kept = (
        np.mean([dice(TRUTH[t] == 1, maps[t] == 1) for t in range(16)]) for maps in (found, still)
    )
    assert moved > kept + 0.01 and moved > 0.9


def test_the_baseline_moves_the_nearest_contour():
    found = propagate_by_flow(FRAMES, {0: TRUTH[0]}, scaled)
    assert min(dice(TRUTH[t] == 1, found[t] == 1) for t in range(16)) > 0.9
    kept = propagate_by_flow(FRAMES, {0: TRUTH[0], 8: TRUTH[8]}, no_flow)
    assert (kept[2] == TRUTH[0]).all() and (kept[6] == TRUTH[8]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_shares_are_a_mixture(count, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(9, 6)).astype(np.float32)
    drawn = sorted(rng.choice(9, count, replace=False).tolist())
    shares = mixture(features, drawn)
    assert shares.shape == (9, count) and (shares >= 0).all()
    assert shares.sum(1) == pytest.approx(np.ones(9))
    assert (shares[drawn] == np.eye(count)).all()
    inner = rng.dirichlet(np.ones(count))  # a point of the hull is found again
    found = mixture(np.vstack((features, inner @ features[drawn])), drawn)[-1]
    assert found == pytest.approx(inner, abs=1e-3)


def test_alike_frames_share_alike():
    assert mixture(np.zeros((5, 3)), [1, 3])[0] == pytest.approx([0.5, 0.5])
    assert (phase(np.zeros((5, 3))) == 0).all()
    assert abs(np.corrcoef(phase(FEATURES), BEAT)[0, 1]) > 0.999


@settings(max_examples=20, deadline=None)
@given(st.floats(3, 20), st.integers(1, 3))
def test_labels_survive_their_distances(radius, classes):
    labels = np.minimum(heart(radius), classes)
    shapes = signed_distances(labels, classes)
    assert (labels_of(shapes, thinnest(shapes[None])) == labels).all()


def test_the_wall_is_the_thinnest_that_is_there():
    labels = 3 * (heart(9) == 2) + (heart(9) == 1)
    assert thinnest(signed_distances(labels, 3)[None]) == 3


def test_a_large_frame_is_tracked_on_a_small_one():
    size = 300
    y, x = np.ogrid[:size, :size]
    disc = [(np.hypot(y - 150, x - 150) < r).astype(np.uint8) for r in (90, 70)]
    seen = []

    def flow(target, source):
        seen.append(target.shape)
        return scaled(target, source)

    frames = np.stack([255 * d for d in disc])
    found = propagate_by_flow(frames, {0: disc[0]}, flow)
    assert max(seen[0]) <= 128 and dice(found[1] == 1, disc[1] == 1) > 0.97


def test_what_cannot_be_propagated_is_said():
    with pytest.raises(ValueError, match="nothing is drawn"):
        propagate(FRAMES, {0: np.zeros_like(TRUTH[0])}, FEATURES)
    with pytest.raises(ValueError, match="frame 99 is drawn"):
        propagate(FRAMES, {99: TRUTH[0]}, FEATURES)
    with pytest.raises(ValueError, match="own frames"):
        propagate_by_flow(FRAMES, {0: TRUTH[0][:20]})


class Means(Backbone):
    """Tokens that are their frames' mean brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_shape, self.grid = (3, 4, 8, 8), (2, 2, 2)
        self.tubelet_size, self.token_dim = 2, 1

    def tokens(self, clip):
        means = clip.mean((1, 3, 4)).unflatten(1, (2, 2))[:, :, 0]  # a tubelet's first frame
        return means[:, :, None, None, None].expand(-1, -1, 2, 2, 1)


@pytest.mark.parametrize("length", [1, 3, 11])
def test_features_are_of_the_clip_that_has_the_frame_in_its_middle(length):
    cine = np.tile(np.arange(length, dtype=np.uint8)[None, :, None, None], (1, 1, 8, 8))
    found = frame_features(Means(), lambda b: b["image"].float(), cine, batch_size=4)
    times = np.arange(length)
    assert found.shape == (length, 4)
    assert found[:, 0] == pytest.approx((times + np.maximum(times - 2, 0)) / 2)


def test_flow_of_scikit_image():
    pytest.importorskip("skimage", reason="scikit-image comes with the label extra")
    from discovr_monai.label.learn.propagation import lucas_kanade

    noise = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 68, 68), 5, 1)[0, 0].numpy()
    found = lucas_kanade(noise[:60, :60], np.roll(noise, 1, 0)[:60, :60])
    assert np.median(found[0][10:-10, 10:-10]) == pytest.approx(1, abs=0.2)
