"""A few phantom cines in sub-folders, and one running server over them."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import nibabel
import numpy as np
import pytest

from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.write.dicom import write_dicom
from discovr_monai.phantom.dataset import write_phantom_dataset
from discovr_monai.phantom.screen import PhantomScreen, simulate_screen

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "bundles" / "discovr" / "models" / "model.pt"
NAME = "Smith^Mary"


@dataclass
class Archive:
    """Where the files are, and what is in the DICOM one."""

    root: Path
    screen: PhantomScreen

    avi, dicom, nifti = "a/first visit/one.avi", "b/screen", "b/deep/three.nii.gz"


@pytest.fixture(scope="session")
def archive(tmp_path_factory) -> Archive:
    """An AVI, a DICOM of a whole screen, a NIfTI in milliseconds, a text; all in sub-folders."""
    root = tmp_path_factory.mktemp("archive") / "studies"
    made = tmp_path_factory.mktemp("phantom") / "phantom"
    options = {"size": 112, "workers": 1, "progress": False, "population": "adult"}
    write_phantom_dataset(made, num_clips=2, num_frames=24, seed=3, **options)
    first, second = sorted(made.glob("Videos/*.avi"))
    for name in (Archive.avi, Archive.dicom, Archive.nifti):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / Archive.avi).write_bytes(first.read_bytes())
    screen = simulate_screen(1, num_frames=16, dark=False)
    write_dicom(
        root / Archive.dicom,
        screen.frames,
        fps=screen.fps,
        spacing=(screen.spacing, screen.spacing),
        tags={"PatientName": NAME, "PatientID": "MRN-777", "StudyDate": "20200102"},
    )
    frames = read_cine(second).frames
    affine = np.diag([0.5, 0.25, 20.0, 1.0])  # columns, rows, milliseconds
    image = nibabel.Nifti1Image(np.ascontiguousarray(frames.transpose(2, 1, 0)), affine)
    image.header.set_xyzt_units("mm", "msec")
    image.header["descrip"] = NAME.encode()
    nibabel.save(image, root / Archive.nifti)
    (root / "b" / "notes.txt").write_text("no cine")
    (root / "b" / "broken.avi").write_bytes(b"RIFF" + bytes(200))
    return Archive(root, screen)


@dataclass
class Answer:
    """Of a request, whatever its status."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen
    url: str
    work: Path
    token: str = ""
    trusted: ssl.SSLContext | None = None

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """One request, with the token if there is one."""
        fields = {k.replace("_", "-"): v for k, v in headers.items()}
        if self.token:
            fields.setdefault("Authorization", f"Bearer {self.token}")
        request = Request(self.url + path, body, fields, method=method)
        try:
            with urlopen(request, timeout=300, context=self.trusted) as answer:
                return Answer(answer.status, answer.read(), dict(answer.headers))
        except HTTPError as error:
            return Answer(error.code, error.read(), dict(error.headers))

    def post(self, path: str, content: Any) -> Answer:
        """JSON."""
        body = json.dumps(content).encode()
        return self.ask("POST", path, body, Content_Type="application/json")

    def form(self, method: str, path: str, fields: dict, files: dict | None = None) -> Answer:
        """A multipart form; files are name -> (file name, bytes)."""
        body, kind = multipart(fields, files or {})
        return self.ask(method, path, body, Content_Type=kind)


def multipart(fields: dict[str, str], files: dict[str, tuple[str, bytes]]) -> tuple[bytes, str]:
    """Body and content type of a form."""
    parts = []
    for name, value in fields.items():
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    for name, (file, content) in files.items():
        head = f'Content-Disposition: form-data; name="{name}"; filename="{file}"\r\n\r\n'
        parts.append(head.encode() + content)
    body = b"".join(b"--edge\r\n" + part + b"\r\n" for part in parts) + b"--edge--\r\n"
    return body, "multipart/form-data; boundary=edge"


def start(studies: Path, work: Path, *options: str, **environment: str) -> Running:
    """A server that says it is ready."""
    typed = ["discovr-monai", "label", "--studies", str(studies), "--work", str(work)]
    return launch([*typed, "--model", str(MODEL), *options], work, **environment)


def launch(typed: list[str], work: Path, **environment: str) -> Running:
    """The server of a command as it is typed, at a free port, when it says it is ready."""
    assert typed[:2] == ["discovr-monai", "label"], typed
    command = [sys.executable, "-m", "discovr_monai.cli", *typed[1:], "--port", "0"]
    paths = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=(work.parent / "errors.txt").open("w"),
        text=True,
        cwd=work.parent,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )
    token = url = ""
    assert process.stdout is not None
    for line in process.stdout:
        token = found[1] if (found := re.match(r"Token: (\S+)", line)) else token
        if found := re.search(r"Ready\. .*(https?://\S+)", line):
            url = found[1]
            break
    assert url, (work.parent / "errors.txt").read_text()
    return Running(process, url, work, token)


@pytest.fixture(scope="package")
def server(archive, tmp_path_factory):
    """A server over the archive, all of whose cines are presented."""
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")
    folder = tmp_path_factory.mktemp("server")
    running = start(archive.root, folder / "work", "--view", "A4C")
    try:
        assert running.process.stdout is not None
        said = running.process.stdout.readline()
        assert "3 cines presented, 1 files set aside" in said
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="package")
def ids(server) -> dict[str, str]:
    """Relative name -> id, from the private map."""
    lines = (server.work.parent / "work-private" / "files.csv").read_text().splitlines()[1:]
    return {line.partition(",")[2]: line.partition(",")[0] for line in lines}


def wait_until(condition, seconds: float = 120.0) -> None:
    """Raises if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
