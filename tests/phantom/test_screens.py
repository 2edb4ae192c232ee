"""Whole screens: where the sector is, what is no 2-D grey cine, what a small file may become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from discovr_monai.base.types import Cine, CineError
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.fan import Fan, fit_fan, moving_part
from discovr_monai.data.read.pixels import to_grey
from discovr_monai.data.read.sector import (
    graphics,
    isolate_sector,
    prepare_cine,
    resize_square,
    sector_mask,
)
from discovr_monai.data.write.dicom import write_dicom
from discovr_monai.phantom.screen import simulate_screen

A4C = Path(pydicom.examples.get_path("ybr_color"))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    "seed", [0, 16, 37, 51, 108]
)  # the hard ones of benchmarks/pictures/screens.py
def test_the_fan_is_found_and_no_overlay_survives(seed):
    screen = simulate_screen(seed)
    mask = sector_mask(to_grey(screen.frames))
    assert iou(mask, screen.sector) >= 0.97
    assert not (mask & screen.overlay).any()


@settings(max_examples=12, deadline=None)
@given(
    x=st.floats(90, 130), y=st.floats(-20, 20), half=st.floats(0.45, 0.85), far=st.floats(130, 165),
    dark=st.sampled_from([None, "left", "right"]),
)  # fmt: skip
def test_any_fan_of_noise_is_fitted(x, y, half, far, dark):
    fan = Fan(x, y, half, 8.0, far, 0.0, (0, 0, 219, 179))
    truth = fan.mask((180, 220))
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 200, (12, 180, 220)).astype(np.uint8) * truth
    if dark:  # a third of the sector is nearly black
        angle = np.arctan2(np.arange(220) - x, (np.arange(180) - y)[:, None])
        side = angle < -half / 3 if dark == "left" else angle > half / 3
        frames[:, side] //= 24
    found = fit_fan(*moving_part(frames))
    assert found is not None
    assert iou(found.mask((180, 220)), truth) > 0.95


def test_what_is_no_fan_is_left_to_the_hull():
    rng = np.random.default_rng(0)
    frames = np.zeros((10, 120, 160), np.uint8)
    frames[:, 20:100, 30:130] = rng.integers(0, 200, (10, 80, 100))  # a linear probe
    mask = sector_mask(frames)
    assert iou(mask, frames.any(0)) > 0.9
    assert sector_mask(np.full((5, 40, 50), 9, np.uint8)).all()  # nothing moves


def test_marks_inside_the_sector_go():
    screen = simulate_screen(2)
    grey = to_grey(screen.frames)
    rows, columns = np.argwhere(screen.sector).mean(0).astype(int)
    dark = grey.copy()
    dark[:, rows - 30 : rows + 30, columns - 30 : columns + 30] = 0
    dark[:, rows : rows + 9, columns : columns + 2] = 255  # a letter on black
    found = graphics(dark)
    assert found[rows : rows + 9, columns : columns + 2].all()
    assert (graphics(grey) & screen.sector).sum() < 0.001 * screen.sector.sum()


def test_no_text_of_the_real_cine_survives():
    seen = LoadCined(root=A4C.parent, size=None)({"image": A4C.name})["image"][0]
    still = (np.ptp(seen, 0) <= 3) & (seen.min(0) > 24)
    near = np.zeros_like(still)
    near[: seen.shape[1] // 5] = True  # clutter at the probe stands still too
    assert not (still & ~near).any()


# ---- DICOM's own regions -------------------------------------------------------------------


def region(form=1, data=1, box=(10, 12, 69, 59)):
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = form, data
    item.RegionLocationMinX0, item.RegionLocationMinY0 = box[:2]
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = box[2:]
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX, item.PhysicalDeltaY = 0.04, 0.05
    return item


def noise(frames=6, height=64, width=80, channels=0):
    shape = (frames, height, width, 3) if channels else (frames, height, width)
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


def written(path, *regions, frames=None, **tags):
    write_dicom(path, noise() if frames is None else frames, tags={
        "SequenceOfUltrasoundRegions": Sequence(list(regions)), **tags})  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("regions", "what"),
    [
        ([region(2, 1)], "M-mode"),
        ([region(1, 1), region(3, 3)], "spectral Doppler"),
        ([region(1, 1), region(1, 2)], "colour Doppler"),
        ([region(box=(0, 0, 39, 63)), region(box=(40, 0, 79, 63))], "a split screen"),
    ],
)
def test_other_displays_are_set_aside_with_the_reason(tmp_path, regions, what):
    with pytest.raises(CineError, match=f"a.dcm: it shows {what}") as error:
        read_cine(written(tmp_path / "a.dcm", *regions))
    assert error.value.kind == "not a cine"


def test_the_one_tissue_region_is_used(tmp_path):
    ecg = region(4, 10, (0, 60, 79, 63))
    cine = read_cine(written(tmp_path / "a.dcm", region(), ecg))
    assert cine.region == (slice(12, 60), slice(10, 70))
    assert cine.spacing == pytest.approx((0.5, 0.4))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 12, 80, 64), (slice(12, 64), slice(10, 80))),  # one over: clamped
        ((80, 96, 559, 479), (slice(12, 60), slice(10, 70))),  # of 640 x 512: rescaled by 8
        ((10, 12, 69, 4000), None),  # nonsense
        ((60, 12, 50, 40), None),
    ],
)
def test_rectangles_out_of_bounds(tmp_path, box, expected):
    assert read_cine(written(tmp_path / "a.dcm", region(box=box))).region == expected


def test_a_rescaled_region_keeps_millimetres_right(tmp_path):
    cine = read_cine(written(tmp_path / "a.dcm", region(box=(80, 96, 559, 479))))
    assert cine.spacing == pytest.approx((8 * 0.5, 8 * 0.4))  # 8 described pixels are one


@pytest.mark.parametrize(
    ("tags", "fps", "source"),
    [
        ({"FrameTime": 20, "CineRate": 30}, 50, "FrameTime"),
        ({"FrameTimeVector": [0, 25, 25, 25, 25, 25], "CineRate": 30}, 40, "FrameTimeVector"),
        ({"FrameTime": 0, "CineRate": 30, "RecommendedDisplayFrameRate": 25}, 30, "CineRate"),
        ({"RecommendedDisplayFrameRate": 25}, 25, "RecommendedDisplayFrameRate"),
        ({}, None, "unknown"),
    ],
)
def test_frame_times_in_their_order(tmp_path, tags, fps, source):
    cine = read_cine(written(tmp_path / "a.dcm", **tags))
    assert (cine.fps, cine.fps_source) == (fps, source)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "PALETTE COLOR", "MONOCHROME1"])
def test_luma_of_each_photometric_interpretation(tmp_path, photometric):
    grey = np.broadcast_to(np.linspace(20, 220, 40).astype(np.uint8), (4, 32, 40))
    frames, tags = grey[..., None].repeat(3, -1), {"PhotometricInterpretation": photometric}
    if photometric == "YBR_FULL":
        frames = np.stack([grey, np.full_like(grey, 128), np.full_like(grey, 128)], -1)
    elif photometric == "MONOCHROME1":
        frames = 255 - grey
    elif photometric == "PALETTE COLOR":
        frames = 255 - grey  # the table turns it round again
        for name in ("Red", "Green", "Blue"):
            tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
            table = (np.arange(255, -1, -1, dtype=np.uint16) * 257).tobytes()
            tags[f"{name}PaletteColorLookupTableData"] = table
    write_dicom(tmp_path / "a.dcm", frames, tags=tags)
    found = read_cine(tmp_path / "a.dcm", color="grey").frames
    assert np.abs(found.astype(int) - grey).max() <= 1


# ---- colour and sweeps without tags --------------------------------------------------------


def screen_cine(change=None, seed=3):
    screen = simulate_screen(seed, dark=False)
    frames = screen.frames.copy()
    if change is not None:
        change(frames, screen)
    return Cine(frames, 30.0, "FrameTime", from_dicom=True)


def doppler(frames, screen):
    rows, columns = np.argwhere(screen.sector).mean(0).astype(int)
    box = np.s_[:, rows - 50 : rows + 50, columns - 50 : columns + 50]
    frames[box] = 0
    frames[:, rows - 50 : rows, columns - 50 : columns + 50, 0] = 220  # towards
    frames[:, rows : rows + 50, columns - 50 : columns + 50, 2] = 220  # away


def sepia(frames, screen):
    frames[:] = np.where(
        screen.sector[..., None], (frames * np.array([1.0, 0.8, 0.5])).astype(np.uint8), frames
    )


def test_colour_doppler_is_recognised_and_tints_are_not():
    with pytest.raises(CineError, match="x.dcm: it shows colour Doppler"):
        isolate_sector(screen_cine(doppler), "x.dcm")
    assert isolate_sector(screen_cine())[0].shape[0] == 24
    assert isolate_sector(screen_cine(sepia))[0].shape[0] == 24


def test_sweeping_displays_are_recognised():
    rng = np.random.default_rng(0)
    strip = rng.integers(0, 255, (200, 300)).astype(np.uint8)
    frames = np.zeros((30, 240, 320), np.uint8)
    for t in range(30):  # each frame writes ten more columns of an M-mode
        frames[t, 20:220, 10 : 10 + 10 * (t + 1)] = strip[:, : 10 * (t + 1)]
    with pytest.raises(CineError, match="M-mode or spectral Doppler"):
        isolate_sector(Cine(frames, 30.0, "x", from_dicom=True), "m.dcm")


# ---- sizes -----------------------------------------------------------------------------------


def test_shrinking_is_by_area():
    frames = np.zeros((1, 6, 6), np.uint8)
    frames[0, :3, :3] = 90
    frames[0, 3, 3] = 90
    assert resize_square(frames, 2)[0].tolist() == [[90, 0], [0, 10]]
    ramp = np.arange(250, dtype=np.uint8)[None, None].repeat(250, 1)
    np.testing.assert_allclose(
        resize_square(ramp, 100)[0, 0], 2.5 * np.arange(100) + 0.75, atol=0.51
    )


def test_the_window_leads_back_to_the_file():
    screen = simulate_screen(4)
    cine = Cine(to_grey(screen.frames), 30.0, "x", from_dicom=True)
    done = prepare_cine(cine, None, "auto")
    height, width, top, left, h, w = done.window
    assert (height, width) == screen.sector.shape and done.frames.shape[1:] == (h, w)
    cut = cine.frames[:, top : top + h, left : left + w]
    np.testing.assert_array_equal(done.frames[done.frames > 0], cut[done.frames > 0])


def test_bombs_are_refused_before_they_go_off(tmp_path):
    path = written(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = 100000, 4096, 4096
    dataset.save_as(path)
    with pytest.raises(CineError, match="it would grow to 1677.7 GB"):
        read_cine(path)

    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 3000))
    header.set_data_dtype(np.uint8)
    with (tmp_path / "b.nii").open("wb") as file:
        file.write(header.binaryblock + b"\0" * 100)
    with pytest.raises(CineError, match=r"b.nii: it would grow to 2700.0 GB"):
        read_cine(tmp_path / "b.nii")

    (tmp_path / "c.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 30000 30000 3000\nElementType = MET_UCHAR\n"
        "ElementDataFile = c.raw\n"
    )
    (tmp_path / "c.raw").write_bytes(b"\0" * 100)
    with pytest.raises(CineError, match=r"c.mhd: it would grow to 2700.0 GB"):
        read_cine(tmp_path / "c.mhd")


def test_prepared_cines_are_read_without_pickle(tmp_path):
    np.save(tmp_path / "a.npy", noise())
    assert read_cine(tmp_path / "a.npy").frames.shape == (6, 64, 80)
    np.save(tmp_path / "b.npy", noise().astype(np.float32))
    with pytest.raises(CineError, match=r"b.npy: it holds float32"):
        read_cine(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CineError, match=r"c.npy: reading it failed"):
        read_cine(tmp_path / "c.npy")


def test_headers_that_point_elsewhere_or_say_nonsense(tmp_path):
    head = "ObjectType = Image\nNDims = {}\nDimSize = 8 8 4\nElementType = MET_UCHAR\nElementDataFile = {}\n"
    (tmp_path / "c.raw").write_bytes(bytes(range(256)))
    path = tmp_path / "c.mhd"
    path.write_text(head.format(3, "c.raw"))
    assert read_cine(path).frames.shape == (4, 8, 8)
    for data in ("../c.raw", "/etc/hostname", "..\\c.raw"):
        path.write_text(head.format(3, data))
        with pytest.raises(
            CineError, match=r"c.mhd: its header points at a file in another folder"
        ):
            read_cine(path)
    for number in ("-1", "99999999", "", "2"):  # ITK crashes on some of these
        path.write_text(head.format(number, "c.raw"))
        with pytest.raises(CineError, match=r"c.mhd: its header says"):
            read_cine(path)
