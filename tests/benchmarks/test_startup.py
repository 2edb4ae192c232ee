"""What a start imports, reads and makes, by names and counts: seconds are benchmarks/speed/startup.py's."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ignite.engine import Engine

from discovr_monai import configuration
from discovr_monai.base import tracking
from discovr_monai.base.tracking import artifacts_place, make_store, store_file
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.lists import scan
from discovr_monai.data.lists.datalist import load_rows
from discovr_monai.data.lists.scan import examine_files
from discovr_monai.data.read.store import CineStore
from discovr_monai.training.mlflow_handler import Tracking
from discovr_monai.training.pictures import save_animation

ROOT = Path(__file__).parents[2]
PACKAGE, BUNDLE = ROOT / "discovr_monai", ROOT / "bundles" / "discovr"
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "speed")]

from startup import SMALL, settings, start, table  # noqa: E402

# what only some commands or files need: imported in the function that does
HEAVY = {
    "av", "cryptography", "highdicom", "itk", "matplotlib", "mlflow", "nibabel", "onnx",
    "onnxruntime", "openpyxl", "pandas", "pyarrow", "pydicom", "SimpleITK", "sqlalchemy",
    "tensorboard", "usearch",
}  # fmt: skip


def run(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture
def listed(tmp_path):
    """A data set of six empty files: nothing is decoded before the first step."""
    root = tmp_path / "data"
    root.mkdir()
    names = [f"{i}.avi" for i in range(6)]
    for name in names:
        (root / name).touch()
    rows = [{"image": name} for name in names]
    (root / "datalist.json").write_text(json.dumps({"training": rows[:4], "validation": rows[4:]}))
    return root


# ---- imports -----------------------------------------------------------------------------


def top_level_imports(file: Path) -> set[str]:
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_heavy_libraries_are_imported_where_they_are_needed(file):
    allowed = (
        {"mlflow"} if file.name == "mlflow_handler.py" else set()
    )  # MONAI's handler imports it
    assert top_level_imports(file) & HEAVY <= allowed


def test_the_training_adds_our_package_to_what_monai_imports(listed, tmp_path):
    code = """
import json, sys
import monai.bundle
import torch._dynamo, torch._inductor  # by any optimiser of torch's
before = set(sys.modules)
parser = monai.bundle.ConfigParser()
parser.read_config("configs/train.yaml")
for key, value in json.loads(sys.argv[1]).items():
    parser[key] = value
trainer = parser.get_parsed_content("train#trainer")
parser.get_parsed_content("checkpoints").attach(trainer)
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    changed = SMALL | {"dataset_dir": str(listed), "output_dir": str(tmp_path / "out")}
    packages = json.loads(run(code, json.dumps(changed | {"mlflow": False}), cwd=BUNDLE))
    assert set(packages) - sys.stdlib_module_names <= {
        "discovr_monai",
        "pebble",
        "safetensors",
        "torch",
    }
    assert "discovr_monai" in packages


def test_processes_that_read_cines_do_not_import_monai(listed, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        scan, "run_isolated", lambda function, jobs, **_: given.append(function) or iter(())
    )
    loader = LoadCined(root=listed, size=16, store=CineStore(tmp_path / "store"), color=True)
    assert not list(examine_files(["0.avi"] * 64, loader, b"salt", workers=2, quiet=True))
    code = "import pickle, sys; check = pickle.loads(bytes.fromhex(sys.argv[1])); kind = check('0.avi')['bad'][0]; print([kind, check.keywords['loader'].size, check.keywords['loader'].color, 'monai' in sys.modules])"
    assert run(code, pickle.dumps(given[0]).hex()) == "['unreadable', 16, True, False]"


# ---- reading -----------------------------------------------------------------------------


def test_a_folder_is_listed_once(listed, monkeypatch):
    def asked(path):
        raise AssertionError(f"{path.name} was asked for by itself")

    monkeypatch.setattr(Path, "exists", asked)
    assert len(load_rows(listed / "datalist.json", listed)["training"]) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.avi", None),
        ("./0.avi", None),
        ("sub/../0.avi", None),
        ("linked.avi", None),
        ("near/0.avi", None),
        ("away.avi", "points outside the data folder .'away.avi'"),
        ("far/secret.avi", "points outside the data folder .'secret.avi'"),
        ("../secret.avi", "points outside the data folder .'secret.avi'"),
        ("dead.avi", "1 of 1 files .* do not exist, the first is 'dead.avi'"),
        ("sub/none.avi", "1 of 1 files .* do not exist, the first is 'sub/none.avi'"),
        ("none/0.avi", "1 of 1 files .* do not exist, the first is 'none/0.avi'"),
    ],
)
def test_links_are_followed_to_where_they_lead(listed, name, message):
    (listed.parent / "other").mkdir()
    (listed.parent / "other" / "secret.avi").touch()
    (listed / "sub").mkdir()
    (listed / "linked.avi").symlink_to("1.avi")
    (listed / "near").symlink_to(".")
    (listed / "away.avi").symlink_to("../other/secret.avi")
    (listed / "far").symlink_to("../other")
    (listed / "dead.avi").symlink_to("nothing.avi")
    path = listed / "datalist.json"
    path.write_text(json.dumps({"training": [{"image": name}]}))
    if message is None:
        assert load_rows(path, listed)["training"] == [{"image": name}]
        return
    with pytest.raises(ValueError, match=message):
        load_rows(path, listed)


def test_configs_are_read_once(tmp_path, monkeypatch):
    base, overlay = tmp_path / "a.yaml", tmp_path / "b.yaml"
    base.write_text("epochs: 1\nlr: 1\nflag: true\n")
    overlay.write_text("lr: 2\n")
    read, original = [], configuration._read
    monkeypatch.setattr(configuration, "_read", lambda f: read.append(f) or original(f))
    words = ["run", "--config_file", f"['{base}','{overlay}']", "--epochs", "3", "--flag", "False"]
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    configuration.check_command_line(words)
    assert read == [str(base), str(overlay)]


# ---- MLflow ------------------------------------------------------------------------------


def uri(file: Path) -> str:
    from monai.utils import path_to_sqlite_uri

    return path_to_sqlite_uri(file)


def layout(file: Path) -> dict[tuple, list[str]]:
    """Tables and indices with their lines, and the version; a table's checks come in any order."""
    with sqlite3.connect(file) as store:
        found = store.execute("select type, name, tbl_name, sql from sqlite_master").fetchall()
        version = store.execute("select * from alembic_version").fetchall()
    lines = {
        tuple(what): sorted(line.strip(" ,\t") for line in (sql or "").splitlines())
        for *what, sql in found
    }
    return lines | {("version",): version}


def test_our_store_is_mlflows(tmp_path):
    from mlflow.tracking import MlflowClient

    ours, theirs = tmp_path / "a folder #1" / "ours.db", tmp_path / "theirs.db"
    make_store(uri(ours))
    MlflowClient(uri(theirs)).search_experiments()
    assert layout(ours) == layout(theirs)
    assert [f.name for f in ours.parent.iterdir()] == ["ours.db"]
    client = MlflowClient(uri(ours))
    run = client.create_run("0")
    client.log_metric(run.info.run_id, "loss", 0.5)
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert artifacts_place(uri(ours)) == (ours.parent / "mlruns").as_uri()


def test_a_store_that_is_there_stays(tmp_path):
    file = tmp_path / "mlruns.db"
    file.write_bytes(b"another process made it")
    make_store(uri(file))
    assert file.read_bytes() == b"another process made it"


def test_a_store_that_came_meanwhile_stays(tmp_path, monkeypatch):
    file, seen = tmp_path / "mlruns.db", []

    def meanwhile(path, target):
        file.write_bytes(b"first")
        seen.append(target)
        os.link(target, path)

    monkeypatch.setattr(Path, "hardlink_to", meanwhile)
    make_store(uri(file))
    assert file.read_bytes() == b"first"
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def refused(path, target):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    make_store(uri(tmp_path / "mlruns.db"))
    assert layout(tmp_path / "mlruns.db")
    assert [f.name for f in tmp_path.iterdir()] == ["mlruns.db"]


def test_a_store_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    def broken(file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "_write_schema", broken)
    with pytest.raises(KeyboardInterrupt):
        make_store(uri(tmp_path / "mlruns.db"))
    assert not list(tmp_path.iterdir())


def test_only_making_a_store_does_not_wait_for_the_disk(tmp_path):
    from sqlalchemy import create_engine, text

    make_store(uri(tmp_path / "mlruns.db"))
    with create_engine(uri(tmp_path / "mlruns.db")).connect() as connection:
        full = 2
        assert connection.execute(text("PRAGMA synchronous")).scalar() == full


def test_servers_are_left_alone():
    make_store("http://127.0.0.1:9")
    assert store_file("http://127.0.0.1:9") is artifacts_place("http://127.0.0.1:9") is None


def tracked(tmp_path, steps: int, epochs: int, fail_at: int = 0, **options):
    """Engine and handler of a training whose loss is its step's number; writes are counted."""

    def step(engine, _):
        if engine.state.iteration == fail_at:
            raise FloatingPointError("no")
        return [{"loss": float(engine.state.iteration), "clips": 2.0}]

    engine = Engine(step)
    handler = Tracking(uri(tmp_path / "mlruns.db"), "run", {"lr": 1}, **options)
    handler.attach(engine)
    writes, original = [], handler.client.log_batch

    def counted(run_id, metrics=(), **more):
        writes.append(len(metrics))
        return original(run_id, metrics=metrics, **more)

    handler.client.log_batch = counted
    engine.state.max_epochs = epochs
    return engine, writes, [None] * steps, epochs


def losses(tmp_path) -> list[tuple[int, float]]:
    with sqlite3.connect(tmp_path / "mlruns.db") as store:
        found = store.execute("select step, value from metrics where key = 'loss' order by step")
        return found.fetchall()


def test_figures_are_written_once_an_epoch_where_epochs_are_short(tmp_path):
    engine, writes, data, epochs = tracked(tmp_path, 5, 2, pause=1e9)
    engine.run(data, max_epochs=epochs)
    figures = [n for n in writes if n]
    assert figures == [5 * 3, 5 * 3]  # loss, clips and clips_per_second of five steps
    assert losses(tmp_path) == [(i, float(i)) for i in range(1, 11)]
    with sqlite3.connect(tmp_path / "mlruns.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
        assert {"torch", "git_commit"} <= {k for (k,) in store.execute("select key from tags")}


def test_figures_are_written_in_between_where_epochs_are_long(tmp_path):
    engine, writes, data, epochs = tracked(tmp_path, 4, 1, pause=0.0)
    engine.run(data, max_epochs=epochs)
    assert [n for n in writes if n] == [3, 3, 3, 3]


def test_mlflow_is_never_given_more_than_it_takes(tmp_path):
    engine, writes, data, epochs = tracked(tmp_path, 400, 1, pause=1e9)
    engine.run(data, max_epochs=epochs)
    assert [n for n in writes if n] == [1000, 200]
    assert len(losses(tmp_path)) == 400


def test_what_waits_is_written_when_a_training_fails(tmp_path):
    engine, _, data, epochs = tracked(tmp_path, 9, 1, fail_at=5, pause=1e9)
    engine.run(data, max_epochs=epochs)  # Ignite's engine takes a handled error for done
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]
    with sqlite3.connect(tmp_path / "mlruns.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FAILED",)]


# ---- what an epoch does beside its steps --------------------------------------------------


def test_pictures_are_zoomed_without_a_change(tmp_path):
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    save_animation(tmp_path / "a.gif", frames, zoom=3)
    with Image.open(tmp_path / "a.gif") as animation:
        assert (animation.n_frames, animation.size) == (3, (18, 12))
        for i, frame in enumerate(frames):  # 24 colours each: a palette holds them all
            animation.seek(i)
            seen = np.asarray(animation.convert("RGB"))
            assert np.array_equal(seen, frame.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(
    ("rows", "interval", "metrics", "value"),
    [
        ([1], 4, {"epoch_loss": 1.0}, None),
        ([1], 4, {"epoch_loss": 1.0, "val_loss": 2.0}, 2.0),
        ([], 4, {"epoch_loss": 1.0}, 1.0),
        ([1], 0, {"epoch_loss": 1.0}, 1.0),
    ],
)
def test_best_compares_validations_with_validations(rows, interval, metrics, value, monkeypatch):
    from monai.bundle import ConfigParser

    monkeypatch.chdir(BUNDLE)
    parser = ConfigParser()
    parser.read_config("configs/train.yaml")
    parser["validate#dataset"], parser["val_interval"] = rows, interval
    monitor = parser.get_parsed_content("checkpoints#monitor")
    assert monitor(SimpleNamespace(state=SimpleNamespace(metrics=metrics))) == value


# ---- the command that measures ------------------------------------------------------------


def test_the_table_says_what_is_ours():
    report = {
        "machine": {"gpu": None, "cores": 2, "torch": "2", "busy_cores": 1.5}, "rounds": 1, "quick": True,
        "start": [{"warm": {"ours": 9.5, "plain": 6.25}}],
    }  # fmt: skip
    text = table(report)
    assert "| **ours on top** (at most 5) | **3.25 [3.25, 3.25]** |" in text
    assert "| the training command | 9.50 [9.50, 9.50] |" in text
    assert "These figures mean nothing" in text
    assert "kept 1.5 cores busy: not to be kept" in text


def test_a_start_is_measured_to_its_first_step(tmp_path):
    from discovr_monai.phantom.dataset import write_phantom_dataset

    root = write_phantom_dataset(
        tmp_path / "phantom", num_clips=6, num_frames=16, size=32, workers=1, progress=False
    )
    changed = SMALL | {"dataset_dir": root / "Videos", "output_dir": tmp_path / "out", "epochs": 1}
    command = ["run", "training", "--config_file", "configs/train.yaml", *settings(changed)]
    measured = start("ours", command)
    assert measured["seconds"] > 0
    assert {"discovr_monai.training.trainer", "mlflow"} <= set(measured["modules"])
    assert (tmp_path / "out" / "mlruns.db").exists()
    assert not (tmp_path / "out" / "last.pt").exists()  # it ended after a step
    assert not {"highdicom", "usearch", "cv2", "torchvision"} & set(measured["modules"])


def test_a_step_without_us_is_measured():
    measured = start("plain", ["configs/train.yaml", json.dumps(SMALL)])
    assert measured["seconds"] > 0
    assert {"torch", "monai.bundle"} <= set(measured["modules"])
    assert not {"discovr_monai.training.checkpoint", "sqlalchemy", "av"} & set(measured["modules"])
