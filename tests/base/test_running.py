"""A killed run is marked when the next one starts in its folder; runs of other folders are not."""

from __future__ import annotations

import getpass
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ignite.engine import Engine
from mlflow.tracking import MlflowClient

from discovr_monai.base import tracking
from discovr_monai.base.tracking import end_killed_runs, folder_tag, log_evaluation
from discovr_monai.label.learn.runs import tracked_training
from discovr_monai.training.mlflow_handler import Tracking

ROOT = Path(__file__).parents[2]
EVALUATION = {
    "experiment": "e", "task": "knn", "settings": {}, "metrics": {}, "headlines": {}, "artifacts": [],
}  # fmt: skip


def train(store, output, step, name=None):
    """A training of nine steps whose loop body is ``step``."""
    engine = Engine(lambda engine, _: step(engine) or [{"loss": 1.0, "clips": 2.0}])
    name = name or tracking.unique_run_name()
    Tracking(store, name, pause=0.0, output_dir=output).attach(engine)
    engine.run([None] * 9, max_epochs=1)


def label(store, output, step):
    with tracked_training(store, {}, output) as log:
        log({"loss": 1.0}, 1)
        step(None)


def evaluate(store, output, step):
    log_evaluation(store, **EVALUATION, output_dir=output)
    step(None)


WRITERS = {"training": train, "labels": label, "evaluation": evaluate}
CHILD = """
import sys, time
from pathlib import Path
from mlflow.tracking import MlflowClient
from tests.base import test_running
def wait(engine):
    if engine is None or engine.state.iteration == 3:
        print("at work", flush=True)
        time.sleep(600)
writer, store, output = sys.argv[1:]
if writer == "evaluation":
    MlflowClient.log_artifact = lambda *_: wait(None)
    test_running.EVALUATION["artifacts"] = ["report.html"]
test_running.WRITERS[writer](store, Path(output), wait)
"""


def statuses(file: Path) -> list[str]:
    with sqlite3.connect(file) as store:
        return [s for (s,) in store.execute("select status from runs order by start_time")]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_run_says_so_once_the_next_starts_in_its_folder(writer, tmp_path):
    file, output = tmp_path / "mlruns.db", tmp_path / "output"
    store = f"sqlite:///{file}"
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, writer, store, str(output)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "at work\n"
        begin = time.time() * 1000
        WRITERS[writer](store, tmp_path / "elsewhere", lambda engine: None)
        assert statuses(file).count("RUNNING") == 1  # alive, and of another folder
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert statuses(file).count("RUNNING") == 1
    before = statuses(file).count("FINISHED")
    seen = []  # while the next one is at work; an evaluation is written once it has finished
    WRITERS[writer](store, output, lambda engine: seen.append(statuses(file)))
    assert all(now.count("KILLED") == 1 for now in seen)
    assert all(now.count("RUNNING") == (writer != "evaluation") for now in seen)
    assert statuses(file).count("RUNNING") == 0
    assert statuses(file).count("FINISHED") == before + 1
    with sqlite3.connect(file) as connection:
        find = "select start_time, end_time from runs where status = 'KILLED'"
        ((start, end),) = connection.execute(find).fetchall()
    assert start <= end <= begin  # when it was last heard of, not when it was found


@pytest.fixture
def store(tmp_path):
    tracking.make_store(f"sqlite:///{tmp_path / 'mlruns.db'}")
    return tmp_path / "mlruns.db"


@pytest.fixture
def client(store):
    return MlflowClient(f"sqlite:///{store}")


@pytest.mark.parametrize(
    ("experiment", "folder", "status"),
    [("0", "pretrain", "KILLED"), ("0", "pretrain2", "RUNNING"), ("0", ".", "RUNNING"),
     ("0", None, "RUNNING"), ("1", "pretrain", "RUNNING")],
)  # fmt: skip
def test_only_runs_of_this_folder_and_experiment_are_marked(
    experiment, folder, status, client, store
):
    client.create_experiment("another")
    client.create_run("0", tags=folder_tag(store.parent / "pretrain"))
    output = store.parent / folder if folder else None
    assert end_killed_runs(client, experiment, output) == (status == "KILLED")
    assert statuses(store) == [status]


def test_a_folder_is_the_same_by_any_way_to_it(tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    (tmp_path / "link").symlink_to("output")
    monkeypatch.chdir(tmp_path)
    assert folder_tag("output") == folder_tag(tmp_path / "link") == folder_tag("link/../output")
    assert folder_tag("output") != folder_tag("output2")


def test_what_had_ended_keeps_its_status(client, store):
    run = client.create_run("0", tags=folder_tag(store.parent)).info.run_id
    client.set_terminated(run, "FAILED")
    assert end_killed_runs(client, "0", store.parent) == 0
    assert statuses(store) == ["FAILED"]


def test_the_store_names_nobody(store, tmp_path):
    train(f"sqlite:///{store}", tmp_path / "Jane Doe", lambda engine: None)
    with sqlite3.connect(store) as connection:
        tags = dict(connection.execute("select key, value from tags").fetchall())
        text = "\n".join(connection.iterdump()).replace((tmp_path / "mlruns").as_uri(), "")
    assert len(tags["output_folder"]) == 16
    private = ["Jane Doe", str(tmp_path), socket.gethostname()]
    assert not [word for word in private if word in text]
    assert str(Path.home()) not in tags.values() and getpass.getuser() not in tags["output_folder"]


def test_a_run_that_is_gone_on_with_is_running_again(client, store, tmp_path):
    owner = client.create_experiment("discovr")
    client.create_run(owner, run_name="one name", tags=folder_tag(tmp_path))
    seen = []
    train(f"sqlite:///{store}", tmp_path, lambda engine: seen.append(statuses(store)), "one name")
    assert seen == [["RUNNING"]] * 9
    assert statuses(store) == ["FINISHED"]
