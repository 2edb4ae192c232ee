"""Which frames make a clip; the same clip whatever the workers; the order of clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import Compose

from discovr_monai.base.types import CineError
from discovr_monai.data.clips.dataset import ClipDataset, EpochSampler, SharedBatches
from discovr_monai.data.clips.transforms import RandScaleCropd, SampleClipd, clip_indices


@given(
    length=st.integers(1, 200), frames=st.integers(1, 80), stride=st.floats(1, 6),
    start=st.floats(0, 1), mode=st.sampled_from(["loop", "reflect", "repeat", "zero"]),
)  # fmt: skip
def test_as_many_distinct_frames_as_the_cine_has(length, frames, stride, start, mode):
    first = float(int(start * (length - 1)))
    index = clip_indices(length, frames, stride, first, mode)
    assert index.shape == (frames,)
    real = index[index >= 0]
    assert ((real >= 0) & (real < length)).all()
    assert len(np.unique(real)) == min(frames, length)
    assert (index >= 0).all() or mode == "zero"
    assert np.array_equal(index, clip_indices(length, frames, stride, first, mode))


@given(length=st.integers(2, 300), frames=st.integers(2, 64), stride=st.integers(1, 5))
def test_a_long_cine_is_sampled_at_the_stride(length, frames, stride):
    if (frames - 1) * stride + 1 <= length:
        index = clip_indices(length, frames, stride, 0)
        assert np.array_equal(np.diff(index), np.full(frames - 1, stride))


def test_sampling_by_time_spans_the_same_seconds():
    sample = SampleClipd(num_frames=16, duration=2.0)
    for fps in (18, 50, 138):
        index = sample.indices(1000, fps)[0]
        assert (index[-1] - index[0]) / fps == pytest.approx(2.0 * 15 / 16, abs=1 / fps)


def test_evaluation_is_centred_or_evenly_spaced():
    assert SampleClipd(num_frames=4, stride=2).indices(21, None).tolist() == [[7, 9, 11, 13]]
    clips = SampleClipd(num_frames=4, stride=2, num_clips=3).indices(21, None)
    assert clips[:, 0].tolist() == [0, 7, 14]


def test_shapes():
    cine = np.arange(2 * 30 * 3 * 3, dtype=np.uint8).reshape(2, 30, 3, 3)
    one = SampleClipd(num_frames=4, stride=2)({"image": cine})["image"]
    many = SampleClipd(num_frames=4, stride=2, num_clips=3)({"image": cine})["image"]
    assert one.shape == (2, 4, 3, 3)
    assert many.shape == (3, 2, 4, 3, 3)
    assert one.dtype == torch.uint8
    short = SampleClipd(num_frames=4, stride=1, pad_mode="zero")({"image": cine[:, :2] + 1})[
        "image"
    ]
    assert not short[:, 2:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": -1}, "stride -1 must be at least 1 frame"),
        ({"stride": 1, "num_frames": 0}, "num_frames 0 and num_clips 1 must be at least 1"),
        ({"stride": 1, "duration": 1.0}, "exactly one of stride"),
        ({}, "exactly one of stride"),
        ({"duration": -2.0}, "duration -2.0 must be above 0 seconds"),
        ({"stride": 1, "pad_mode": "wrap"}, "pad_mode 'wrap' must be one of loop, reflect"),
    ],
)
def test_senseless_options(options, message):
    with pytest.raises(ValueError, match=message):
        SampleClipd(**options)


def test_more_frames_than_exist():
    row = {"image": np.zeros((1, 10, 4, 4), np.uint8), "name": "sub/a.avi"}
    message = "sub/a.avi: it has 10 frames, a clip needs 22. Lower num_frames or stride"
    with pytest.raises(CineError, match=message):
        SampleClipd(num_frames=8, stride=3, pad_mode="refuse")(row)


def test_by_time_without_a_frame_rate():
    row = {"image": np.zeros((1, 10, 4, 4), np.uint8), "name": "a.avi"}
    with pytest.raises(CineError, match="a.avi: its frame rate is unknown.*default_fps"):
        SampleClipd(num_frames=4, duration=1.0)(row)
    SampleClipd(num_frames=4, duration=0.2, default_fps=30)(row)


def test_crops_are_the_same_window_in_all_frames():
    frame = torch.randint(0, 255, (1, 1, 16, 16), dtype=torch.uint8)
    clip = frame.expand(1, 5, 16, 16)
    crop = RandScaleCropd(scales=(0.5,)).set_random_state(0)
    out = crop({"image": clip})["image"]
    assert out.shape == clip.shape
    assert (out == out[:, :1]).all()
    assert not torch.equal(out, clip)
    assert torch.equal(RandScaleCropd(scales=(1,))({"image": clip})["image"], clip)


class Cine:
    def __call__(self, row):
        return {
            **row,
            "image": np.random.default_rng(row["seed"]).integers(
                0, 255, (1, 50, 8, 8), dtype=np.uint8
            ),
        }


def dataset():
    steps = [Cine(), SampleClipd(num_frames=4, stride=3, random=True), RandScaleCropd()]
    return ClipDataset([{"seed": i} for i in range(10)], Compose(steps), seed=7)


def test_clips_do_not_depend_on_workers_or_order():
    sampler = EpochSampler(10, 5, seed=1)
    sampler.set_epoch(3)
    loaders = [
        torch.utils.data.DataLoader(dataset(), 5, sampler=sampler, num_workers=n) for n in (0, 2)
    ]
    alone, helped = ([batch["image"] for batch in loader] for loader in loaders)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    data = dataset()
    late, early = data[(3, 2)]["image"], data[(3, 1)]["image"]
    again = dataset()
    assert torch.equal(again[(3, 1)]["image"], early)
    assert torch.equal(again[(3, 2)]["image"], late)
    assert not torch.equal(again[(4, 2)]["image"], late)


@given(length=st.integers(4, 60), batch=st.integers(1, 3), epoch=st.integers(0, 5))
def test_ranks_share_the_global_batch(length, batch, epoch):
    one = EpochSampler(length, 2 * batch, seed=1)
    two = [EpochSampler(length, batch, seed=1, rank=r, world_size=2) for r in (0, 1)]
    for sampler in (one, *two):
        sampler.set_epoch(epoch)
    order, parts = list(one), [list(s) for s in two]
    joined = []
    for i in range(0, len(parts[0]), batch):
        joined += parts[0][i : i + batch] + parts[1][i : i + batch]
    assert joined == order
    assert len({i for _, i in order}) == len(order) == length // (2 * batch) * 2 * batch


def test_the_sampler_goes_on_where_it_was():
    sampler = EpochSampler(20, 3, seed=2)
    whole = list(sampler)
    sampler.set_position(4)
    assert list(sampler) == whole[12:]
    sampler.set_position(0)
    sampler.set_epoch(1)
    assert [i for _, i in sampler] != [i for _, i in whole]


@given(length=st.integers(0, 60), batch=st.integers(1, 5), ranks=st.integers(1, 4))
def test_ranks_share_a_pass_and_make_equally_many_batches(length, batch, ranks):
    samplers = [SharedBatches(length, batch, rank=r, world_size=ranks) for r in range(ranks)]
    found = [list(s) for s in samplers]
    shared = samplers[0].shared
    assert {len(f) for f in found} == {len(s) for s in samplers} == {len(found[0])}
    together = [i for number in range(shared) for f in found for i in f[number]]
    assert all(f[shared:] == found[0][shared:] for f in found)
    assert together + [i for b in found[0][shared:] for i in b] == list(range(length))
    assert sum(map(len, found[0][shared:])) < batch * ranks
