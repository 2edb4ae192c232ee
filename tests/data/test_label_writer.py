"""Label maps on the file's own frames and as NIfTI: exactly on the cine."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from discovr_monai.base.notice import NOTICE
from discovr_monai.base.types import Cine, CineError
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.read.masks import read_masks, window_masks
from discovr_monai.data.read.sector import prepare_cine
from discovr_monai.data.write.labels import full_frame_labels, write_nifti_labels
from tests.data.conftest import moving_blob

REAL = Path(pydicom.examples.get_path("ybr_color"))


# ---- on the file's own frames --------------------------------------------------------------


@st.composite
def windows(draw) -> tuple[int, int, int, int, int, int]:
    """A frame and a part of it."""
    h, w = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    top, left, below, right = (draw(st.integers(0, 5)) for _ in range(4))
    return top + h + below, left + w + right, top, left, h, w


def some_labels(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, shape, dtype=np.uint8)


def in_window(window) -> np.ndarray:
    """(H, W) bool."""
    height, width, top, left, h, w = window
    inside = np.zeros((height, width), bool)
    inside[top : top + h, left : left + w] = True
    return inside


@settings(deadline=None)
@given(window=windows(), seed=st.integers(0, 999))
def test_full_frames_and_windows_are_exact_inverses(window, seed):
    masks = some_labels((3, *window[:2]), seed) * in_window(window).astype(np.uint8)
    square = window_masks(masks, window)
    assert np.array_equal(full_frame_labels(square, window), masks)
    assert np.array_equal(window_masks(full_frame_labels(square, window), window), square)
    anywhere = some_labels(square.shape, seed + 1)  # labels in the padding, too
    out = full_frame_labels(anywhere, window)
    assert not out[:, ~in_window(window)].any()
    padding = window_masks(np.ones((1, *window[:2]), np.uint8), window)[0] == 0
    assert np.array_equal(window_masks(out, window), np.where(padding, 0, anywhere))


@settings(deadline=None)
@given(window=windows(), size=st.integers(1, 40), seed=st.integers(0, 999))
def test_other_sizes_are_resized_by_the_nearest_label(window, size, seed):
    labels = some_labels((2, size, size), seed)
    side = max(window[4:])
    resized = F.interpolate(torch.from_numpy(labels)[:, None].float(), side, mode="nearest-exact")
    expected = resized[:, 0].numpy()
    found = window_masks(full_frame_labels(labels, window), window)
    padding = window_masks(np.ones((1, *window[:2]), np.uint8), window)[0] == 0
    # torch rounds in float32 where a pixel's middle falls on an edge: within one label of it
    middles = (np.arange(side) + 0.5) * size / side
    clear = np.abs(middles - np.rint(middles)) > 1e-4
    where = ~padding & clear[:, None] & clear[None]
    assert np.array_equal(found[:, where], expected[:, where])


@given(window=windows(), times=st.integers(1, 4))
def test_an_even_enlargement_loses_nothing(window, times):
    side = max(window[4:])
    large = (*(n * times for n in window[:4]), side * times, side * times)
    large = (max(large[0], large[2] + large[4]), max(large[1], large[3] + large[5]), *large[2:])
    labels = some_labels((2, side, side))
    back = window_masks(full_frame_labels(labels, large), large)
    assert np.array_equal(back, labels.repeat(times, 1).repeat(times, 2))


def test_labels_of_prepared_frames_lie_on_what_they_were_drawn_of():
    frames = np.zeros((4, 90, 150), np.uint8)
    frames[:, 20:50, 70:130] = 200
    frames[:, 50:60, 70:80] = 200  # no symmetry
    cine = prepare_cine(Cine(frames, 30.0, "header"), 75, False)  # cells of 2 x 2
    found = full_frame_labels((cine.frames > 100).astype(np.uint8), cine.window)
    assert np.array_equal(found, frames > 100)


def test_soft_maps_have_their_outline_between_the_cells():
    window = (16, 16, 0, 0, 16, 16)
    heart = np.broadcast_to(np.float32([0, 0.4, 0.8, 1]), (1, 4, 4))
    soft = np.stack([1 - heart, heart], 1)  # (1, 2, 4, 4)
    found = full_frame_labels(soft, window)
    # a half lies a quarter of the way from the middle of column 1 (5.5) to that of 2 (9.5)
    assert np.array_equal(found[0, 3], [0] * 7 + [1] * 9)
    assert np.array_equal(full_frame_labels(soft.argmax(1).astype(np.uint8), window)[0, 3],
                          [0] * 8 + [1] * 8)  # fmt: skip


@settings(deadline=None)
@given(window=windows(), seed=st.integers(0, 99))
def test_soft_maps_at_the_windows_size_are_their_winners(window, seed):
    side = max(window[4:])
    labels = some_labels((2, side, side), seed)
    soft = np.eye(4, dtype=np.float32)[labels].transpose(0, 3, 1, 2)
    assert np.array_equal(full_frame_labels(soft, window), full_frame_labels(labels, window))


@pytest.mark.parametrize(
    ("labels", "window", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), (8, 8, 6, 0, 4, 4), "leaves its frame"),
        (np.zeros((2, 4, 4), np.uint8), (8, 8, -1, 0, 4, 4), "leaves its frame"),
        (np.zeros((2, 4, 5), np.uint8), (8, 8, 0, 0, 4, 4), r"\(2, 4, 5\) must be \(T, S, S\)"),
        (np.zeros((0, 4, 4), np.uint8), (8, 8, 0, 0, 4, 4), "must be"),
        (np.zeros((2, 4, 4), np.float32), (8, 8, 0, 0, 4, 4), "float32.*give"),
        (np.zeros((2, 3, 4, 4), np.uint8), (8, 8, 0, 0, 4, 4), "uint8.*give"),
    ],
)
def test_what_cannot_be_placed_is_refused(labels, window, message):
    with pytest.raises(ValueError, match=message):
        full_frame_labels(labels, window)


# ---- NIfTI ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_of_other_cines(tmp_path, suffix):
    labels = some_labels((5, 8, 6))
    path = tmp_path / f"labels{suffix}"
    write_nifti_labels(path, labels, (0.4, 0.25), 50)
    assert np.array_equal(read_masks(tmp_path, path.name, (5, 8, 6)), labels)
    image = nibabel.load(path)
    assert image.shape == (6, 8, 5)
    assert image.get_data_dtype() == np.uint8
    assert image.header.get_zooms() == pytest.approx((0.25, 0.4, 0.02))  # x, y, t
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert image.header.get_intent()[0] == "label"
    assert bytes(image.header["descrip"]).rstrip(b"\0").decode() == NOTICE
    assert np.allclose(image.affine, np.diag([-0.25, -0.4, 0.02, 1]))
    cine = read_cine(path)
    assert cine.spacing == pytest.approx((0.4, 0.25))
    assert cine.fps == pytest.approx(50)
    before = path.read_bytes()
    assert suffix == ".nii" or before[4:8] == bytes(4)  # gzip's clock
    write_nifti_labels(path, labels, (0.4, 0.25), 50)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [path.name]  # nothing temporary


def test_itk_places_them_like_a_frame_without_orientation(tmp_path):
    import itk

    labels = some_labels((5, 8, 6))
    write_nifti_labels(tmp_path / "a.nii.gz", labels, (0.4, 0.25), 50)
    image = itk.imread(str(tmp_path / "a.nii.gz"))
    assert np.allclose(itk.array_from_matrix(image.GetDirection()), np.eye(3))
    assert np.allclose(image.GetOrigin(), 0)
    assert list(image.GetSpacing()) == pytest.approx([0.25, 0.4, 0.02])
    assert np.array_equal(itk.array_from_image(image), labels)


def test_nothing_is_made_up_where_spacing_and_pace_are_unknown(tmp_path):
    write_nifti_labels(tmp_path / "a.nii", some_labels((5, 8, 6)), None, None)
    header = nibabel.load(tmp_path / "a.nii").header
    assert header.get_xyzt_units() == ("unknown", "unknown")
    assert header.get_zooms() == (1, 1, 1)
    assert read_cine(tmp_path / "a.nii").fps is None


def oblique() -> np.ndarray:
    """Rotated, anisotropic, moved."""
    a, b = 0.3, -0.8
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag([0.154, 0.308, 0.02])
    affine[:3, 3] = 12.5, -3.25, 40
    return affine


def nifti_cine(path, kind) -> Path:
    frames = moving_blob(5, 8, 6)
    voxels = frames.T.copy()
    affine = np.diag([-0.3, -0.6, 1.0, 1.0]) if kind == "camus" else oblique()
    if kind == "thick":
        voxels = voxels[:, :, None]  # (X, Y, 1, T)
    elif kind == "colour":
        voxels = np.stack([voxels] * 3, -1)  # (X, Y, T, 3)
    elif kind == "rgb":
        voxels = np.stack([voxels] * 3, -1).view([(c, "u1") for c in "RGB"])[..., 0]
    image = nibabel.Nifti1Image(voxels, None if kind == "bare" else affine)
    if kind == "bare":
        image.header.set_zooms((0.3, 0.6, 1))
        image.header["qform_code"] = image.header["sform_code"] = 0
    if kind == "qform":
        image.set_sform(None, 0)
        image.set_qform(affine, "scanner")
    if kind == "camus":
        image.header.set_zooms((0.3, 0.6, 0.02))
        image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Smith^Mary 1950"
    image.header["aux_file"] = b"MRN-777"
    note = nibabel.nifti1.Nifti1Extension("comment", b"born 1950")
    image.header.extensions.append(note)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("kind", ["camus", "oblique", "qform", "bare", "thick", "colour", "rgb"])
def test_nifti_labels_lie_exactly_on_a_nifti_cine(tmp_path, kind):
    like = nifti_cine(tmp_path / "cine.nii.gz", kind)
    labels = some_labels((5, 8, 6))
    write_nifti_labels(tmp_path / "labels.nii.gz", labels, (9, 9), 9, like)
    source, image = nibabel.load(like), nibabel.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(image.affine, source.affine)
    for field in ("qform_code", "sform_code", "pixdim", "quatern_b", "qoffset_y", "srow_x"):
        assert np.array_equal(image.header[field], source.header[field]), field
    assert image.header.get_xyzt_units() == source.header.get_xyzt_units()
    assert image.shape == (source.shape if kind != "colour" else source.shape[:3])
    assert np.array_equal(read_masks(tmp_path, "labels.nii.gz", (5, 8, 6)), labels)
    cine = read_cine(like)
    assert (cine.spacing, cine.fps) == (
        read_cine(tmp_path / "labels.nii.gz").spacing,
        read_cine(tmp_path / "labels.nii.gz").fps,
    )
    content = image.header.binaryblock + image.to_bytes()
    assert not re.search(b"Smith|MRN|born|1950", content)


def test_a_source_that_is_no_nifti_lends_no_geometry(tmp_path):
    write_nifti_labels(tmp_path / "a.nii", some_labels((30, 8, 6)), (2, 1), 25, REAL)
    assert nibabel.load(tmp_path / "a.nii").header.get_zooms() == pytest.approx((1, 2, 0.04))


def test_nifti_errors(tmp_path):
    like = nifti_cine(tmp_path / "cine.nii.gz", "camus")
    labels = some_labels((5, 8, 6))
    out = tmp_path / "labels.nii.gz"
    with pytest.raises(CineError, match=r"^cine.nii.gz: its voxels are 6 x 8 x 5, the labels 8"):
        write_nifti_labels(out, labels.transpose(0, 2, 1), None, None, like)
    with pytest.raises(CineError, match="^here/a: its labels would overwrite it"):
        write_nifti_labels(like, labels, None, None, like, name="here/a")
    (tmp_path / "bad.nii").write_bytes(b"nothing of the sort")
    with pytest.raises(CineError, match="^bad.nii: it cannot be read as NIfTI"):
        write_nifti_labels(out, labels, None, None, tmp_path / "bad.nii")
    with pytest.raises(ValueError, match=r"labels.png must end in .nii or .nii.gz"):
        write_nifti_labels(tmp_path / "labels.png", labels, None, None)
    with pytest.raises(ValueError, match=r"float64 of shape \(5, 8, 6\), not"):
        write_nifti_labels(out, labels.astype(float), None, None)
    with pytest.raises(ValueError, match="labels run from 0 to 300"):
        write_nifti_labels(out, labels.astype(int) * 100, None, None)
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_nifti_labels(tmp_path / "folder.nii", labels, None, None)
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left
    assert not out.exists()
    assert read_cine(like).frames.shape == (5, 8, 6)  # still there
