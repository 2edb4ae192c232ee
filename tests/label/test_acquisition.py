"""What to annotate next: invariants of the strategies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from discovr_monai.label.learn.acquisition import STRATEGIES, choose, farthest, mean_entropy


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from(STRATEGIES),
    total=st.integers(1, 12),
    count=st.integers(1, 14),
    seed=st.integers(0, 999),
)
def test_each_unlabelled_cine_at_most_once(strategy, total, count, seed):
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero(rng.random(total) < 0.3).tolist()
    features, unsure = rng.normal(size=(total, 3)), rng.random(total)
    options = {"uncertainty": unsure, "seed": seed}
    found = choose(strategy, features, labelled, count, **options)
    assert len(found) == len(set(found)) == min(count, total - len(labelled))
    assert not set(found) & set(labelled)
    assert found == choose(strategy, features, labelled, count, **options)
    assert found[:2] == choose(strategy, features, labelled, min(count, 2), **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_coverage_takes_the_farthest_and_its_radius_shrinks(seed, begun):
    features = np.random.default_rng(seed).normal(size=(15, 2))
    centres = [4] if begun else []
    radii = []
    for number in choose("coverage", features, centres, 6):
        if centres:
            apart = cdist(features, features[centres]).min(1)
            assert apart[number] == pytest.approx(apart.max())
            radii.append(apart.max())
        centres.append(number)
    assert radii == sorted(radii, reverse=True)
    assert farthest(features, centres)[centres] == pytest.approx(np.zeros(len(centres)))


def test_coverage_begins_in_the_middle_and_visits_every_cluster():
    rng = np.random.default_rng(0)
    middles = np.array([[0, 0], [10, 0], [0, 10], [-10, -10]])
    features = np.repeat(middles, 5, 0) + 0.1 * rng.normal(size=(20, 2))
    found = choose("coverage", features, [], 4)
    assert found[0] < 5
    assert {i // 5 for i in found} == {0, 1, 2, 3}


def test_both_wants_far_and_unsure():
    features = np.array([[0.0], [1.0], [2.0], [3.0], [9.0], [10.0]])
    unsure = np.array([0.0, 0.9, 0.2, 0.3, 0.8, 0.1])
    assert choose("uncertainty", features, [0], 1, uncertainty=unsure) == [1]
    assert choose("coverage", features, [0], 1) == [5]
    assert choose("both", features, [0], 1, uncertainty=unsure) == [4]


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="must be one of coverage"):
        choose("best", np.zeros((2, 1)), [])
    with pytest.raises(ValueError, match="needs the uncertainty"):
        choose("both", np.zeros((2, 1)), [])


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1e4, 0.0)])
def test_entropy_from_sure_to_clueless(scale, expected):
    class Fixed:
        def every_frame(self, clips):
            logits = torch.zeros(len(clips), 4, 3, 2, 2)
            logits[:, :, 1] = scale
            return logits

    assert mean_entropy(Fixed(), torch.zeros(2, 3, 4, 8, 8)) == pytest.approx(expected, abs=1e-6)  # type: ignore[arg-type]


def test_entropy_of_two_of_four_classes():
    class Halves:
        def every_frame(self, clips):
            logits = torch.full((1, 1, 4, 1, 1), -1e9)
            logits[:, :, :2] = 0
            return logits

    found = mean_entropy(Halves(), torch.zeros(1, 3, 1, 8, 8))  # type: ignore[arg-type]
    assert found == pytest.approx(math.log(2) / math.log(4))
