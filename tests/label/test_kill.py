"""Nothing that was uploaded is lost when the server is killed in the middle of a request."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.label.conftest import multipart, wait_until

KILLS = 20
SHAPE = (96, 96, 24)  # (X, Y, T)


def nifti(seed: int, top: int) -> bytes:
    """A volume of noise, which no compression makes small."""
    values = np.random.default_rng(seed).integers(0, top, SHAPE, dtype=np.uint8)
    return nibabel.Nifti1Image(values, np.diag([-1.0, -1.0, 0.02, 1.0])).to_bytes()


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    """(folder, a function that starts a server: pid and port)."""
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")
    folder = tmp_path_factory.mktemp("kill")
    (folder / "studies").mkdir()
    paths = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("storing.py")), str(folder / "work")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )

    def start() -> tuple[int, int]:
        process.stdin.write("go\n")
        process.stdin.flush()
        pid = port = 0
        while not (pid and port):
            line = process.stdout.readline()
            assert line, "the server did not start"
            if found := re.match(r"pid (\d+)", line):
                pid = int(found[1])
            elif found := re.search(r"http://127.0.0.1:(\d+)", line):
                port = int(found[1])
        return pid, port

    yield folder, start
    process.kill()
    process.wait()


@dataclass
class Uploader:
    """Sends one label after the other until the server is gone."""

    port: int
    first: int
    sent: dict[str, set[int]] = field(default_factory=dict)  # image -> seeds of its labels
    kept: dict[str, int] = field(default_factory=dict)  # image -> the last one acknowledged
    images: list[str] = field(default_factory=list)
    done: int = 0  # requests that were answered
    took: float = 0.0  # seconds, the last of them

    def __call__(self) -> None:
        for number in range(self.first, self.first + 1000):  # images and labels in turn
            try:
                if number % 3 == 0:
                    name = f"image{number}"
                    self._put(f"/datastore/image?image={name}", "file", nifti(number, 200))
                    self.images.append(name)
                name = f"base{number % 2}"
                self.sent.setdefault(name, set()).add(number)
                self._put(f"/datastore/label?image={name}&tag=final", "label", nifti(number, 4))
                self.kept[name] = number
            except (OSError, http.client.HTTPException):
                return  # the server is gone

    def _put(self, path: str, name: str, content: bytes) -> None:
        body, kind = multipart({"params": "{}"}, {name: ("x.nii", content)})
        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("PUT", path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise AssertionError(said)
        self.took = time.monotonic() - begun
        self.done += 1


def label(work: Path, name: str) -> np.ndarray:
    return np.asarray(nibabel.load(work / "labels" / "final" / f"{name}.nii.gz").dataobj)


def expected(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, SHAPE, dtype=np.uint8)


def test_twenty_kills_lose_nothing_that_was_acknowledged(forge):
    folder, start = forge
    work, rng = folder / "work", random.Random(0)
    kept: dict[str, int] = {}  # image -> the last label that was acknowledged, or is there
    sent: dict[str, set[int]] = {}
    images: list[str] = []
    interrupted = 0
    for kill in range(KILLS):
        pid, port = start()
        uploader = Uploader(port, 1000 * kill)
        if not kill:
            for name in ("base0", "base1"):
                uploader._put(f"/datastore/image?image={name}", "file", nifti(7, 200))
        thread = threading.Thread(target=uploader)
        thread.start()
        least = uploader.done + rng.randint(1, 3)
        wait_until(lambda least=least, it=uploader: it.done >= least)
        time.sleep(rng.uniform(0, uploader.took))  # anywhere in the request that follows
        answered = uploader.done
        os.kill(pid, signal.SIGKILL)
        thread.join()
        interrupted += uploader.done == answered
        kept |= uploader.kept
        images += uploader.images
        for name, numbers in uploader.sent.items():
            sent.setdefault(name, set()).update(numbers)
        index = json.loads((work / "datastore_v2.json").read_text())["objects"]
        assert set(images) <= set(index)
        for name, number in kept.items():  # or one after it, whose answer was cut off
            assert "final" in index[name]["labels"]
            found = label(work, name)
            which = [n for n in sent[name] if n >= number and np.array_equal(found, expected(n))]
            assert len(which) == 1, f"the label of {name} is none that was sent"
            kept[name] = which[0]
    assert interrupted >= KILLS // 2 and len(images) >= 5  # else this tests nothing
    pid, port = start()  # and the next server shows them all
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/datastore/?output=all")
    objects = json.loads(connection.getresponse().read())["objects"]
    os.kill(pid, signal.SIGKILL)
    assert set(images) <= set(objects) and len(kept) == 2
    assert all("final" in objects[name]["labels"] for name in kept)
    assert not list(work.rglob("*.tmp"))
    for name in objects:
        assert nibabel.load(work / f"{name}.nii.gz").shape == SHAPE
