from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from discovr_monai.masking import TubeMasking, tube_masks, visible_indices


@given(
    batch=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    ratio=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_tubes_hide_the_same_places_at_all_times(batch, grid, ratio, seed):
    t, h, w = grid
    mask = tube_masks(batch, grid, ratio, generator=torch.Generator().manual_seed(seed))
    assert mask.shape == (batch, t * h * w)
    assert mask.dtype == torch.bool
    tubes = mask.view(batch, t, h * w)
    assert (tubes == tubes[:, :1]).all()
    assert (tubes[:, 0].sum(1) == int(ratio * h * w)).all()


def test_the_paper_hides_44_of_49_places():
    mask = tube_masks(2, (32, 7, 7), 0.9)
    assert mask.view(2, 32, 49)[:, 0].sum(1).tolist() == [44, 44]
    assert visible_indices(mask).shape == (2, 32 * 5)


@given(seed=st.integers(0, 2**31), views=st.integers(1, 3))
def test_visible_indices_are_the_unmasked_places_in_raster_order(seed, views):
    generator = torch.Generator().manual_seed(seed)
    mask = tube_masks(views * 2, (2, 3, 3), 0.6, generator=generator).view(views, 2, -1)
    keep = visible_indices(mask)
    for row, found in zip(mask.flatten(0, 1), keep.flatten(0, 1), strict=True):
        assert found.tolist() == torch.nonzero(~row)[:, 0].tolist()


def test_uneven_masks_are_refused():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match="equally many tokens visible, got 1 to 2"):
        visible_indices(mask)


def test_a_ratio_of_one_is_refused():
    with pytest.raises(ValueError, match=r"mask ratio 1.0 must lie in \[0, 1\)"):
        tube_masks(1, (1, 2, 2), 1.0)


def test_ranks_see_their_rows_of_the_global_batch():
    masking = TubeMasking(2, 0.5, seed=3)
    sizes = {"video_grid": (2, 3, 3), "image_grid": (1, 3, 3), "frames": 4}
    video, image = masking(7, slice(0, 6), 6, **sizes)
    parts = [masking(7, slice(i, i + 2), 6, **sizes) for i in (0, 2, 4)]
    assert torch.equal(torch.cat([p[0] for p in parts], 1), video)
    assert torch.equal(torch.cat([p[1] for p in parts], 1), image)
    assert video.shape == (3, 6, 18)
    assert image.shape == (2, 24, 9)


def test_masks_follow_seed_and_step():
    first = TubeMasking(seed=1)(0, slice(0, 4), 4, video_grid=(2, 4, 4))[0]
    again = TubeMasking(seed=1)(0, slice(0, 4), 4, video_grid=(2, 4, 4))[0]
    later = TubeMasking(seed=1)(1, slice(0, 4), 4, video_grid=(2, 4, 4))[0]
    other = TubeMasking(seed=2)(0, slice(0, 4), 4, video_grid=(2, 4, 4))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, other)
