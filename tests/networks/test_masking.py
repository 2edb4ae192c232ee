from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from discovr_monai.networks.masking import (
    TubeMasking,
    boolean_mask,
    visible_indices,
    visible_tokens,
    visible_tubes,
)


def tube_masks(noise, grid, ratio):
    """As booleans, (..., t * h * w)."""
    return boolean_mask(visible_tubes(noise, grid, ratio), grid[0] * grid[1] * grid[2])


def token_masks(noise, kept):
    return boolean_mask(visible_tokens(noise, kept), noise.shape[-1])


def noise(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@given(
    batch=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    ratio=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_tubes_hide_the_same_places_at_all_times(batch, grid, ratio, seed):
    t, h, w = grid
    mask = tube_masks(noise(seed, batch, h * w), grid, ratio)
    assert mask.shape == (batch, t * h * w)
    assert mask.dtype == torch.bool
    tubes = mask.view(batch, t, h * w)
    assert (tubes == tubes[:, :1]).all()
    assert (tubes[:, 0].sum(1) == int(ratio * h * w)).all()


def test_the_paper_hides_44_of_49_places():
    mask = tube_masks(noise(0, 2, 49), (32, 7, 7), 0.9)
    assert mask.view(2, 32, 49)[:, 0].sum(1).tolist() == [44, 44]
    assert visible_indices(mask).shape == (2, 32 * 5)


@given(seed=st.integers(0, 2**31), views=st.integers(1, 3))
def test_visible_indices_are_the_unmasked_places_in_raster_order(seed, views):
    mask = tube_masks(noise(seed, views, 2, 9), (2, 3, 3), 0.6)
    keep = visible_indices(mask)
    for row, found in zip(mask.flatten(0, 1), keep.flatten(0, 1), strict=True):
        assert found.tolist() == torch.nonzero(~row)[:, 0].tolist()


@given(seed=st.integers(0, 2**31))
def test_positions_and_booleans_are_inverse(seed):
    visible = visible_tubes(noise(seed, 2, 3, 9), (2, 3, 3), 0.6)
    mask = boolean_mask(visible, 18)
    assert torch.equal(visible_indices(mask), visible)
    assert visible_indices(visible) is visible
    assert boolean_mask(mask, 18) is mask


def test_uneven_masks_are_refused():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match="equally many tokens visible, got 1 to 2"):
        visible_indices(mask)


def test_a_ratio_of_one_is_refused():
    with pytest.raises(ValueError, match=r"mask ratio 1.0 must lie in \[0, 1\)"):
        tube_masks(noise(0, 1, 4), (1, 2, 2), 1.0)


def test_ranks_see_their_rows_of_the_global_batch():
    masking = TubeMasking(2, 0.5, seed=3, teacher_keep=0.5)
    sizes = {"video_grid": (2, 3, 3), "image_grid": (1, 3, 3), "frames": 4}
    video, image, teacher = masking(7, range(6), **sizes)
    parts = [masking(7, range(i, i + 2), **sizes) for i in (0, 2, 4)]
    assert torch.equal(torch.cat([p[0] for p in parts], 1), video)
    assert torch.equal(torch.cat([p[1] for p in parts], 1), image)
    assert torch.equal(torch.cat([p[2] for p in parts]), teacher)
    assert video.shape == (3, 6, 2 * 5)  # int(0.5 * 9) of 9 places are masked
    assert image.shape == (2, 24, 5)
    assert teacher.shape == (6, 9)


def test_masks_follow_seed_and_step():
    first = TubeMasking(seed=1)(0, range(4), video_grid=(2, 4, 4))[0]
    again = TubeMasking(seed=1)(0, range(4), video_grid=(2, 4, 4))[0]
    later = TubeMasking(seed=1)(1, range(4), video_grid=(2, 4, 4))[0]
    other = TubeMasking(seed=2)(0, range(4), video_grid=(2, 4, 4))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)


def test_masks_of_clips_steps_and_kinds_differ_and_are_evenly_spread():
    masking = TubeMasking(1, 0.5, seed=3)
    sizes = {"video_grid": (1, 4, 4), "image_grid": (1, 4, 4), "frames": 2}
    video, image = zip(*(masking(step, range(50), **sizes)[:2] for step in range(4)), strict=True)
    rows = torch.cat((torch.stack(video).flatten(0, -2), torch.stack(image).flatten(0, -2)))
    rows = boolean_mask(rows, 16)
    assert len(rows.unique(dim=0)) > 0.9 * len(rows)
    hidden = rows.float().mean(0)
    assert 0.42 < float(hidden.min()) <= float(hidden.max()) < 0.58


@given(
    batch=st.integers(1, 5),
    tokens=st.integers(1, 60),
    share=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**31),
)
def test_every_clip_keeps_as_many_tokens_for_the_teacher(batch, tokens, share, seed):
    kept = TubeMasking(teacher_keep=share).teacher_tokens(tokens)
    assert 1 <= kept <= tokens
    assert abs(kept - share * tokens) <= 0.5 or kept == 1
    mask = token_masks(noise(seed, batch, tokens), kept)
    assert mask.shape == (batch, tokens)
    assert mask.dtype == torch.bool
    assert ((~mask).sum(1) == kept).all()


def test_the_teacher_sees_every_place_at_some_times():
    """Of 32 times, about half of each place: a tube would hide a place at all of them."""
    mask = boolean_mask(
        TubeMasking(teacher_keep=0.5)(0, range(4), video_grid=(32, 7, 7)).teacher, 32 * 49
    )
    seen = (~mask).view(4, 32, 49).sum(1)  # times of each place
    assert int((~mask).sum(1).unique()) == 784
    assert 3 <= int(seen.min()) < int(seen.max()) <= 29
    assert not torch.equal(mask[0], mask[1])


def test_hiding_tokens_from_the_teacher_leaves_the_students_masks_as_they_are():
    sizes = {"video_grid": (2, 3, 3), "image_grid": (1, 3, 3), "frames": 4}
    whole = TubeMasking(2, 0.5, seed=3)(7, range(6), **sizes)
    part = TubeMasking(2, 0.5, seed=3, teacher_keep=0.5)(7, range(6), **sizes)
    assert whole[2] is None
    assert torch.equal(whole[0], part[0])
    assert torch.equal(whole[1], part[1])
    later = TubeMasking(2, 0.5, seed=3, teacher_keep=0.5)(8, range(6), **sizes)
    assert not torch.equal(part[2], later[2])


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_of_the_teachers_tokens_that_cannot_be(share):
    with pytest.raises(ValueError, match=rf"teacher_keep {share} must lie in \(0, 1\]"):
        TubeMasking(teacher_keep=share)
