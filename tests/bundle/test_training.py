"""The bundle's real commands, in processes of their own."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bundle.conftest import TINY, run, train


@pytest.fixture(scope="session")
def mixed(tmp_path_factory, phantom):
    """The pydicom cine, phantom AVIs, an H.264 MP4, a NIfTI, and what is none of it."""
    import av
    import nibabel
    import pydicom

    from discovr_monai.data.read.cine import read_cine

    folder = tmp_path_factory.mktemp("mixed") / "hospital"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(pydicom.examples.get_path("ybr_color"), folder / "sub" / "a4c.dcm")
    videos = sorted((phantom / "Videos").glob("*.avi"))
    for video in videos[:10]:
        shutil.copy(video, folder)
    frames = read_cine(videos[10]).frames
    with av.open(str(folder / "b.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width = stream.height = 112
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        out.mux(stream.encode())
    image = nibabel.Nifti1Image(np.swapaxes(frames, 0, 2), np.diag([1, 1, 1, 1]))
    nibabel.save(image, folder / "c.nii.gz")
    (folder / "notes.txt").write_text("Mrs Smith, born 1950")
    (folder / "broken.avi").write_bytes(videos[11].read_bytes()[:4000])
    return folder


@pytest.fixture(scope="session")
def trained(bundle, mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    done = train(bundle, "--dataset_dir", str(mixed), "--output_dir", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return done, out


def test_a_mixed_folder_just_works(trained):
    done, out = trained
    assert "Training on 12 cines" in done.stdout
    assert "2 files set aside" in done.stdout
    assert "loss=" in done.stderr
    assert "cluster=" in done.stderr
    for word in ("Checkpoint:", "last.pt", "mlruns.db", "discovr-monai mlflow"):
        assert word in done.stdout
    report = (out / "bad_files.csv").read_text()
    assert "notes.txt,not a cine,it is text" in report
    assert "broken.avi,unreadable" in report


def test_nothing_private_reaches_the_store(trained, mixed):
    _, out = trained
    names = [f.name for f in mixed.rglob("*") if f.is_file()]
    secrets = [*names, str(mixed), str(Path.home()), "Smith"]
    with sqlite3.connect(out / "mlruns.db") as store:
        params = [str(row) for row in store.execute("select key, value from params")]
        tags = [str(row) for row in store.execute("select key, value from tags")]
    assert len(params) > 30
    for secret in secrets:
        assert not [line for line in params + tags if secret in line], secret
    for file in (out / "mlruns").rglob("*"):
        assert not any(secret in file.name for secret in names)


def test_mlflow_holds_the_run(trained):
    _, out = trained
    with sqlite3.connect(out / "mlruns.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        metrics = {m for (m,) in store.execute("select distinct key from metrics")}
        tags = {k for (k,) in store.execute("select key from tags")}
        steps = store.execute("select count(*) from metrics where key = 'loss'").fetchone()[0]
    assert {"loss", "video", "image", "cluster", "lr", "momentum", "grad_norm", "clips_per_second",
            "val_loss", "video_entropy", "prototypes_used_target"} <= metrics  # fmt: skip
    assert {"torch", "monai", "git_commit"} <= tags
    assert steps == 6
    pictures = {f.suffix for f in (out / "mlruns").rglob("*") if f.is_file()}
    assert {".gif", ".png"} <= pictures


def test_the_same_command_again_reuses_what_is_there(trained, bundle, mixed):
    _, out = trained
    before = (out / "last.pt").read_bytes()
    done = train(bundle, "--dataset_dir", str(mixed), "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    assert "This training is complete (2 epochs)" in done.stdout
    assert (out / "last.pt").read_bytes() == before


def test_the_checkpoint_feeds_inference(trained, bundle, mixed, tmp_path):
    """Without heads: embeddings of all that can be read."""
    from discovr_monai.inference.parquet import read_embeddings

    _, out = trained
    done = run(
        bundle, "run", "run", "--config_file", "configs/inference.yaml", "--dataset_dir",
        str(mixed), "--ckpt", str(out / "last.pt"), "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_embeddings(tmp_path / "out" / "embeddings.parquet")
    assert found.shape[1] == 24
    assert len(found) >= 12
    assert np.isfinite(found).all()
    report = (tmp_path / "out-private" / "bad_files.csv").read_text()
    assert "broken.avi" in report


def test_a_datalist_and_the_clis_own_tracking(bundle, phantom, tmp_path):
    done = train(
        bundle,
        "--dataset_dir",
        str(phantom),
        "--output_dir",
        str(tmp_path),
        "--tracking",
        "mlflow",
        "--tensorboard",
        "True",
    )
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlruns.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        metrics = {m for (m,) in store.execute("select distinct key from metrics")}
        assert not store.execute(
            "select 1 from params where value like ?", (f"%{phantom}%",)
        ).fetchall()
    assert {"loss", "train_loss"} <= metrics
    assert list((tmp_path / "tensorboard").glob("events*"))


def _count(store, query):
    """A query's figure; 0 while there is no store."""
    if not store.exists():
        return 0
    with sqlite3.connect(store) as connection:
        return connection.execute(query).fetchone()[0]


def test_a_killed_training_is_running_no_longer_once_it_starts_again(bundle, phantom, tmp_path):
    where = ["--dataset_dir", str(phantom), "--output_dir", str(tmp_path)]
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    command += ["--config_file", "configs/train.yaml", *TINY, *where, "--epochs", "100"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=bundle, stdout=log, stderr=log)
    tagged = "select count(*) from tags where key = 'output_folder'"  # the config names the folder
    while not _count(tmp_path / "mlruns.db", tagged):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    with sqlite3.connect(tmp_path / "mlruns.db") as store:
        assert store.execute("select status from runs").fetchall() == [("RUNNING",)]
    done = train(bundle, *where)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlruns.db") as store:
        runs = store.execute("select status from runs order by start_time").fetchall()
    assert runs == [("KILLED",), ("FINISHED",)]


def test_only_normal_hearts_are_trained_on_unless_asked(bundle, phantom, tmp_path):
    rows = json.loads((phantom / "datalist.json").read_text())["training"]
    normal = sum(not row["label"] for row in rows)
    assert 0 < normal < len(rows)
    for flag, count in (("true", normal), ("false", len(rows))):
        done = train(
            bundle, "--dataset_dir", str(phantom), "--output_dir", str(tmp_path / flag),
            "--train#dataset#data#normal_only", flag.capitalize(), "--epochs", "1", "--mlflow", "False",
        )  # fmt: skip
        assert f"Training on {count} cines" in done.stdout, done.stderr
        assert not (tmp_path / flag / "mlruns.db").exists()


@pytest.mark.parametrize(
    "baseline", ["video_only", "image_only", "scd_without_image_loss", "videomae", "sigma"]
)
def test_baselines_are_configs(bundle, phantom, tmp_path, baseline):
    done = train(
        bundle, "--dataset_dir", str(phantom), "--output_dir", str(tmp_path), "--epochs", "1",
        config=f"['configs/train.yaml','configs/baselines/{baseline}.yaml']",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Done:" in done.stdout


def test_two_processes_train_and_stay_equal(bundle, phantom, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = train(
        bundle, "--dataset_dir", str(phantom), "--output_dir", str(tmp_path), "--epochs", "1",
        "--batch_size", "2", "--precision", "fp32",
        config="['configs/train.yaml','configs/multi_gpu_train.yaml']", launcher=launcher,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("Done:") == 1
    alone = train(
        bundle, "--dataset_dir", str(phantom), "--output_dir", str(tmp_path / "alone"),
        "--epochs", "1", "--batch_size", "4", "--precision", "fp32",
    )  # fmt: skip
    assert alone.returncode == 0
    both, one = (
        torch.load(d / "last.pt", weights_only=True)["network"]
        for d in (tmp_path, tmp_path / "alone")
    )
    worst = max(float((both[k] - one[k]).abs().max()) for k in one)
    assert worst < 2e-3  # fp32, AdamW divides small gradients; exactness is a later issue


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epocks", "3"], "--epocks: no config knows this key. Did you mean 'epochs'?"),
        (["--stride", "-1"], "stride -1 must be at least 1 frame"),
        (["--image_size", "30"], "image_size 30 is not divisible by patch_size 8: use image_size 32"),
        (["--dataset_dir", "nowhere"], "dataset_dir 'nowhere' does not exist. Check --dataset_dir"),
        (["--batch_size", "500"], "fewer clips than batch_size"),
        (["--clip#pad_mode", "refuse", "--num_frames", "64"], "frames, a clip needs 379. Lower num_frames"),
    ],
)  # fmt: skip
def test_errors_end_in_one_clear_line(bundle, phantom, tmp_path, arguments, message):
    data = [] if "--dataset_dir" in arguments else ["--dataset_dir", str(phantom)]
    done = train(bundle, "--output_dir", str(tmp_path), *data, *arguments)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_an_empty_folder(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    done = train(bundle, "--dataset_dir", str(tmp_path / "empty"), "--output_dir", str(tmp_path))
    assert "Error: dataset_dir 'empty' is empty. Put cines into it" in done.stderr
