"""Doubtful labels are found, and sound ones are not."""

from __future__ import annotations

import numpy as np
import pytest

from discovr_monai.label.learn.plausibility import agreement, plausibility


def disc(radius: float, size: int = 64) -> np.ndarray:
    y, x = np.ogrid[:size, :size]
    return (np.hypot(y - size / 2, (x - size / 2) * 1.6) < radius).astype(np.uint8)


@pytest.fixture
def beat() -> np.ndarray:
    return np.stack([disc(22 + 4 * np.cos(t)) for t in np.linspace(0, 2 * np.pi, 24)])


def test_a_beating_heart_is_plausible(beat):
    found = plausibility(beat)
    assert found.score == 1 and not found.reasons and not found.ef_out_of_range
    assert 30 < found.ef < 75 and found.roughness < 0.2


def test_a_jump_is_named_and_roughens(beat):
    smooth = plausibility(beat).roughness
    beat[7] = disc(12)
    found = plausibility(beat)
    assert found.reasons == {7: "the area jumps"}
    assert found.score == pytest.approx(23 / 24) and found.roughness > 3 * smooth


def test_parts_apart_are_named_but_not_specks(beat):
    beat[3, :9, :9] = 1
    beat[5, 0, 0] = 1
    assert plausibility(beat).reasons == {3: "a structure in several parts"}


def test_a_lost_cavity_is_named(beat):
    beat[9] = 2 * beat[9]
    assert plausibility(beat).reasons == {9: "no cavity"}


def test_a_heart_that_does_not_beat_is_not_one():
    found = plausibility(np.stack([disc(20)] * 12))
    assert found.ef_out_of_range and found.score == 0 and not found.reasons


def test_few_frames_say_nothing_of_the_beat(beat):
    beat[2:9] = 0
    beat[11:] = 0
    found = plausibility(beat)
    assert np.isnan(found.ef) and found.score == 1
    with pytest.raises(ValueError, match="no frame is labelled"):
        plausibility(np.zeros_like(beat))


def test_agreement_looks_at_shared_frames_only(beat):
    other = beat.copy()
    other[4:] = 0
    other[0] = np.roll(other[0], 8, 0)
    same = agreement(beat, other, 3)
    assert set(same) == {1} and 0.9 < same[1] < 1
    assert agreement(beat, beat, 3) == {1: 1.0}
    assert agreement(beat, 0 * beat, 3) == {}
    with pytest.raises(ValueError, match="not of one cine"):
        agreement(beat, beat[:3], 1)
