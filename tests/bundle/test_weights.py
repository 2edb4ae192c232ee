"""docs/weights.md: from a released file to embeddings and to a pretraining, by its commands."""

from __future__ import annotations

import argparse
import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from discovr_monai.cli import main
from discovr_monai.weights.files import read_checkpoint
from tests.bundle.conftest import run, train
from tests.parity import released

PAGE = Path(__file__).parents[2] / "docs" / "weights.md"
RUN = "python -m monai.bundle run"
# command of the page -> the test that runs it, or a shortened form of it
RUN_BY = {
    "discovr-monai download discovr-800 --to weights --accept-unverified": "weights",
    "discovr-monai convert weights/checkpoint-799.pth weights/discovr.safetensors": "weights",
    "cd bundles/discovr": "all",
    f"{RUN} evaluating --config_file configs/features.yaml --ckpt "
    "../../weights/discovr.safetensors --dataset_dir /your/cines": "test_embeddings",
    f"{RUN} training --config_file \"['configs/train.yaml','configs/paper.yaml']\" "
    "--init ../../weights/discovr.safetensors": "test_pretraining_begins_with_the_file",
    "discovr-monai convert videomae.safetensors video.safetensors --image-size 112 --num-frames 32 "
    '--stride 2 --licence "CC-BY-NC-4.0"': "test_other_layouts",
    "discovr-monai convert dino.pth image.safetensors --image-size 112 --num-frames 32": "test_other_layouts",
    "discovr-monai convert output/pretrain/last.pt discovr_released.npz --to-released": "test_back",
    "discovr-monai download list": "tests/weights/test_download.py: test_the_command",
}


def test_every_command_of_the_page_is_run_by_a_test():
    text = PAGE.read_text()
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()
    ]
    inline = re.findall(r"`(discovr-monai [^`]+)`", text.replace("\n", " "))
    assert {*lines, *inline} - {"discovr-monai export"} == set(RUN_BY)


def publish(folder: Path) -> None:
    """A released checkpoint as its authors save it, of the size of the tests' network."""
    state = released.prefixed("module.", released.discovr(24, 1, (2, 4, 4), 8))
    content = {"model": state, "epoch": 799, "args": argparse.Namespace(lr=np.float64(1e-4)),
               "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}  # fmt: skip
    place = folder / "Div97" / "DISCOVR_ADULT_PEDIATRIC_MODEL" / "resolve" / "main"
    place.mkdir(parents=True)
    torch.save(content, place / "checkpoint-799.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Downloaded and converted by the page's commands."""
    root = tmp_path_factory.mktemp("released")
    publish(root / "site")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(root / "site"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISCOVR_MONAI_HUB", f"http://127.0.0.1:{server.server_port}")
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.chdir(root)
        assert main(["download", "discovr-800", "--to", "weights", "--accept-unverified"]) == 0
        words = ["convert", "weights/checkpoint-799.pth", "weights/discovr.safetensors"]
        assert main([*words, "--num-heads", "3", "--decoder-num-heads", "3"]) == 0
    server.shutdown()
    server.server_close()
    return root / "weights" / "discovr.safetensors"


def test_embeddings(bundle, phantom, weights, tmp_path):
    done = run(
        bundle, "run", "evaluating", "--config_file", "configs/features.yaml", "--ckpt",
        str(weights), "--dataset_dir", str(phantom), "--features_file", str(tmp_path / "f.npz"),
        "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache"),
        "--clips_per_cine", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(tmp_path / "f.npz", allow_pickle=False) as found:
        sizes = {name: found[name].shape for name in found.files}
    assert any(shape[-1:] == (24,) for shape in sizes.values()), sizes


def test_pretraining_begins_with_the_file(bundle, phantom, weights, tmp_path):
    """With a learning rate of 0 and a momentum of 1 nothing but the centres may move."""
    done = train(
        bundle, "--dataset_dir", str(phantom), "--output_dir", str(tmp_path), "--lr", "0.0",
        "--epochs", "1", "--warmup_epochs", "0", "--init", str(weights), "--mlflow", "False",
        "--train#trainer#teacher_momentum#start", "1.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Beginning from discovr.safetensors: video_student, video_teacher, image_" in done.stdout
    assert "Licence of these weights: MIT, says the README" in done.stdout
    given, last = read_checkpoint(weights), read_checkpoint(tmp_path / "last.pt")
    for name, value in given["network"].items():
        if "centre" not in name:
            assert torch.equal(last["network"][name], value), name
    assert last["about"]["source"] == given["about"]["source"]


def test_a_config_of_another_size_stops_in_a_sentence(bundle, phantom, weights, tmp_path):
    done = train(
        bundle, "--dataset_dir", str(phantom), "--output_dir", str(tmp_path), "--init",
        str(weights), "--depth", "2", "--mlflow", "False",
    )  # fmt: skip
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: init discovr.safetensors: video_student is built otherwise: ")
    assert last.endswith("Set depth 1 (now 2)")


def test_back(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(weights), "discovr_released.npz", "--to-released"]) == 0
    expected = released.discovr(24, 1, (2, 4, 4), 8)
    with np.load("discovr_released.npz", allow_pickle=False) as found:
        assert set(found.files) == set(expected)
        assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_other_layouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(released.videomae(384, 1, 16), "videomae.safetensors")
    words = ["convert", "videomae.safetensors", "video.safetensors", "--image-size", "112"]
    words += ["--num-frames", "32", "--stride", "2", "--licence", "CC-BY-NC-4.0"]
    assert main(words) == 0
    table = np.zeros((196, 384))
    torch.save(released.encoder(384, 1, (16, 16), "qkv", table), "dino.pth")
    words = [
        "convert",
        "dino.pth",
        "image.safetensors",
        "--image-size",
        "112",
        "--num-frames",
        "32",
    ]
    assert main(words) == 0
    for name, cls in (("video", False), ("image", True)):
        video = read_checkpoint(f"{name}.safetensors")["about"]["video"]
        assert (video["image_size"], video["num_frames"], video["num_heads"]) == (112, 32, 6)
        assert video["cls_token"] is cls
