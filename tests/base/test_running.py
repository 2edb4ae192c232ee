"""A run whose process is gone is not RUNNING for ever, and one that may be alive is left alone."""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ignite.engine import Engine
from mlflow.tracking import MlflowClient

from discovr_monai.base import running, tracking
from discovr_monai.base.running import end_dead_runs, hold, kind_of_disk, release
from discovr_monai.training.handlers import Tracking

ROOT = Path(__file__).parents[2]
WRITERS = {
    "training": """
from ignite.engine import Engine
from discovr_monai.training.handlers import Tracking
def step(engine, _):
    if engine.state.iteration == 3:
        wait()
    return [{"loss": 1.0, "clips": 2.0}]
engine = Engine(step)
Tracking(store, "run", pause=0.0, output_dir=sys.argv[1]).attach(engine)
engine.run([None] * 9, max_epochs=1)
""",
    "labels": """
from discovr_monai.label.learn.runs import tracked_training
with tracked_training(store, {}) as log:
    log({"loss": 1.0}, 1)
    wait()
""",
    "evaluation": """
from mlflow.tracking import MlflowClient
from discovr_monai.base.tracking import log_evaluation
MlflowClient.log_artifact = lambda *_: wait()
log_evaluation(store, experiment="e", task="knn", settings={}, metrics={}, headlines={},
               artifacts=["report.html"])
""",
}
BEGIN = """
import sys, time
store = f"sqlite:///{sys.argv[1]}/mlruns.db"
def wait():
    print("at work", flush=True)
    time.sleep(600)
"""


def statuses(file: Path) -> list[str]:
    with sqlite3.connect(file) as store:
        return [s for (s,) in store.execute("select status from runs order by start_time")]


@pytest.mark.parametrize("writer", WRITERS)
def test_killed_runs_say_so_and_live_ones_go_on(writer, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + WRITERS[writer], str(tmp_path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "at work\n"
        file = tmp_path / "mlruns.db"
        client = MlflowClient(f"sqlite:///{file}")
        assert end_dead_runs(client, file, tmp_path) == 0
        assert statuses(file)[-1] == "RUNNING"
        alive = time.time() * 1000
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert end_dead_runs(client, file) == 1
    assert statuses(file)[-1] == "KILLED"
    with sqlite3.connect(file) as store:
        find = "select start_time, end_time from runs where status = 'KILLED'"
        ((start, end),) = store.execute(find).fetchall()
    assert start <= end <= alive  # it ended when it was last heard of
    assert not list(running._folder(file).iterdir())


@pytest.fixture
def store(tmp_path):
    tracking.make_store(f"sqlite:///{tmp_path / 'mlruns.db'}")
    return tmp_path / "mlruns.db"


@pytest.fixture
def client(store):
    return MlflowClient(f"sqlite:///{store}")


def begin(client, store, output=None) -> Path:
    """A run that this process holds; its lock."""
    run = client.create_run("0").info.run_id
    hold(store, run, output)
    return running._folder(store) / run


def die(lock: Path, **said) -> None:
    """As the kernel does with a killed process's lock; it said this instead."""
    running._held.pop(lock).close()
    lock.write_text(json.dumps(json.loads(lock.read_text()) | said))


ELSEWHERE = {"boot": "another machine's, or another boot"}


@pytest.mark.parametrize(
    ("said", "local", "output", "status"),
    [
        (ELSEWHERE, False, None, "RUNNING"),  # a shared disk that may not pass locks on
        (ELSEWHERE, True, None, "KILLED"),  # the power was cut
        (ELSEWHERE | {"machine": "b"}, True, None, "RUNNING"),  # our disk, seen from another
        (ELSEWHERE | {"machine": ""}, True, None, "RUNNING"),
        ({}, False, None, "KILLED"),  # a shared disk, but this machine
        (ELSEWHERE, False, "pretrain", "KILLED"),  # a cluster starts it again on another node
        (ELSEWHERE, False, "paper", "RUNNING"),
        (ELSEWHERE, False, "../elsewhere", "RUNNING"),
        (ELSEWHERE | {"inode": -1}, True, "pretrain", "RUNNING"),  # a copy of a live store
    ],
)
def test_only_what_is_certainly_dead_is_marked(
    said, local, output, status, client, store, monkeypatch
):
    monkeypatch.setattr(running, "_is_local", lambda folder: local)
    monkeypatch.setattr(running, "_machine", lambda: "a")
    lock = begin(client, store, store.parent / "pretrain")
    die(lock, **said)
    folder = store.parent / output if output else None
    assert end_dead_runs(client, store, folder) == (status == "KILLED")
    assert statuses(store) == [status]
    assert lock.exists() == (status == "RUNNING")


def test_where_the_system_names_no_boot_it_makes_nothing_certain(client, store, monkeypatch):
    monkeypatch.setattr(running, "_is_local", lambda folder: False)
    monkeypatch.setattr(running, "_boot", lambda: "")
    die(begin(client, store))
    assert end_dead_runs(client, store) == 0
    assert statuses(store) == ["RUNNING"]


def test_a_store_that_was_copied_while_it_was_written_stays(client, store, tmp_path):
    begin(client, store)
    shutil.copytree(tmp_path, tmp_path / "copy")
    copy = tmp_path / "copy" / "mlruns.db"
    assert end_dead_runs(MlflowClient(f"sqlite:///{copy}"), copy) == 0
    assert statuses(copy) == ["RUNNING"]


def test_ones_own_runs_are_alive_until_they_are_released(client, store):
    lock = begin(client, store)
    assert end_dead_runs(client, store) == 0
    client.set_terminated(lock.name)
    release(store, lock.name)
    assert not lock.exists() and statuses(store) == ["FINISHED"]


def test_another_thread_cannot_take_a_lock_that_is_being_made(client, store, monkeypatch):
    other = threading.Thread(target=end_dead_runs, args=(client, store))
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (other.start(), other.join(0.3), flush(number)))
    begin(client, store)
    other.join()
    assert statuses(store) == ["RUNNING"]


def test_two_processes_may_find_the_same_run_dead(client, store, monkeypatch):
    lock = begin(client, store)
    die(lock)
    get = client.get_run
    monkeypatch.setattr(client, "get_run", lambda run: (lock.unlink(), get(run))[1])
    assert end_dead_runs(client, store) == 1
    assert statuses(store) == ["KILLED"]


def test_what_had_ended_keeps_its_status(client, store):
    lock = begin(client, store)
    client.set_terminated(lock.name, "FAILED")
    die(lock)  # between the two
    assert end_dead_runs(client, store) == 0
    assert statuses(store) == ["FAILED"] and not lock.exists()


def test_without_locks_nothing_is_known(client, store, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", none)
        lock = begin(client, store)
    assert end_dead_runs(client, store) == 0
    assert statuses(store) == ["RUNNING"] and lock not in running._held
    hold(None, "of a server")
    assert end_dead_runs(client, None) == 0


def test_neither_locks_nor_the_store_name_anybody(client, store):
    told = begin(client, store, store.parent / "pretrain").read_text()
    assert set(json.loads(told)) == {"boot", "machine", "inode", "output"}
    assert json.loads(told)["output"] == "pretrain"
    private = [str(store.parent), str(Path.home()), socket.gethostname(), getpass.getuser()]
    assert not [word for word in private if word in told]
    with sqlite3.connect(store) as connection:
        text = "\n".join(connection.iterdump())
    assert not [word for word in (running._boot(), socket.gethostname()) if word in text]


def training(store: Path, name: str) -> list[str]:
    """A training of one step in the folder "pretrain", during which the runs had these statuses."""
    seen = []

    def step(engine, _):
        seen.extend(statuses(store))
        return [{"loss": 1.0, "clips": 2.0}]

    engine = Engine(step)
    Tracking(f"sqlite:///{store}", name, output_dir=store.parent / "pretrain").attach(engine)
    engine.run([None], max_epochs=1)
    return seen


def test_a_training_that_starts_again_ends_the_one_before(client, store, monkeypatch):
    monkeypatch.setattr(running, "_is_local", lambda folder: False)
    die(begin(client, store, store.parent / "pretrain"), **ELSEWHERE)
    assert training(store, "again") == ["KILLED", "RUNNING"]
    assert statuses(store) == ["KILLED", "FINISHED"]


def test_a_run_that_is_gone_on_with_is_running_again(client, store):
    owner = client.create_experiment("discovr")
    run = client.create_run(owner, run_name="one name").info.run_id
    hold(store, run, store.parent / "pretrain")
    die(running._folder(store) / run)
    assert training(store, "one name") == ["RUNNING"]
    assert statuses(store) == ["FINISHED"]


def test_opening_the_pages_marks_what_was_killed(client, store, monkeypatch):
    die(begin(client, store))
    begin(client, store)
    served = []
    monkeypatch.setattr(os, "execv", lambda *command: served.append(command))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    tracking.serve(store)
    assert len(served) == 1
    assert statuses(store) == ["KILLED", "RUNNING"]


MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /shared rw - nfs4 server:/export rw,local_lock=none
31 30 0:41 / /shared/own\040disk rw - xfs /dev/vdb rw
32 22 0:42 / /home rw - autofs systemd-1 rw
33 32 0:43 / /home rw - cifs //server/home rw
""".strip()


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/tmp/output", "ext4"),
        ("/shared/pretrain", "nfs4"),
        ("/shared2/pretrain", "ext4"),
        ("/shared/own disk/pretrain", "xfs"),
        ("/home/somebody", "cifs"),  # what was mounted last lies on top
    ],
)
def test_the_disk_of_a_folder(folder, kind):
    assert kind_of_disk(Path(folder), MOUNTS) == kind


def test_this_machines_disks_are_told():
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        pytest.skip("Linux only")
    assert kind_of_disk(Path("/proc"), mounts.read_text()) == "proc"
    assert not running._is_local(Path("/proc"))
