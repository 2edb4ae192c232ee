"""Augmentation: consistent over time, masks follow, nothing happens at 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from discovr_monai.base.types import Stretch
from discovr_monai.data.clips.augment import AUGMENTATIONS, ultrasound_augmentation
from discovr_monai.data.clips.dataset import EpochSampler
from discovr_monai.data.clips.transforms import SampleClipd
from discovr_monai.phantom.cine import simulate_cine

STRENGTHS = {
    "rotation": 20, "tilt": 20, "depth": 0.3, "gain": 0.2, "speckle": 0.3, "haze": 0.5,
    "shadow": 0.9, "cutout": 0.5, "reverse": 1.0,
}  # fmt: skip
GEOMETRIC = ("rotation", "depth")


@pytest.fixture(scope="module")
def heart():
    return simulate_cine(0, num_frames=16, size=64)


def row(heart):
    image = torch.from_numpy(heart.frames)[None]
    return {"image": image, "mask": torch.from_numpy(heart.masks)[None]}


def made(name, heart, seed=1):
    transform = AUGMENTATIONS[name](STRENGTHS[name])
    transform.set_random_state(seed=seed)
    return transform(row(heart))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_it_changes_the_clip_and_keeps_its_kind(name, heart):
    out = made(name, heart)
    assert out["image"].shape == (1, 16, 64, 64) and out["image"].dtype == torch.uint8
    assert out["mask"].shape == (1, 16, 64, 64) and out["mask"].dtype == torch.uint8
    assert not torch.equal(out["image"], row(heart)["image"])
    assert torch.equal(out["image"], made(name, heart)["image"]), "not a function of the seed"
    other = any(not torch.equal(made(name, heart, s)["image"], out["image"]) for s in (2, 3, 4))
    assert other or name == "reverse"


@pytest.mark.parametrize("name", [n for n in AUGMENTATIONS if n != "reverse"])
def test_all_frames_are_changed_alike(name, heart):
    still = {"image": torch.from_numpy(heart.frames[:1]).repeat(6, 1, 1)[None]}
    transform = AUGMENTATIONS[name](STRENGTHS[name])
    transform.set_random_state(seed=1)
    out = transform(still)["image"]
    assert (out == out[:, :1]).all()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_masks_follow_the_anatomy(name, heart):
    """Moving the mask with the image is the same as moving the mask as an image."""
    out = made(name, heart)
    if name in GEOMETRIC:
        lumen = (heart.masks == 1).astype(np.uint8) * 255
        transform = AUGMENTATIONS[name](STRENGTHS[name])
        transform.set_random_state(seed=1)
        moved = transform({"image": torch.from_numpy(lumen)[None]})["image"] > 127
        agree = (moved == (out["mask"] == 1)).float().mean()
        assert agree > 0.995 and not torch.equal(out["mask"], row(heart)["mask"])
    elif name == "reverse":
        assert torch.equal(out["mask"], row(heart)["mask"].flip(1))
    elif name != "tilt":
        assert torch.equal(out["mask"], row(heart)["mask"])


@pytest.mark.parametrize("name", ["tilt", "gain", "speckle", "haze", "shadow", "cutout"])
def test_the_sector_stays(name, heart):
    out = made(name, heart)
    outside = ~(row(heart)["image"] > 0).any(1)
    assert not (out["image"].amax(1)[outside] > 0).any()


def test_only_what_is_asked_for(heart):
    nothing = ultrasound_augmentation(dict.fromkeys(AUGMENTATIONS, 0))
    assert torch.equal(nothing(row(heart))["image"], row(heart)["image"])
    assert len(ultrasound_augmentation({"gain": 0.1, "haze": 0}).transforms) == 1
    with pytest.raises(ValueError, match="augmentation 'colour' is unknown; there are rotation"):
        ultrasound_augmentation({"colour": 1})
    with pytest.raises(ValueError, match=r"RandShadowd: strength 3 must lie in 0..1"):
        ultrasound_augmentation({"shadow": 3})


def test_speed_changes_the_pace():
    transform = SampleClipd(num_frames=8, stride=4, random=True, speed=2.0)
    transform.set_random_state(seed=0)
    spans = [int(np.ptp(transform.indices(200, None)[0])) for _ in range(60)]
    assert 13 <= min(spans) < 20 and 42 < max(spans) <= 57
    with pytest.raises(ValueError, match=r"speed 0.5 must lie in 1..4"):
        SampleClipd(num_frames=8, stride=4, speed=0.5)


# ---- the order of shards -------------------------------------------------------------------


def shard_sampler(world=1, rank=0, window=2, length=64, per_shard=8, batch=2, seed=3):
    shards = [f"s{i // per_shard}" for i in range(length)]
    return EpochSampler(
        length, batch, seed=seed, rank=rank, world_size=world, shards=shards, window=window
    )


def rows(sampler, epoch=1):
    sampler.set_epoch(epoch)
    return [index for _, index in sampler]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_the_shards_without_overlap(world):
    parts = [rows(shard_sampler(world, rank)) for rank in range(world)]
    assert len({len(p) for p in parts}) == 1
    seen = [i for p in parts for i in p]
    assert len(seen) == len(set(seen)) >= 64 - 2 * world
    read = [{i // 8 for i in p} for p in parts]
    assert sum(map(len, read)) <= 8 + world - 1, "more than one shard is read by two ranks"


def test_few_shards_are_open_at_a_time():
    order = [i // 8 for i in rows(shard_sampler(window=2))]
    for first in range(0, 64, 16):
        assert len(set(order[first : first + 16])) == 2
    assert order != sorted(order) and rows(shard_sampler()) != rows(shard_sampler(), epoch=2)
    mixed = rows(shard_sampler(window=2))[:16]
    assert len({i // 8 for i in mixed[:8]}) == 2, "not shuffled among the open shards"


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("before", [[1], [2], [4], [3], [4, 2], [1, 3, 2]])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_epoch_resumes_on_any_number_of_ranks_any_number_of_times(before, after, window):
    done, stretches = [], []
    for ranks in before:
        for rank in range(ranks):
            sampler = shard_sampler(ranks, rank, window)
            sampler.set_position(0, stretches)
            done += rows(sampler)[: 2 * 3]  # three batches
        stretches.append(Stretch(ranks, 2, 3))
    rest = []
    for rank in range(after):
        sampler = shard_sampler(after, rank, window)
        sampler.set_position(0, stretches)
        rest += rows(sampler)
        assert sampler.left * 2 == len(rows(sampler))
    assert len(done) == len(set(done)) == sum(before) * 6
    assert not set(done) & set(rest) and len(rest) == len(set(rest))
    assert 64 - len(done) - len(rest) < 2 * after


def test_the_rest_of_an_epoch_is_read_from_any_position_of_it():
    sampler = shard_sampler(2, 1, 0)
    stretches = [Stretch(4, 2, 2), Stretch(1, 2, 1)]
    sampler.set_position(0, stretches)
    whole = rows(sampler)
    sampler.set_position(2, stretches)
    assert rows(sampler) == whole[4:]
