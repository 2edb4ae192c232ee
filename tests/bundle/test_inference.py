"""From a checkpoint to a model with heads, and to what it says of studies, by the commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from discovr_monai.base.notice import NOTICE
from discovr_monai.cli import main
from discovr_monai.inference.parquet import read_parquet
from tests.bundle.conftest import BUNDLE, run
from tests.evaluation.conftest import checkpoint, labelled  # noqa: F401 (fixtures)

ROOT = BUNDLE.parents[1]


@pytest.fixture(scope="module")
def model(bundle, labelled, checkpoint, tmp_path_factory):  # noqa: F811
    """The documented commands: two evaluations that save their heads, and their union."""
    folder = tmp_path_factory.mktemp("heads")
    common = ["--ckpt", str(checkpoint), "--dataset_dir", str(labelled), "--mlflow", "False"]
    common += ["--bootstrap_draws", "5", "--cache_dir", str(folder / "cache")]
    heads = []
    for task, more in (
        ("lvef", ["--coverage", "0.8"]),
        ("segmentation", ["--branch", "image_teacher", "--epochs", "2", "--every_frame", "False"]),
    ):
        heads += ["--head", str(folder / f"{task}.safetensors")]
        done = run(
            bundle, "run", "evaluating", "--config_file", f"configs/{task}.yaml", *common, *more,
            "--output_dir", str(folder / task), "--save_head", heads[-1],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    file = folder / "model.pt"
    assert main(["model", str(checkpoint), str(file), *heads]) == 0
    return file


def infer(bundle, model, source, out, *more, **options):
    return run(
        bundle, "run", "run", "--config_file", "configs/inference.yaml", "--ckpt", str(model),
        "--dataset_dir", str(source), "--output_dir", str(out), *more, **options,
    )  # fmt: skip


def test_a_folder_to_everything(bundle, model, labelled, tmp_path):  # noqa: F811
    done = infer(bundle, model, labelled, tmp_path / "out", "--section", "test")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "10 cines, 0 files set aside. For research use only" in done.stdout
    rows = read_parquet(tmp_path / "out" / "embeddings.parquet")
    assert len(rows) == 10
    assert any(r["ef"] is not None for r in rows)
    words = done.stdout + done.stderr
    assert not any(f.stem in words for f in (labelled / "Videos").iterdir())
    first = rows[0]["id"]
    assert main(["nearest", str(tmp_path / "out" / "embeddings.parquet"), first, "--k", "3"]) == 0


def test_dicom_in_dicom_out(bundle, model, labelled, tmp_path):  # noqa: F811
    import pydicom

    from discovr_monai.data.read.cine import read_cine
    from discovr_monai.data.write.dicom import write_dicom

    source = tmp_path / "study"
    source.mkdir()
    for i, file in enumerate(sorted((labelled / "Videos").glob("*.avi"))[:3]):
        cine = read_cine(file)
        write_dicom(
            source / f"IM{i}",
            cine.frames,
            fps=cine.fps,
            spacing=(0.5, 0.5),
            tags={"PatientName": "Smith^Anna", "PatientID": "Smith1"},
        )
    done = infer(bundle, model, source, tmp_path / "out", "--view", "A4C", "--sector_mask", "False")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_parquet(tmp_path / "out" / "embeddings.parquet")
    assert len(rows) == 3
    spoken = [r for r in rows if r["contours_withheld"] is None]
    assert spoken
    private = tmp_path / "out-private" / "studies"
    for row in spoken:
        assert row["dicom"] == "segmentation"
        found = pydicom.dcmread(next(private.rglob(f"{row['id']}.dcm")))
        assert found.Modality == "SEG"
        assert found.NumberOfFrames >= 1
        assert found.SeriesDescription == NOTICE
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"Smith" not in file.read_bytes(), file.name


def test_two_workers_by_torchrun_one_killed(bundle, model, labelled, tmp_path):  # noqa: F811
    """A run that is killed in the middle is finished by another number of workers."""
    options = ("--part_size", "1", "--pages", "0", "--contours", "False")
    command = [
        sys.executable, "-m", "monai.bundle", "run", "run", "--config_file",
        "configs/inference.yaml", "--ckpt", str(model), "--dataset_dir", str(labelled),
        "--output_dir", str(tmp_path / "out"), *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=bundle, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "out" / "parts"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and len(list(parts.glob("*.parquet"))) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {f.name: f.stat().st_mtime_ns for f in parts.glob("*.parquet")}
    assert 3 <= len(before) < 30
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = infer(
        bundle, model, labelled, tmp_path / "out", *options, launcher=launcher,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_parquet(tmp_path / "out" / "embeddings.parquet")
    assert len(rows) == len({r["id"] for r in rows}) == 30
    now = {f.name: f.stat().st_mtime_ns for f in parts.glob("*.parquet")}
    assert {k: now[k] for k in before} == before


def test_an_archive_of_the_bundle_works_elsewhere(bundle, labelled, tmp_path):  # noqa: F811
    """make bundle: unpacked somewhere else, with the wheel instead of this checkout."""
    from discovr_monai.configuration import pack_bundle

    plan = subprocess.run(
        ["make", "-n", "-B", "bundle"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert 'pack_bundle("bundles/discovr", "dist/discovr.zip")' in plan
    pack_bundle(bundle, tmp_path / "discovr.zip")
    with zipfile.ZipFile(tmp_path / "discovr.zip") as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "elsewhere")
    assert "discovr/models/model.pt" in names
    assert not [n for n in names if "/data/" in n or "/output/" in n]
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)],
        check=True,
    )
    site = tmp_path / "site"
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    there = tmp_path / "elsewhere" / "discovr"
    video = sorted((labelled / "Videos").glob("*.avi"))[0]
    done = infer(
        there, "models/model.pt", video, tmp_path / "out", "--view", "A4C",
        env={**os.environ, "PYTHONPATH": str(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(read_parquet(tmp_path / "out" / "embeddings.parquet")) == 1
    code = "import discovr_monai; print(discovr_monai.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(site)}, cwd=there,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(site)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt", "LICENSE"], "LICENSE"),
        (["--ckpt", "models/nothing.pt"], "checkpoint nothing.pt does not exist"),
        (
            ["--expect", "{'embed_dim': 768}"],
            "was trained with embed_dim 24, the config expects 768",
        ),
        (["--branch", "image_student"], "has no image student: choose another branch"),
        (["--precision", "fp8"], "precision 'fp8' must be fp32 or bf16"),
    ],
)
def test_one_sentence_for_what_cannot_be(bundle, model, labelled, tmp_path, words, message):  # noqa: F811
    done = infer(bundle, model, labelled, tmp_path / "out", *words)
    assert done.returncode != 0
    assert message in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "embeddings.parquet").exists()
