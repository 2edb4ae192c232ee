"""Checkpoints: bit for bit, atomic, refusing what does not fit."""

from __future__ import annotations

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Events

from discovr_monai.base.files import save_atomic
from discovr_monai.training.checkpoint import Checkpoints, random_states, set_random_states
from discovr_monai.weights.files import CheckpointError, read_checkpoint
from tests.conftest import tiny_network
from tests.training.test_trainer import rows, same_state, trainer

ROOT = Path(__file__).parents[2]


def assert_same(a, b, path=""):
    """Two checkpoints, every tensor and number."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


SCRIPT = """
import sys, time
from discovr_monai.training.checkpoint import Checkpoints
from tests.training.test_trainer import trainer
from ignite.engine import Events
from monai.utils import set_determinism
set_determinism(0)
engine = trainer(epochs=6, batch_size=2)
Checkpoints(sys.argv[1], save_every=1, resume="auto", hint="again").attach(engine)
def slow(engine):
    print(engine.state.iteration, flush=True)
    time.sleep(float(sys.argv[2]))
engine.add_event_handler(Events.ITERATION_COMPLETED, slow)
engine.run()
"""


def start(folder, pause):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(pause)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_killed_at_random_and_resumed_is_bit_for_bit(tmp_path):
    whole = start(tmp_path / "whole", 0)
    assert whole.wait(120) == 0, whole.stdout.read()
    choice = random.Random(time.time())
    for _ in range(2):
        process = start(tmp_path / "killed", 0.02)
        steps = choice.randint(2, 14)
        for _ in range(steps):
            process.stdout.readline()
        time.sleep(choice.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
    final = start(tmp_path / "killed", 0)
    assert final.wait(120) == 0, final.stdout.read()
    left = read_checkpoint(tmp_path / "whole" / "last.pt")
    right = read_checkpoint(tmp_path / "killed" / "last.pt")
    assert left["iteration"] == 36
    assert_same(left, right)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path, 0.05)
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(60) == 130
    assert "Saved at iteration" in rest
    assert "To go on: again" in rest
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] >= 4


def test_random_states_come_back():
    states = random_states()
    expected = (torch.rand(3), np.random.rand(3), [random.random() for _ in range(3)])
    set_random_states(states)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert [random.random() for _ in range(3)] == expected[2]


def test_best_is_the_lowest_and_survives_resuming(tmp_path):
    values = iter([3.0, 1.0, 2.0, 5.0])
    engine = trainer(epochs=3)
    Checkpoints(tmp_path, monitor=lambda e: next(values)).attach(engine)
    engine.run()
    assert read_checkpoint(tmp_path / "best.pt")["iteration"] == 6
    again = trainer(epochs=4)
    checkpoints = Checkpoints(tmp_path, monitor=lambda e: next(values))
    checkpoints.attach(again)
    assert checkpoints.best == 1.0
    again.run()
    assert read_checkpoint(tmp_path / "best.pt")["iteration"] == 6
    assert read_checkpoint(tmp_path / "last.pt")["iteration"] == 12


def test_a_complete_training_is_not_repeated(tmp_path, capsys):
    engine = trainer(epochs=1)
    Checkpoints(tmp_path).attach(engine)
    engine.run()
    again = trainer(epochs=1)
    Checkpoints(tmp_path).attach(again)
    again.run()
    assert "This training is complete (1 epochs)" in capsys.readouterr().out
    assert again.state.iteration == 3


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, caplog):
    engine = trainer(epochs=1)
    Checkpoints(tmp_path).attach(engine)
    engine.run()
    before = (tmp_path / "last.pt").read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    again = trainer(epochs=2)
    Checkpoints(tmp_path).attach(again)
    monkeypatch.setattr(torch, "save", full)
    with caplog.at_level("ERROR"):
        again.run()
    assert (
        "could not save last.pt (No space left on device); the previous one is intact"
        in caplog.text
    )
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.pt"]


def test_a_real_full_disk(tmp_path):
    """/dev/full refuses every byte, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    target = tmp_path / "last.pt"
    target.write_bytes(b"old")

    def write(temporary):
        os.symlink("/dev/full", temporary)
        torch.save({"a": torch.zeros(1000)}, temporary)

    with pytest.raises((OSError, RuntimeError)):
        save_atomic(write, target)
    assert target.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    engine = trainer(epochs=1)
    Checkpoints(tmp_path).attach(engine)
    engine.run()
    other = trainer(epochs=1, network=tiny_network(num_prototypes=12))
    message = r"last.pt does not fit the network: 1 of another shape \(prototypes is \(10, 24\), "
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path).attach(other)


def test_other_data_is_refused(tmp_path):
    engine = trainer(epochs=1)
    Checkpoints(tmp_path).attach(engine)
    engine.run()
    message = "last.pt is of another training: it was trained on 12 clips, these are 9"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path).attach(trainer(epochs=1, data=rows(9)))


def stop_after(engine, iterations):
    """Ends a run as a kill would: at once, without the end of the epoch."""

    def stop(engine):
        if engine.state.iteration == iterations:
            raise KeyboardInterrupt

    engine.add_event_handler(Events.ITERATION_COMPLETED, stop)
    with pytest.raises(KeyboardInterrupt):
        engine.run()


def watch(engine):
    """(epoch, ids, lr) of each iteration that follows."""
    seen = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: seen.append((e.state.epoch, e.state.batch["id"], e.state.output[0]["lr"])),
    )
    return seen


@pytest.mark.parametrize(("sizes", "kept"), [((2, 3, 2), 12), ((2, 6, 1), 8), ((1, 4, 4), 9)])
def test_other_batches_go_on_with_what_the_epoch_has_left(tmp_path, sizes, kept):
    """Batch size stands for ranks: what counts is how many clips a global batch holds."""
    seen = []
    for part, batch_size in enumerate(sizes):
        engine = trainer(epochs=2, batch_size=batch_size)
        Checkpoints(tmp_path, save_every=1).attach(engine)
        seen.append(watch(engine))
        if part < 2:
            left = engine.state.epoch_length - engine.state.iteration
            stop_after(engine, engine.state.iteration + min(1 + part, left))
        else:
            engine.run()
    read = [i for part in seen for epoch, ids, _ in part if epoch == 1 for i in ids]
    assert len(read) == len(set(read)) == kept  # none twice; less than a batch left out
    again = [i for epoch, ids, _ in seen[-1] if epoch == 2 for i in ids]
    assert len(again) == len(set(again)) == 12
    assert engine.state.iteration == 2 * (12 // sizes[-1])


def test_iterations_go_on_at_the_same_part_of_the_schedule(tmp_path):
    engine = trainer(epochs=4, batch_size=2)  # 6 batches an epoch
    Checkpoints(tmp_path, save_every=1).attach(engine)
    stop_after(engine, 6 + 2)
    again = trainer(epochs=4, batch_size=1)  # 12
    Checkpoints(tmp_path).attach(again)
    assert (again.state.iteration, again.state.epoch) == (12 + 4, 1)


def test_accumulation_resumes_at_a_step(tmp_path):
    """A checkpoint that falls due inside a group is written at its end."""
    options = {"epochs": 1, "batch_size": 2, "accumulation_steps": 3}
    whole = trainer(**options)
    whole.run()
    engine = trainer(**options)
    Checkpoints(tmp_path, save_every=2).attach(engine)
    stop_after(engine, 5)
    again = trainer(**options)
    Checkpoints(tmp_path).attach(again)
    assert again.state.iteration == 3
    again.run()
    assert same_state(whole, again) == 0


def test_checkpoints_come_as_often_as_is_said_and_at_the_end(tmp_path):
    for every, wanted in (
        (0, [6, 12, 18]),
        (4, [4, 8, 12, 12, 16, 18]),
        (5, [5, 10, 15, 18]),
        (99, [18]),
    ):
        engine = trainer(epochs=3, batch_size=2)  # 6 batches an epoch
        checkpoints = Checkpoints(tmp_path / str(every), save_every=every, monitor=lambda e: 0.0)
        checkpoints.attach(engine)
        kept, save = [], checkpoints.save

        def told(at, path, kept=kept, save=save):
            save(at, path)
            kept.append((path.name, at.state.iteration))

        checkpoints.save = told
        engine.run()
        assert [at for name, at in kept if name == "last.pt"] == wanted, every
        assert [at for name, at in kept if name == "best.pt"] == [6], every


def test_other_batches_begin_with_a_whole_group(tmp_path):
    engine = trainer(epochs=1, batch_size=2)
    Checkpoints(tmp_path, save_every=1).attach(engine)
    stop_after(engine, 1)  # 10 clips left: 10 batches of one, of which 12 make groups of 4
    again = trainer(epochs=1, batch_size=1, accumulation_steps=4)
    Checkpoints(tmp_path).attach(again)
    assert again.state.iteration == 4
    seen = watch(again)
    again.run()
    assert len(seen) == 8


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_pickled_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"format": 1, "x": Evil()}))
    torch.save({"format": 1, "x": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(
            CheckpointError, match="damaged or holds pickled code, which is never run"
        ):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_a_cut_checkpoint_and_a_missing_one(tmp_path):
    engine = trainer(epochs=1)
    Checkpoints(tmp_path).attach(engine)
    engine.run()
    file = tmp_path / "last.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="checkpoint last.pt is damaged"):
        read_checkpoint(file)
    with pytest.raises(CheckpointError, match="checkpoint none.pt does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    torch.save({"weights": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        read_checkpoint(file)
