"""The whole loop by MONAI Label's own client: list, sample, infer, label, train, infer, score.

Every command of docs/tutorials/annotate.md is typed on the way, with folders of the test's.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pytest

from discovr_monai.base import tracking
from discovr_monai.cli import main
from discovr_monai.data.read.masks import read_masks
from discovr_monai.evaluation.heads.contours import dice
from discovr_monai.phantom.dataset import write_phantom_dataset
from tests.docs.test_docs_commands import ROOT, commands
from tests.label.conftest import launch
from tests.label.models import write_model

CINES = 14
PAGE = ROOT / "docs" / "tutorials" / "annotate.md"
SEGMENT, PROPAGATE = "discovr_segmentation", "discovr_propagation"


def typed(beginning: str, folder: Path) -> list[list[str]]:
    """The page's commands of a kind, with a folder of the test's for /your."""
    found = [w for w in commands(PAGE) if " ".join(w).startswith(beginning)]
    assert found, beginning
    return [[word.replace("/your/", f"{folder}/") for word in words] for words in found]


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A server over phantoms with an untrained model, and MONAI Label's client."""
    client = pytest.importorskip("monailabel.client.client", reason="make label")
    folder = tmp_path_factory.mktemp("loop")
    made = {"size": 64, "workers": 1, "progress": False, "population": "adult"}
    write_phantom_dataset(folder / "studies", num_clips=CINES, num_frames=16, seed=11, **made)
    model = write_model(folder / "model.pt", structures=["lv_cavity", "myocardium", "left_atrium"])
    (command,) = typed("discovr-monai label ", folder)
    salt = {"DISCOVR_MONAI_SALT": "a salt of 32 letters, for this test"}  # deals the patients
    running = launch([*command, "--model", str(model)], folder / "studies-label", **salt)
    try:
        assert running.process.stdout is not None
        assert f"{CINES} cines presented" in running.process.stdout.readline()
        (folder / "client").mkdir()
        yield running, client.MONAILabelClient(running.url, str(folder / "client"))
    finally:
        running.process.kill()
        running.process.wait()


def truth_of(studies: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """(T, H, W) of a phantom, by its file."""
    return read_masks(studies, f"Masks/{Path(name).stem}.npz", shape)


def wait_for(status, seconds: float = 240.0) -> dict:
    """Of the task that was started last."""
    end = time.monotonic() + seconds
    while (found := status())["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < end, found
        time.sleep(0.5)
    return found


def test_the_whole_loop(loop, tmp_path, monkeypatch, capsys):
    server, client = loop
    folder = server.work.parent
    studies, private = folder / "studies", folder / "studies-label-private"
    files = (private / "files.csv").read_text().splitlines()[1:]
    names = dict(line.split(",", 1) for line in files)
    listed = client.datastore()["objects"]
    assert set(listed) == set(names)
    assert client.infer(SEGMENT, sorted(names)[0], {})[1]["version"] == 0
    # draw: each next cine by another strategy; ED and ES by hand, the beat by propagation
    drawn: list[str] = []
    while len(drawn) < CINES - 2:
        strategy = ("coverage", "both", "uncertainty", "first")[len(drawn) % 4]
        sample = client.next_sample(strategy, {})
        identity = sample["id"]
        assert identity not in drawn and identity in names
        image = nibabel.load(server.work / f"{identity}.nii.gz")
        labels = truth_of(studies, names[identity], image.shape[::-1])
        area = (labels == 1).sum((1, 2))
        kept = np.zeros_like(labels)
        for frame in (int(area.argmax()), int(area.argmin())):
            kept[frame] = labels[frame]
        by_hand = tmp_path / f"{identity}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(kept.transpose(2, 1, 0), image.affine), by_hand)
        if len(drawn) % 2:
            client.save_label(identity, str(by_hand))
        else:
            file, params = client.infer(PROPAGATE, identity, {}, label_in=str(by_hand))
            assert params["drawn"] == sorted((int(area.argmax()), int(area.argmin())))
            found = np.asarray(nibabel.load(file).dataobj).T
            assert dice(found == 1, labels == 1) > 0.8
            client.save_label(identity, file)
        drawn.append(identity)
    assert client.info()["datastore"]["completed"] == len(drawn)
    # train
    client.train_start(SEGMENT, {"part": "decoder", "epochs": 40, "lr": 0.01})
    assert client.train_status()["status"] in ("SUBMITTED", "RUNNING")
    ended = wait_for(client.train_status)
    stats = client.info()["train_stats"][SEGMENT]
    assert ended["status"] == "DONE" and stats["training"]["state"] == "done", (ended, stats)
    assert stats["current"] == 1 and stats["training"]["promoted"]
    assert stats["versions"]["1"]["dice_lv_cavity"] > 0.6
    # infer again: by the new version, without a restart
    unseen = next(i for i in sorted(names) if i not in drawn)
    file, params = client.infer(SEGMENT, unseen, {})
    assert params["version"] == 1 and params["contours_withheld"] is None
    found = np.asarray(nibabel.load(file).dataobj).T
    labels = truth_of(studies, names[unseen], found.shape)
    assert dice(found == 1, labels == 1) > 0.4  # of a random encoder
    # score
    begin, look = (words[1:] for words in typed("curl", folder))
    assert begin[:2] == ["-X", "POST"] and look[0].startswith("http://127.0.0.1:8000/"), look
    paths = [urlsplit(words[-1]).path for words in (begin, look)]
    assert server.ask("POST", paths[0]).status == 200
    scored = wait_for(lambda: server.ask("GET", paths[1]).json)
    assert scored["status"] == "DONE" and "between" in json.loads(scored["details"][-1]), scored
    compared = client.info()["train_stats"][SEGMENT]["compared"]
    assert compared["cines"] == len(drawn)
    better, worse = (compared[k].get("lv_cavity", 0) for k in ("version_dice", "other_dice"))
    assert better > worse + 0.2
    # no place on the server is told, and the run is in MLflow
    for answer in (server.ask("GET", "/train/"), server.ask("GET", "/scoring/"),
                   server.ask("GET", "/info/")):  # fmt: skip
        assert str(server.work.parent).encode() not in answer.body, answer.body
    with sqlite3.connect(private / "mlruns.db") as store:
        runs = store.execute("select name, status from runs").fetchall()
    assert [status for _, status in runs] == ["FINISHED"]
    # its pages, and the labels back on their source
    shown: list[list[str]] = []
    monkeypatch.setattr(tracking.os, "execv", lambda _, words: shown.append(words))
    (command,) = typed("discovr-monai mlflow", folder)
    assert main(command[1:]) == 0 and f"sqlite:///{private / 'mlruns.db'}" in shown[0]
    assert "discovr-annotation: http://127.0.0.1:5000/" in capsys.readouterr().out
    (command,) = typed("discovr-monai labels", folder)
    assert main(command[1:]) == 0
    assert f"{len(drawn)} label maps written" in capsys.readouterr().out
    for identity in drawn:
        own = nibabel.load(folder / "labels" / f"{names[identity]}.nii.gz")
        assert own.shape == nibabel.load(server.work / f"{identity}.nii.gz").shape


def test_a_training_without_enough_labels_fails_with_a_sentence(loop):
    server, client = loop
    before = client.info()["train_stats"][SEGMENT]["current"]
    answer = server.post(f"/train/{SEGMENT}", {"epochs": 0})
    assert answer.status == 200
    ended = wait_for(client.train_status)
    assert ended["status"] == "ERROR" and any("out of range" in line for line in ended["details"])
    assert client.info()["train_stats"][SEGMENT]["current"] == before
    assert server.post(f"/train/{SEGMENT}", {"lr": "$__import__('os')"}).status == 400
