"""Scanning, splitting, caching, blanking, salting."""

from __future__ import annotations

import errno
import json
import shutil
import stat
import time
import warnings

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovr_monai.base.privacy import load_salt, salted_id
from discovr_monai.base.types import Cine
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists import scan as module
from discovr_monai.data.lists.datalist import summary
from discovr_monai.data.lists.scan import load_datalist
from discovr_monai.data.lists.split import split_by_patient
from discovr_monai.data.read.sector import isolate_sector, sector_mask
from discovr_monai.data.read.store import CineStore
from tests.data.conftest import moving_blob, write_dicom, write_video

REAL = pydicom.examples.get_path("ybr_color")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "hospital"
    (root / "sub").mkdir(parents=True)
    shutil.copy(REAL, root / "sub" / "real.dcm")
    for i in range(3):
        write_dicom(root / f"{i}.dcm", moving_blob(seed=i))  # one patient
    write_video(root / "a.avi", moving_blob())
    (root / "letter.txt").write_text("Dear Mrs Smith")
    (root / "cut.dcm").write_bytes((root / "0.dcm").read_bytes()[:-9000])
    write_dicom(root / "still.dcm", moving_blob(1), UltrasoundColorDataPresent=1)
    return root


def scan(folder, tmp_path, **options):
    loader = LoadCined(root=folder, size=32, store=CineStore(tmp_path / "cache"))
    return load_datalist(folder, loader=loader, output_dir=tmp_path / "out", **options)


def test_a_mixed_folder(folder, tmp_path, capsys):
    found = scan(folder, tmp_path, val_fraction=0.4)
    images = sorted(r["image"] for rows in found.sections.values() for r in rows)
    assert images == ["0.dcm", "1.dcm", "2.dcm", "a.avi", "sub/real.dcm"]
    report = (tmp_path / "out" / "bad_files.csv").read_text()
    assert "letter.txt,not a cine,it is text" in report
    assert "cut.dcm,unreadable," in report
    assert "still.dcm,not a cine,it is a still with colour Doppler" in report
    assert "3 of 8 files set aside" in capsys.readouterr().out
    patients = [{r["patient"] for r in rows} for rows in found.sections.values()]
    assert not patients[0] & patients[1]
    everything = report + json.dumps(found.sections) + (tmp_path / "out" / "scan.json").read_text()
    for secret in ("MRN-777", "Smith", str(tmp_path)):
        assert secret not in everything


def test_a_second_scan_decodes_nothing_but_what_changed(folder, tmp_path, monkeypatch):
    scan(folder, tmp_path)
    seen = []
    original = module.examine_file
    monkeypatch.setattr(module, "examine_file", lambda n, *a: seen.append(n) or original(n, *a))
    scan(folder, tmp_path)
    assert not seen
    write_video(folder / "a.avi", moving_blob(25))
    scan(folder, tmp_path)
    assert seen == ["a.avi"]


def test_a_scan_with_the_shorter_ids_of_an_earlier_version_is_made_again(folder, tmp_path):
    """Its patients would count twice, once under each id; who is held out stays the same."""
    before = scan(folder, tmp_path, val_fraction=0.4).sections
    index = tmp_path / "out" / "scan.json"
    verdicts = json.loads(index.read_text())
    for verdict in verdicts.values():
        verdict["stamp"][-1] = verdict["stamp"][-1].rpartition("|")[0]
        if "row" in verdict:
            verdict["row"]["patient"] = verdict["row"]["patient"][:12]
    index.write_text(json.dumps(verdicts))
    assert scan(folder, tmp_path, val_fraction=0.4).sections == before
    patients = [row["patient"] for rows in before.values() for row in rows]
    assert {len(patient) for patient in patients} == {16}
    shorter = [{**r, "patient": r["patient"][:12]} for s in before.values() for r in s]
    held = split_by_patient(shorter, 0.4, 0)["validation"]
    assert [r["image"] for r in held] == [r["image"] for r in before["validation"]]


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0, 0.9), st.integers(0, 99))
def test_no_patient_is_on_two_sides(patients, fraction, seed):
    rows = [{"image": f"{i}.avi", "patient": str(p)} for i, p in enumerate(patients)]
    split = split_by_patient(rows, fraction, seed)
    sides = [{r["patient"] for r in split[s]} for s in ("training", "validation")]
    assert not sides[0] & sides[1]
    assert len(split["training"]) + len(split["validation"]) == len(rows)
    assert len(sides[1]) == round(len(set(patients)) * fraction)


def write_list(root, content):
    (root / "datalist.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{nonsense", "is not a Decathlon-style JSON: it needs lists of rows"),
        ({"training": [{"path": "a.avi"}]}, 'with an "image" each'),
        ({"training": [{"image": "/etc/passwd"}]}, "points outside the data folder"),
        ({"training": [{"image": "../x.avi"}]}, "points outside the data folder"),
        ({"training": [{"image": "no.avi"}]}, "1 of 1 files of datalist .* 'no.avi'. Check"),
    ],
)
def test_bad_datalists(tmp_path, content, message):
    write_list(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        load_datalist(tmp_path, loader=LoadCined(root=tmp_path), output_dir=tmp_path)


def test_sections_and_labels(tmp_path):
    write_video(tmp_path / "a.avi", moving_blob())
    write_list(tmp_path, {"training": [{"image": "a.avi", "label": 1}], "test": []})
    found = load_datalist(tmp_path, loader=LoadCined(root=tmp_path), output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no section 'val'; it has training \(1\), test \(0\)"):
        found.rows("val")
    with pytest.raises(ValueError, match="labelled abnormal; set train#dataset#data#normal_only: "):
        found.rows("training", normal_only=True)
    assert len(found.rows("training")[0]["id"]) == 16


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "bad"])
def test_bad_folders(tmp_path, kind):
    root = tmp_path / "data"
    message = {
        "missing": "dataset_dir 'data' does not exist", "file": "is a file, not a folder",
        "empty": "dataset_dir 'data' is empty", "bad": "holds no usable cine: all 1 files",
    }[kind]  # fmt: skip
    if kind == "file":
        root.write_text("x")
    elif kind != "missing":
        root.mkdir()
    if kind == "bad":
        (root / "x.txt").write_text("words")
    with pytest.raises((ValueError, OSError), match=message):
        load_datalist(root, loader=LoadCined(root=root), output_dir=tmp_path / "out")


def test_summary():
    rows = [{"num_frames": 5400, "fps": 30, "patient": "a"}, {"patient": "a"}]
    assert (
        summary(rows, 2)
        == "2 cines, 0.05 hours (1 of unknown length), 1 patients; 2 files set aside"
    )


# ---- the store ---------------------------------------------------------------------------


def stored(store, path, calls, frames=None):
    def make():
        calls.append(path.name)
        return Cine(moving_blob() if frames is None else frames, 30.0, "container")

    return store.get(path, path.name, "64", make)


def test_the_second_read_does_not_decode(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    calls, store = [], CineStore(tmp_path / "cache")
    stored(store, path, calls)
    frames, fps, source, *_ = stored(store, path, calls)
    assert calls == ["a"]
    assert isinstance(frames, np.memmap)
    assert np.array_equal(frames, moving_blob())
    assert (fps, source) == (30.0, "container")
    path.write_bytes(b"22")  # a changed file is noticed
    stored(store, path, calls)
    assert len(calls) == 2


def test_an_entry_cut_by_a_crash_is_made_again(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    calls, store = [], CineStore(tmp_path / "cache")
    stored(store, path, calls)
    entry = next((tmp_path / "cache").glob("*.npy"))
    entry.write_bytes(entry.read_bytes()[:500])
    frames, *_ = stored(store, path, calls)
    assert len(calls) == 2
    assert np.array_equal(frames, moving_blob())
    stored(store, path, calls)
    assert len(calls) == 2


def test_the_store_is_bounded_and_forgets_the_oldest(tmp_path):
    import os

    one = moving_blob().nbytes
    calls, store = [], CineStore(tmp_path / "cache", max_gb=3.5 * one / 1e9)
    paths = [tmp_path / str(i) for i in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(b"1")
        before = set((tmp_path / "cache").glob("*.npy"))
        stored(store, path, calls)
        for entry in set((tmp_path / "cache").glob("*.npy")) - before:
            os.utime(entry, (time.time() - 1000 + i, time.time()))
    total = sum(f.stat().st_size for f in (tmp_path / "cache").glob("*.npy"))
    assert total <= 3.5 * one
    stored(store, paths[-1], calls)
    assert len(calls) == 8  # the newest is still there
    stored(store, paths[0], calls)
    assert len(calls) == 9


def test_a_full_disk_only_costs_the_cache(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    store, calls = CineStore(tmp_path / "cache"), []
    with pytest.warns(
        UserWarning, match="cache cannot be written .No space left.*going on without"
    ):
        (tmp_path / "a").write_bytes(b"1")
        frames, *_ = stored(store, tmp_path / "a", calls)
    assert np.array_equal(frames, moving_blob())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        stored(store, tmp_path / "a", calls)
    assert not list((tmp_path / "cache").glob("*.tmp"))


# ---- the sector --------------------------------------------------------------------------


def raw_screen():
    """Moving speckle in a fan, static text and menu, a running trace in a strip below."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:300, :400]
    fan = (np.hypot(y - 20, x - 200) < 200) & (np.abs(x - 200) < 0.7 * (y - 20))
    frames = np.zeros((20, 300, 400), np.uint8)
    for t, frame in enumerate(frames):
        frame[fan] = random.integers(0, 200, fan.sum())
        frame[10:30, 10:90] = random.integers(0, 2, (20, 80)) * 0 + 220  # a name
        frame[10:30:2, 10:90:3] = 0
        frame[100:200, 360:395] = 120  # a menu
        frame[280 + int(8 * np.sin(t)), 3 * t : 3 * t + 100] = 255  # a trace
    return frames, fan


def test_text_menus_and_traces_are_blanked():
    frames, fan = raw_screen()
    mask = sector_mask(frames)
    overlap = (mask & fan).sum() / (mask | fan).sum()
    assert overlap > 0.85
    assert not mask[10:30, 10:90].any()
    assert not mask[100:200, 360:395].any()
    assert not mask[270:].any()


def test_no_text_of_the_real_cine_survives():
    cine = Cine(pydicom.pixels.pixel_array(REAL)[..., 1], None, "unknown", from_dicom=True)
    seen, (top, left) = isolate_sector(cine)
    whole = np.zeros_like(cine.frames)  # what is kept, where it was
    whole[:, top : top + seen.shape[1], left : left + seen.shape[2]] = seen
    for rows, columns in (
        (slice(0, 30), slice(0, 60)),
        (slice(0, 220), slice(290, 320)),
        (slice(222, 240), slice(0, 320)),
    ):
        assert cine.frames[:, rows, columns].max() > 60  # there is text
        # the fan's dark corner reaches there: no mark, at most what compression smeared of one
        assert whole[:, rows, columns].max() < 24
    assert sector_mask(cine.frames)[60:190, 130:220].mean() > 0.95
    assert seen.shape[1] < 200


def test_pre_cropped_clips_are_left_alone(tmp_path):
    frames = np.zeros((20, 112, 112), np.uint8)
    frames[:, 40:72, 40:72] = moving_blob(20, 32, 32)
    path = write_video(tmp_path / "a.avi", frames)
    loaded = LoadCined(root=tmp_path, size=112)({"image": path.name})["image"]
    assert np.abs(loaded[0].astype(int) - frames).mean() < 2


def test_loading_keeps_grey_colour_size_and_the_lists_fps(tmp_path):
    write_video(tmp_path / "a.avi", moving_blob(20, 32, 40))
    row = LoadCined(root=tmp_path, size=24)({"image": "a.avi", "fps": 77})
    assert row["image"].shape == (1, 20, 24, 24)
    assert (row["fps"], row["fps_source"]) == (77, "datalist")
    row = LoadCined(root=tmp_path, size=24, color=True)({"image": "a.avi"})
    assert row["image"].shape == (3, 20, 24, 24)
    assert row["fps_source"] == "container"


# ---- salt --------------------------------------------------------------------------------


def test_the_salt_is_private_and_made_once(tmp_path, monkeypatch):
    file = tmp_path / "x" / "salt"
    first = load_salt(file)
    assert load_salt(file) == first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert salted_id("MRN", first) == salted_id("MRN", first) != salted_id("MRN", b"other")
    assert "MRN" not in salted_id("MRN", first)
    monkeypatch.setenv("DISCOVR_MONAI_SALT", "mine")
    assert load_salt() == b"mine"
