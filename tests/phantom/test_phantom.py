"""The phantom: truth that agrees with what is drawn, texture that moves, files as promised."""

from __future__ import annotations

import csv
import hashlib
import json

import numpy as np
import pytest

from discovr_monai.data.read.cine import read_cine
from discovr_monai.phantom.cine import build_scanner, chords, simpson, simulate_cine
from discovr_monai.phantom.dataset import plan_dataset, write_phantom_dataset
from discovr_monai.phantom.heart import KINDS, Heart, draw_heart, filling_curve
from discovr_monai.phantom.ultrasound import PointSpread, complex_noise

SMALL = {"num_clips": 6, "num_frames": 16, "size": 48, "progress": False}


def hashes(root):
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in root.rglob("*")
        if f.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "set"
    write_phantom_dataset(root, workers=1, **SMALL)
    return root


def test_the_same_seed_gives_the_same_clip():
    a, b, c = (simulate_cine(s, num_frames=16, size=48) for s in (5, 5, 6))
    assert np.array_equal(a.frames, b.frames)
    assert np.array_equal(a.masks, b.masks)
    assert not np.array_equal(a.frames, c.frames)


def test_the_set_does_not_depend_on_the_number_of_processes(dataset, tmp_path):
    write_phantom_dataset(tmp_path / "two", workers=2, **SMALL)
    assert hashes(tmp_path / "two") == hashes(dataset)


def test_simpson_from_the_drawn_ventricle_agrees_with_the_label():
    for seed in range(60):
        scanner = build_scanner(seed, num_frames=64)
        volumes = [
            simpson(chords(scanner, t)) for t in (scanner.beat.ed_frame, scanner.beat.es_frame)
        ]
        ef = 100 * (1 - volumes[1] / volumes[0])
        parameters = scanner.heart.parameters
        assert abs(ef - parameters.ef) < 2, (seed, parameters.kind)


def test_masks_agree_with_the_label_loosely():
    for seed in range(4):
        cine = simulate_cine(seed, num_frames=48, population="adult")
        areas = (cine.masks == 1).sum((1, 2))
        assert areas[cine.ed_frame] > areas[cine.es_frame]
        assert set(np.unique(cine.masks)) == {0, 1, 2, 3}
        assert not cine.masks[:, ~cine.sector].any()
        assert not cine.frames[:, ~cine.sector].any()


def test_ef_is_distributed_as_in_echonet_dynamic():
    hearts = [draw_heart(np.random.default_rng([0, i])) for i in range(3000)]
    ef = np.array([h.ef for h in hearts])
    assert abs(ef.mean() - 55.8) < 1
    assert abs(ef.std() - 12.4) < 1
    assert 9 < ef.min() < 20
    assert 74 < ef.max() <= 81
    assert {h.kind for h in hearts} == set(KINDS)
    assert all(h.label == (h.kind != "normal" or h.ef < 50) for h in hearts)


def test_the_beat_fills_fast_rests_and_is_kicked():
    phase = np.linspace(0, 1, 400, endpoint=False)
    filling = filling_curve(phase, 0.35)
    assert filling.argmin() / 400 == pytest.approx(0.35, abs=0.08)
    rate = np.diff(filling)[int(filling.argmin()) + 4 :]
    thirds = np.array_split(rate, 3)
    early, rest, kick = thirds[0].max(), np.median(thirds[1]), thirds[2].max()
    assert early > 3 * max(rest, 1e-9)
    assert kick > 3 * max(rest, 1e-9)


def test_the_muscles_mass_is_conserved_and_it_thickens():
    heart = Heart(draw_heart(np.random.default_rng(1), "adult", "normal"))
    x, y = np.meshgrid(np.arange(-70, 70, 0.25), np.arange(-15, 110, 0.25))
    share = (np.arange(20) + 0.5) / 20

    def wall(activation):
        level = heart.contour(activation, share)
        u, v = heart.material(x.astype(np.float32), y.astype(np.float32), activation)
        rows = heart.rows(v)
        tissue = (np.abs(u) > heart.endo[rows]) & (np.abs(u) < heart.epi[rows])
        inside = tissue & (y > level[0, 0]) & (y < level[-1, 0])
        thickness = inside.sum(1).max() / 8  # two walls, 4 samples a mm
        return (np.pi * np.abs(x) * inside).sum() * 0.0625, thickness

    (diastole, thin), (systole, thick) = wall(0.0), wall(1.0)
    assert systole == pytest.approx(diastole, rel=0.08)
    assert thick > 1.15 * thin


def test_speckle_of_a_uniform_region_is_rayleigh():
    random = np.random.default_rng(0)
    from discovr_monai.phantom.ultrasound import BEAMS, RANGES

    spread = PointSpread(0.5)
    envelopes = [np.abs(spread(complex_noise(random, (RANGES, BEAMS)))) for _ in range(8)]
    rows = np.stack(envelopes)[:, 20:-20, 8:-8]
    snr = rows.mean((0, 2)) / rows.std((0, 2))
    assert np.median(snr) == pytest.approx(1.91, abs=0.08)


def test_texture_moves_with_the_tissue():
    """A patch of muscle is found again nearer its true place than where it was."""
    scanner = build_scanner(2, num_frames=64, population="adult", kind="normal")
    frames = scanner.cine().astype(float)
    first, later = scanner.beat.ed_frame, scanner.beat.es_frame
    steps = range(first, later, 2 if later > first else -2)
    moved, still = [], []
    for t, u in zip(steps, list(steps)[1:], strict=False):
        a, b = chords(scanner, t), chords(scanner, u)
        for row in (14, 16, 18):
            for end in (slice(0, 2), slice(2, 4)):
                outward = (
                    (a[row, end] - a[row, 2:][:2]) if end.start == 0 else (a[row, end] - a[row, :2])
                )
                outward = outward / np.hypot(*outward) * 5
                p, q = a[row, end] + outward, b[row, end] + outward
                moved.append(_alike(frames[t], p, frames[u], q))
                still.append(_alike(frames[t], p, frames[u], p))
    assert np.nanmean(moved) > np.nanmean(still)


def _alike(one, p, two, q, half=3):
    (px, py), (qx, qy) = np.rint(p).astype(int), np.rint(q).astype(int)
    a = one[py - half : py + half + 1, px - half : px + half + 1]
    b = two[qy - half : qy + half + 1, qx - half : qx + half + 1]
    if a.shape != b.shape or a.size == 0 or a.std() == 0 or b.std() == 0:
        return np.nan
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_neighbouring_frames_are_alike_and_distant_ones_less():
    frames = simulate_cine(3, num_frames=48, population="adult").frames.astype(float)
    near = np.mean([np.corrcoef(frames[t].ravel(), frames[t + 1].ravel())[0, 1] for t in range(8)])
    far = np.mean([np.corrcoef(frames[t].ravel(), frames[t + 9].ravel())[0, 1] for t in range(8)])
    assert near > far
    assert near < 0.999


def test_fetal_hearts_are_small_and_turned():
    angles = {
        p: np.array([build_scanner(s, population=p, num_frames=16).probe.tilt for s in range(30)])
        for p in ("adult", "fetal")
    }
    assert angles["fetal"].std() > 4 * angles["adult"].std()
    lengths = [
        build_scanner(s, population="fetal", num_frames=16).heart.parameters.length
        for s in range(10)
    ]
    assert max(lengths) < 45


def test_the_layout_is_echonet_dynamics(dataset):
    files = list(csv.DictReader((dataset / "FileList.csv").open()))
    assert list(files[0]) == [
        "FileName",
        "EF",
        "ESV",
        "EDV",
        "FrameHeight",
        "FrameWidth",
        "FPS",
        "NumberOfFrames",
        "Split",
    ]
    assert len(files) == 6
    tracings = list(csv.DictReader((dataset / "VolumeTracings.csv").open()))
    assert list(tracings[0]) == ["FileName", "X1", "Y1", "X2", "Y2", "Frame"]
    for row in files:
        cine = read_cine(dataset / "Videos" / f"{row['FileName']}.avi")
        assert cine.frames.shape == (16, 48, 48)
        assert cine.fps == pytest.approx(float(row["FPS"]), abs=1)
        own = [t for t in tracings if t["FileName"] == f"{row['FileName']}.avi"]
        frames = list(dict.fromkeys(t["Frame"] for t in own))
        assert [sum(t["Frame"] == f for t in own) for f in frames] == [21, 21]
        volumes = []
        for frame in frames:
            rows = [
                [float(t[k]) for k in ("X1", "Y1", "X2", "Y2")] for t in own if t["Frame"] == frame
            ]
            volumes.append(simpson(np.array(rows)))
        assert volumes[0] < volumes[1]  # ES first
        assert abs(100 * (1 - volumes[0] / volumes[1]) - float(row["EF"])) < 2
        with np.load(dataset / "Masks" / f"{row['FileName']}.npz", allow_pickle=False) as found:
            assert found["mask"].shape == (16, 48, 48)


def test_the_datalist_is_relative_and_pretraining_is_normal(dataset):
    content = json.loads((dataset / "datalist.json").read_text())
    for section in ("training", "validation", "test", "pretraining"):
        for row in content[section]:
            assert (dataset / row["image"]).is_file()
            assert (dataset / row["mask"]).is_file()
    assert all(row["label"] == 0 for row in content["pretraining"])


def test_patients_are_on_one_side_and_shares_are_right():
    plan = plan_dataset(0, 600)
    sides: dict[int, set[str]] = {}
    for clip in plan:
        sides.setdefault(clip.patient, set()).add(clip.split)
    assert all(len(s) == 1 for s in sides.values())
    counts = {s: sum(s in v for v in sides.values()) / len(sides) for s in ("TRAIN", "VAL", "TEST")}
    assert counts["TRAIN"] == pytest.approx(0.75, abs=0.01)
    assert counts["VAL"] == pytest.approx(0.125, abs=0.01)
    sizes = np.bincount([c.patient for c in plan])
    assert set(sizes) == {1, 2, 3}


def test_again_at_once_and_after_a_loss(dataset):
    before = hashes(dataset)
    stamps = {f: f.stat().st_mtime_ns for f in dataset.rglob("*.avi")}
    write_phantom_dataset(dataset, workers=1, **SMALL)
    assert {f: f.stat().st_mtime_ns for f in dataset.rglob("*.avi")} == stamps
    next(iter(stamps)).unlink()
    (dataset / "datalist.json").unlink()
    write_phantom_dataset(dataset, workers=1, **SMALL)
    assert hashes(dataset) == before


def test_other_folders_are_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="phantom"):
        write_phantom_dataset(dataset, workers=1, **(SMALL | {"seed": 9}))
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError):
        write_phantom_dataset(tmp_path, workers=1, **SMALL)
    assert [f.name for f in tmp_path.iterdir()] == ["precious.txt"]
