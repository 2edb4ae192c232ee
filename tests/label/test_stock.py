"""MONAI Label's own bundle app, started by its own launcher, on the folder that we prepare.

By the commands of docs/annotation.md, over one cine and at a free port.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import closing

import nibabel
import numpy as np
import pytest
import torch
import yaml

from discovr_monai.base.notice import NOTICE
from discovr_monai.cli import main
from discovr_monai.data.clips.transforms import LoadCined
from discovr_monai.data.read.cine import read_cine
from discovr_monai.data.write.labels import full_frame_labels
from discovr_monai.inference.findings import Analyst
from discovr_monai.inference.model import load_model
from discovr_monai.inference.reading import CineReader
from discovr_monai.label.archive.studies import presented
from tests.docs.test_docs_commands import commands
from tests.label.conftest import MODEL, ROOT, Running, wait_until


@pytest.fixture(scope="module")
def stock(archive, tmp_path_factory):
    """The server, over one presented cine."""
    pytest.importorskip("monailabel", reason="MONAI Label is not installed (make label)")
    folder = tmp_path_factory.mktemp("stock")
    (folder / "studies").mkdir()
    source = archive.root / archive.avi
    content, _ = presented(read_cine(source), source, "one")
    (folder / "studies" / "one.nii.gz").write_bytes(content)
    page = commands(ROOT / "docs" / "annotation.md")
    (make,) = (words for words in page if words[:2] == ["discovr-monai", "label-bundle"])
    (command,) = (words for words in page if "discovr_monai.label.server.stock" in words)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with (folder / "said").open("w") as said, pytest.MonkeyPatch.context() as printed:
            printed.setattr(sys, "stdout", said)
            assert main(make[1:]) == 0  # with the bundle's own model
    at = command.index("/your/studies-label")
    command[at] = "DIR-label"
    assert shlex.split((folder / "said").read_text()) == command  # it says what the page says
    command[at] = "studies"
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    environment = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command[1:], "--port", str(port)],
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
        cwd=folder,
        env={**os.environ, **environment, "MONAI_LABEL_AUTO_UPDATE_SCORING": "false"},
    )

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        wait_until(ready, 600)
        yield Running(process, f"http://127.0.0.1:{port}", folder)
    finally:
        process.kill()
        process.wait()


def test_it_gives_the_contours_and_numbers_of_an_inference(stock, archive, tmp_path):
    assert stock.ask("GET", "/info/").json["models"]["discovr_segmentation"]["labels"] == {
        "lv_cavity": 1, "myocardium": 2, "left_atrium": 3,
    }  # fmt: skip
    path = "/infer/discovr_segmentation?image=one"
    image = stock.form("POST", f"{path}&output=image", {"params": '{"device": "cpu"}'})
    params = stock.form("POST", f"{path}&output=json", {"params": '{"device": "cpu"}'}).json
    assert image.status == 200, image.body
    (tmp_path / "x.nii.gz").write_bytes(image.body)
    found = nibabel.load(tmp_path / "x.nii.gz")
    model = load_model(MODEL)
    loader = LoadCined(root=archive.root, size=model.clip_shape[2])
    reader = CineReader(loader, model.clip_shape[1], model.about["clip"], 3, 0.5)
    seen = reader({"image": archive.avi, "id": "one", "view": "A4C"})["seen"]
    finding = Analyst(model, torch.device("cpu"))([seen])[0]
    expected = full_frame_labels(finding.labels, seen.window).transpose(2, 1, 0)
    cine = nibabel.load(stock.work / "studies" / "one.nii.gz")
    assert np.array_equal(found.affine, cine.affine)
    assert (np.asarray(found.dataobj) != expected).mean() < 1e-3
    assert params["ef"] == pytest.approx(finding.values["ef"], abs=0.05)
    assert params["contour_ef"] == pytest.approx(finding.values["contour_ef"], abs=0.5)
    assert (params["edv_ml"], params["notice"]) == (None, NOTICE)


def test_the_folder_is_a_bundle(stock):
    bundle = stock.work / "bundle_app" / "model" / "discovr_segmentation"
    config = yaml.safe_load((bundle / "configs" / "inference.yaml").read_text())
    assert {"network_def", "preprocessing", "inferer", "postprocessing"} <= set(config)
    assert NOTICE in json.loads((bundle / "configs" / "metadata.json").read_text())["description"]
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert set(state) == {"model"}


def test_weights_that_do_not_fit_are_refused():
    from discovr_monai.label.server.stock import CineSegmenter

    network = CineSegmenter(load_model(MODEL).about)
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict({"x": torch.zeros(1)}, strict=False)


def test_folders_of_others_are_refused(tmp_path, capsys):
    (tmp_path / "thesis.doc").write_text("x")
    assert main(["label-bundle", str(tmp_path), "--model", str(MODEL)]) == 1
    assert "holds other files" in capsys.readouterr().err
