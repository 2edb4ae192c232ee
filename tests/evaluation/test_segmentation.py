"""Contours, label maps and clips around labelled frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice

from discovr_monai.base.types import CineError
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists.datalist import Datalist
from discovr_monai.data.lists.scan import load_datalist
from discovr_monai.data.read.masks import read_masks, window_masks
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder
from discovr_monai.evaluation.heads.contours import (
    dice,
    ejection_fraction,
    grid_ceiling,
    largest_component,
    simpson_volume,
)
from discovr_monai.evaluation.heads.segmenter import SegmentationHead, cover, frames_around
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.segmentation_report import frame_figures
from discovr_monai.evaluation.tasks.segmentation import Segmentation
from tests.evaluation.conftest import write_checkpoint


def ellipse(rows: float, columns: float, size: int = 64, centre=(32, 32)) -> np.ndarray:
    y, x = np.ogrid[:size, :size]
    return ((y - centre[0]) / rows) ** 2 + ((x - centre[1]) / columns) ** 2 <= 1


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 60),
    num_frames=st.sampled_from([2, 4, 8]),
    stride=st.integers(1, 4),
    slot=st.integers(0, 1),
    data=st.data(),
)
def test_a_clip_holds_the_frame_it_is_for(length, num_frames, stride, slot, data):
    frame = data.draw(st.integers(0, length - 1))
    steps, position = frames_around(length, frame, num_frames, stride, slot, 2)
    assert steps[position] == frame and position % 2 == slot
    assert len(steps) == num_frames and steps.min() >= 0 and steps.max() < length
    assert (np.diff(steps) >= 0).all()
    if length >= 2 * num_frames * stride:  # long enough: at an end, one frame may come twice
        assert (np.diff(steps) == stride).sum() >= num_frames - 2


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 80), st.sampled_from([2, 8]), st.integers(1, 5))
def test_clips_cover_every_frame(length, num_frames, stride):
    clips = list(cover(length, num_frames, stride))
    assert set(np.concatenate(clips)) == set(range(length))
    assert all(len(c) == num_frames for c in clips)


def test_simpson_of_an_ellipsoid():
    mask = ellipse(24, 12)  # pixels of 1.5 mm: half axes 36 and 18 mm
    expected = 4 / 3 * np.pi * 36 * 18**2 / 1000
    assert simpson_volume(mask, (1.5, 1.5)) == pytest.approx(expected, rel=0.03)
    assert simpson_volume(mask.T, (1.5, 1.5)) == pytest.approx(expected, rel=0.03)
    assert simpson_volume(np.zeros((8, 8), bool), (1, 1)) == 0


def test_simpson_uses_the_largest_part_only():
    mask = ellipse(24, 12)
    speck = mask.copy()
    speck[0, 0] = True
    assert simpson_volume(speck, (1, 1)) == simpson_volume(mask, (1, 1))
    assert (largest_component(speck) == mask).all()


def test_simpson_agrees_with_the_label_of_a_phantom():
    from discovr_monai.phantom.cine import simulate_cine

    cine = simulate_cine(5, num_frames=48, population="adult", kind="normal")
    volumes = [simpson_volume(cine.masks[f] == 1, (1, 1)) for f in (cine.ed_frame, cine.es_frame)]
    assert ejection_fraction(np.array(volumes), 0, 1) == pytest.approx(cine.ef, abs=5)


def test_figures_of_a_shifted_disc():
    truth, moved = ellipse(10, 10), ellipse(10, 10, centre=(32, 35))
    labels = truth.astype(np.uint8), moved.astype(np.uint8)
    found = frame_figures(*labels, (2.0, 2.0), ["disc", "nothing"])
    pair = [torch.from_numpy(m)[None, None].float() for m in (moved, truth)]
    assert found["dice_disc"] == pytest.approx(float(compute_dice(*pair)))
    assert dice(truth, moved) == found["dice_disc"]
    assert found["hd95_disc"] == pytest.approx(6, abs=0.7)  # 3 pixels of 2 mm
    assert 0 < found["assd_disc"] < found["hd95_disc"]
    assert np.isnan(found["dice_nothing"])
    assert found["dice_mean"] == found["dice_disc"]


def test_the_grid_limits_small_things_more():
    scores = [
        dice(m, grid_ceiling(m.astype(int), (8, 8), 2) == 1)
        for m in (ellipse(24, 20), ellipse(9, 7))
    ]
    assert scores[0] > 0.95 > scores[1]
    mask = np.kron(np.array([[0, 1], [1, 0]]), np.ones((32, 32), int))
    assert dice(mask == 1, grid_ceiling(mask, (64, 64), 2) == 1) == 1


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_heads_give_a_map_for_each_frame_of_a_tubelet(kind):
    out = SegmentationHead(12, 4, 2, kind)(torch.randn(3, 8, 8, 12))
    side = 8 if kind == "linear" else 32
    assert out.shape == (3, 2, 4, side, side)


# ---- masks ---------------------------------------------------------------------------------


def test_masks_follow_the_window_and_the_padding():
    masks = np.zeros((2, 10, 20), np.uint8)
    masks[:, 4, 7] = 3
    out = window_masks(masks, (10, 20, 2, 5, 6, 12))
    assert out.shape == (2, 12, 12)
    assert out[0, 3 + 2, 2] == 3 and out.sum() == 6


def test_masks_of_other_frames_are_refused(tmp_path):
    np.savez(tmp_path / "m.npz", mask=np.zeros((2, 9, 9), np.uint8))
    with pytest.raises(
        CineError, match=r"m.npz: the mask is 2 frames of 9 x 9, the cine 2 frames of 8 x 8"
    ):
        read_masks(tmp_path, "m.npz", (2, 8, 8))


def test_mask_files(tmp_path):
    import nibabel

    masks = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.savez(tmp_path / "a.npz", mask=masks)
    np.save(tmp_path / "a.npy", masks)
    nibabel.save(nibabel.Nifti1Image(masks.T, np.eye(4)), tmp_path / "a.nii.gz")
    for name in ("a.npz", "a.npy", "a.nii.gz"):
        np.testing.assert_array_equal(read_masks(tmp_path, name, (2, 3, 4)), masks)
    (tmp_path / "b.npz").write_bytes(b"no")
    np.save(tmp_path / "c.npy", masks[0])
    for name, message in [
        ("none.npz", "does not exist"), ("b.npz", "cannot be read"), ("c.npy", "has shape")
    ]:  # fmt: skip
        with pytest.raises(CineError, match=f"{name}: the mask .*{message}"):
            read_masks(tmp_path, name, (2, 3, 4))


# ---- the task ------------------------------------------------------------------------------


@pytest.fixture
def build(labelled, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "fine.pt", patch_size=4)

    def make(change=None, **options):
        encoder = EvaluatedEncoder(checkpoint)
        loader = LoadCined(root=labelled, size=encoder.image_size)
        data = load_datalist(labelled, loader=loader, output_dir=tmp_path)
        if change is not None:
            data = Datalist({k: [change(dict(r)) for r in v] for k, v in data.sections.items()})
        results = Results("segmentation", tmp_path / "out", draws=20)
        return Segmentation(encoder, data, loader, results, **options)

    return make


@pytest.mark.parametrize(
    ("least", "options"),
    [
        (0.2, {"epochs": 40, "lr": 0.02}),  # a random backbone, linear: it cannot do much better
        (0.5, {"epochs": 25, "head": "conv", "blocks": 1}),
    ],
)
def test_training_finds_the_ventricle(build, least, options):
    task = build(batch_size=4, **options)
    content = task.run()
    found = {(r["method"], r["metric"]): r["value"] for r in content["results"]}
    method = next(m for m, _ in found if m.endswith("all") and "head" in m)
    assert found[method, "dice_lv_cavity"] > least
    assert found["grid ceiling, all", "dice_lv_cavity"] > 0.6
    assert found[method, "hd95_lv_cavity_mm"] > 0
    assert any(m.startswith("EF from whole curve") for m, _ in found)
    for name in ("best", "median", "worst"):
        assert (task.results.folder / f"test_{name}.gif").stat().st_size > 1000


def test_labelled_frames_only(build):
    content = build(epochs=1, every_frame=False).run()
    assert not any("whole curve" in r["method"] for r in content["results"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {k: v for k, v in r.items() if k != "mask"}, "rows of section 'training' have no 'mask'"),
        (lambda r: r | {"ed_frame": 999}, "frame 999 is labelled, but the cine has 20 frames"),
    ],
)  # fmt: skip
def test_bad_rows(build, change, message):
    with pytest.raises(ValueError, match=message):
        build(change).run()


def test_millimetres_and_pixels_are_not_averaged(build):
    known = iter(range(1000))

    def some(row):
        return row if next(known) % 2 else {k: v for k, v in row.items() if k != "spacing"}

    mixed = build(some, epochs=1, every_frame=False).run()
    none = build(lambda r: {k: v for k, v in r.items() if k != "spacing"}, epochs=1,
                 every_frame=False).run()  # fmt: skip
    figures = [
        {r["metric"]: r["value"] for r in c["results"] if r["method"] == "linear head, all"}
        for c in (mixed, none)
    ]
    assert "hd95_lv_cavity_pixels" in figures[0] and figures[0] == figures[1]


def test_a_label_that_no_structure_names(build):
    with pytest.raises(CineError, match="is none of the 1 structures"):
        build(structures=["lv_cavity"]).run()
