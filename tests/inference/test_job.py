"""Inference over folders and archives: what comes out, and that nothing is lost or doubled."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children

import numpy as np
import pytest
import torch

from discovr_monai.base.engine import IsolatedPool
from discovr_monai.base.notice import NOTICE
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.write.labels import full_frame_labels
from discovr_monai.inference.findings import Analyst
from discovr_monai.inference.model import load_model
from discovr_monai.inference.parquet import read_embeddings, read_parquet
from discovr_monai.inference.plan import Plan, find_cines
from discovr_monai.inference.reading import CineReader
from tests.inference.conftest import infer


@pytest.fixture(scope="session")
def done(model_file, labelled, tmp_path_factory):
    out = tmp_path_factory.mktemp("inference") / "out"
    infer(load_model(model_file), labelled, out, section="test", part_size=4).run()
    return out


def rows_of(out) -> list[dict]:
    return read_parquet(out / "embeddings.parquet", leave_out=("embedding", "thumbnail"))


def test_every_cine_has_a_row_with_embedding_ef_and_contours(done, labelled, model):
    wanted = json.loads((labelled / "datalist.json").read_text())["test"]
    rows = rows_of(done)
    assert len(rows) == len(wanted)
    assert read_embeddings(done / "embeddings.parquet").shape == (len(rows), 24)
    spoken = [r for r in rows if r["ef_withheld"] is None]
    assert len(spoken) >= 0.8 * len(rows)
    for row in spoken:
        assert 0 <= row["ef_low"] <= row["ef"] <= row["ef_high"] <= 100
    assert {r["model"] for r in rows} == {model.sha256}
    assert {r["notice"] for r in rows} == {NOTICE}


def test_nothing_leads_back_to_a_patient(done, labelled):
    content = json.loads((labelled / "datalist.json").read_text())["test"]
    secrets = {r["patient"] for r in content} | {r["image"].split("/")[-1][:-4] for r in content}
    for file in done.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            if file.suffix == ".gz":
                data = gzip.decompress(data)
            if file.suffix == ".html":  # pictures hold any five letters by chance
                data = re.sub(rb"data:[\w/;,+=]+", b"", data)
            if file.suffix == ".parquet":
                data = repr(read_parquet(file, leave_out=("embedding", "thumbnail"))).encode()
            if file.suffix == ".gif":
                continue
            assert not any(s.encode() in data for s in secrets), file.name
            assert not any(s in str(file.relative_to(done)) for s in secrets)
    private = done.with_name("out-private")
    names = {r["file"] for r in csv.DictReader((private / "files.csv").open())}
    assert names == {r["image"] for r in content}


def test_the_notice_is_in_every_form(done):
    import nibabel
    import pyarrow.parquet as pq
    from PIL import Image, ImageDraw

    assert pq.read_schema(done / "embeddings.parquet").metadata[b"notice"].decode() == NOTICE
    assert NOTICE in (done / "results.csv").read_text()
    pages = list(done.glob("studies/*/page.html"))
    assert pages
    assert all(NOTICE in p.read_text() for p in pages)
    maps = list(done.glob("studies/*/*.nii.gz"))
    assert maps
    assert {nibabel.load(m).header["descrip"].item().decode() for m in maps} == {NOTICE}
    assert all(NOTICE in (p.parent / "results.json").read_text() for p in pages)
    assert json.loads((done / "inference.json").read_text())["notice"] == NOTICE
    written = Image.new("L", (224, 14))  # whole, below the cine
    ImageDraw.Draw(written).text((4, 1), NOTICE, 255)
    letters = np.asarray(written).ravel()
    animations = list(done.glob("studies/*/*.gif"))
    assert len(animations) == len(maps)
    for file in animations:
        with Image.open(file) as animation:
            below = np.asarray(animation.convert("L"))[224:].ravel()
        assert np.corrcoef(below, letters)[0, 1] > 0.97  # but for the few colours


def test_label_maps_lie_on_their_cines(done, labelled, model):
    """The file's voxels are what the model says of the cine's own pixels."""
    import nibabel

    files = {
        r["id"]: r["file"]
        for r in csv.DictReader((done.with_name("out-private") / "files.csv").open())
    }
    content = json.loads((labelled / "datalist.json").read_text())["test"]
    spacing = {r["image"]: r["spacing"] for r in content}
    maps = list(done.glob("studies/*/*.nii.gz"))
    assert maps
    reader = CineReader(LoadCined(root=labelled, size=32), 4, model.about["clip"], 3, 0.5)
    analyst = Analyst(model, torch.device("cpu"))
    for file in maps:
        image = nibabel.load(file)
        name = files[file.name.removesuffix(".nii.gz")]
        cine = LoadCined(root=labelled, size=None).load(name)
        assert image.shape == (cine.window[1], cine.window[0], len(cine.frames))
        assert image.header.get_zooms()[:2] == pytest.approx(spacing[name], abs=1e-5)
        row = next(r for r in content if r["image"] == name)
        (found,) = analyst([reader({**row, "id": "x"})["seen"]])
        full = full_frame_labels(found.labels, cine.window)
        assert np.array_equal(np.asarray(image.dataobj).T, full)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_run_goes_on_with_another_number_of_workers(
    model_file, labelled, done, tmp_path, workers
):
    """Parts already there stay, the rest is done, and the table is the same."""
    out = tmp_path / "out"
    options = {"section": "test", "part_size": 4, "overlays": False, "pages": 0}
    first = infer(load_model(model_file), labelled, out, worker=1, workers_in_all=2, **options)
    first.run()
    assert not (out / "embeddings.parquet").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in (out / "parts").iterdir()}
    assert 0 < len(kept) < len(first.plan.parts)
    for worker in range(workers):
        infer(
            load_model(model_file), labelled, out, worker=worker, workers_in_all=workers, **options
        ).run()
    now = {p.name: p.stat().st_mtime_ns for p in (out / "parts").iterdir()}
    assert {k: now[k] for k in kept} == kept
    assert [r["id"] for r in rows_of(out)] == [r["id"] for r in rows_of(done)]
    a, b = (read_embeddings(d / "embeddings.parquet") for d in (out, done))
    assert np.abs(a - b).max() < 1e-6


def test_reading_processes_last_for_all_parts(model_file, labelled, done, tmp_path, monkeypatch):
    started = []

    def start(pool, processes):
        started.extend([pool] * processes)
        return once(pool, processes)

    once = IsolatedPool._start
    monkeypatch.setattr(IsolatedPool, "_start", start)
    out, options = tmp_path / "out", {"section": "test", "overlays": False, "pages": 0}
    run = infer(load_model(model_file), labelled, out, part_size=4, readers=2, **options)
    run.run()
    assert len(run.plan.parts) == 3
    assert 1 <= len(started) <= 2
    assert active_children() == []
    assert [r["id"] for r in rows_of(out)] == [r["id"] for r in rows_of(done)]
    a, b = (read_embeddings(d / "embeddings.parquet") for d in (out, done))
    assert np.abs(a - b).max() < 1e-6


def test_new_files_are_added_and_bad_ones_set_aside(model_file, labelled, tmp_path):
    source, out = tmp_path / "cines", tmp_path / "out"
    source.mkdir()
    files = sorted((labelled / "Videos").glob("*.avi"))[:3]
    shutil.copy(files[0], source / "b.avi")
    (source / "broken.avi").write_bytes(files[1].read_bytes()[:3000])
    infer(load_model(model_file), source, out).run()
    assert len(rows_of(out)) == 1
    shutil.copy(files[2], source / "a.avi")
    infer(load_model(model_file), source, out).run()
    assert len(rows_of(out)) == 2
    table = (out.with_name("out-private") / "bad_files.csv").read_text()
    assert "broken.avi" in table
    assert "a.avi," not in table


def test_a_single_file(model_file, labelled, tmp_path):
    file = sorted((labelled / "Videos").glob("*.avi"))[0]
    infer(load_model(model_file), file, tmp_path / "out", view="A4C").run()
    (row,) = rows_of(tmp_path / "out")
    assert row["view"] == "A4C"


def test_an_embedding_does_not_depend_on_its_batch_mates(model, labelled):
    root, rows = find_cines(labelled, None, "test")
    reader = CineReader(LoadCined(root=root, size=32), 4, model.about["clip"], 3, 0.5)
    seen = [reader({**r, "id": str(i)})["seen"] for i, r in enumerate(rows[:5])]
    together = Analyst(model, torch.device("cpu"), batch_size=16, contours=False)(seen)
    alone = [
        Analyst(model, torch.device("cpu"), batch_size=2, contours=False)([s])[0] for s in seen
    ]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a.embedding - b.embedding).max() < 1e-6
        assert a.values["ef"] == pytest.approx(b.values["ef"], abs=0.02)


def test_long_cines_are_covered_by_windows():
    reader = CineReader(LoadCined(), 8, {"stride": 6}, 3, 0.5)
    assert reader.windows(30, 6) == 3
    assert reader.windows(43, 6) == 3
    assert reader.windows(43 + 430, 6) == 21  # 430 frames more in steps of half a span
    with pytest.raises(ValueError, match="overlap 1 must lie"):
        CineReader(LoadCined(), 8, {}, 3, 1)


def test_another_models_rows_are_refused(model_file, labelled, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    model = load_model(model_file)
    model.sha256 = "another"
    with pytest.raises(ValueError, match="'out' holds another model's rows: choose another"):
        infer(model, labelled, out, section="test")
    with pytest.raises(ValueError, match="'out' holds rows of another pooling"):
        infer(load_model(model_file, pooling="mean"), labelled, out, section="test")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="'full' is not empty"):
        infer(load_model(model_file), labelled, tmp_path / "full")


def test_one_study_never_answers_for_another(model_file, labelled, tmp_path):
    """Two folders with the same file name, or a file that was replaced, into one output."""
    files = sorted((labelled / "Videos").glob("*.avi"))[:2]
    for folder, file in zip(("a", "b"), files, strict=True):
        (tmp_path / folder).mkdir()
        shutil.copy(file, tmp_path / folder / "IM1.avi")
    out = tmp_path / "out"
    infer(load_model(model_file), tmp_path / "a", out, pages=0).run()
    with pytest.raises(ValueError, match="'out' holds the rows of another source"):
        infer(load_model(model_file), tmp_path / "b", out, pages=0)
    shutil.copy(files[1], tmp_path / "a" / "IM1.avi")
    with pytest.raises(ValueError, match="1 cines have changed since they were read"):
        infer(load_model(model_file), tmp_path / "a", out, pages=0)
    shutil.rmtree(tmp_path / "out-private")
    with pytest.raises(ValueError, match="out-private has gone"):
        infer(load_model(model_file), tmp_path / "a", out, pages=0)


def test_workers_need_one_salt(model_file, labelled, tmp_path, monkeypatch):
    infer(load_model(model_file), labelled, tmp_path / "out", section="test")
    monkeypatch.setenv("DISCOVR_MONAI_SALT", "another")
    with pytest.raises(ValueError, match="ids of another salt"):
        infer(load_model(model_file), labelled, tmp_path / "out", section="test")


def test_a_folder_with_the_shorter_ids_of_an_earlier_version_is_refused(tmp_path, labelled):
    root, rows = find_cines(labelled)
    Plan(tmp_path / "out", root, rows, {"model": "m"}, 4)
    file = tmp_path / "out" / "inference.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({**about, "salt": about["salt"][:12]}))
    with pytest.raises(ValueError, match="was made with shorter ids by an earlier version: choose"):
        Plan(tmp_path / "out", root, rows, {"model": "m"}, 4)


def test_workers_that_start_together_share_one_plan(tmp_path, labelled):
    """Whoever writes a generation first has cut it, whatever the others list."""
    root, rows = find_cines(labelled)

    def plan(chosen):
        return Plan(tmp_path / "out", root, chosen, {"model": "m"}, 4)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: plan(rows[: len(rows) - i]), range(8)))
    once = plan(rows)
    assert once.names == plan(rows).names
    names = [n for part in once.names for n in part]
    assert len(names) == len(set(names)) == len(rows)


def test_a_cine_that_cannot_be_written_costs_itself(model_file, labelled, tmp_path, monkeypatch):
    from discovr_monai.inference import outputs

    def refuse(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(outputs, "write_nifti_labels", refuse)
    out = tmp_path / "out"
    infer(load_model(model_file), labelled, out, section="test", pages=1).run()
    rows = rows_of(out)
    assert len(rows) == 10
    assert any("could not be written" in (r["contours_withheld"] or "") for r in rows)


def test_an_output_folder_among_the_cines_is_no_source(model_file, labelled, tmp_path):
    source = tmp_path / "cines"
    source.mkdir()
    shutil.copy(sorted((labelled / "Videos").glob("*.avi"))[0], source / "a.avi")
    for _ in range(2):
        infer(load_model(model_file), source, source / "out", view="A4C").run()
    assert len(rows_of(source / "out")) == 1


def test_a_file_that_has_gone_keeps_its_row(model_file, labelled, tmp_path):
    source, out = tmp_path / "cines", tmp_path / "out"
    source.mkdir()
    for name, file in zip("ab", sorted((labelled / "Videos").glob("*.avi")), strict=False):
        shutil.copy(file, source / f"{name}.avi")
    infer(load_model(model_file), source, out).run()
    (source / "a.avi").unlink()
    infer(load_model(model_file), source, out).run()
    assert len(rows_of(out)) == 2
    assert "a.avi" in (out.with_name("out-private") / "files.csv").read_text()


def test_a_study_without_a_usable_cine(model_file, tmp_path):
    source = tmp_path / "cines"
    source.mkdir()
    (source / "a.avi").write_bytes(b"RIFF nothing")
    with pytest.raises(ValueError, match="no usable cine: all 1 files were set aside"):
        infer(load_model(model_file), source, tmp_path / "out").run()
    with pytest.raises(ValueError, match="holds no file that may be a cine"):
        find_cines(tmp_path / "out-private" / "set_aside")
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        find_cines(tmp_path / "nowhere")
