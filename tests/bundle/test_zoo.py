"""MONAI's own commands on the bundle, as docs/export.md gives them, with an untrained model."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ckpt_export, verify_metadata
from monai.data import load_net_with_metadata

from discovr_monai.inference.formats import open_exported
from discovr_monai.inference.model import EchoModel, load_model
from discovr_monai.networks.vit import VisionTransformer
from tests.bundle.conftest import BUNDLE, run
from tests.evaluation.conftest import CLIP

PAGE = BUNDLE.parents[1] / "docs" / "export.md"
SHAPE = (3, 8, 64, 64)
WIDTH = 128  # of metadata.json
EXPORT = "discovr-monai export models/model.pt exported"
RUN_BY = {  # command of the page -> the test that runs it
    "pip install 'discovr-monai[export]'": "tests/docs/test_readme.py: test_a_plain_install_builds",
    EXPORT: "tests/inference/test_export.py: folder",
    f"{EXPORT} --format onnx int8 torchscript --part embedding --branch image_teacher "
    "--pooling both": "tests/inference/test_export.py: test_the_second_command_of_the_page",
    "verify_net_in_out": "test_network_and_metadata_agree",
    "verify_metadata": "test_the_metadata_is_a_bundles",
    "ckpt_export": "test_torchscript",
    "onnx_export": "test_onnx",
}
# What MONAI's bundle specification asks of metadata.json; its schema itself is behind the network.
TEXT, FORMAT = {"type": "string"}, {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "format": {"type": "string"},
            "num_channels": {"type": "integer"},
            "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
            "dtype": {"enum": ["float32", "int32", "uint8"]},
            "value_range": {"type": "array", "items": {"type": "number"}},
            "is_patch_data": {"type": "boolean"},
            "channel_def": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range",
                     "is_patch_data", "channel_def"],
    },
}  # fmt: skip
REQUIRED = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task",
            "description", "authors", "copyright")  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        **dict.fromkeys(REQUIRED, TEXT),
        "changelog": {"type": "object", "additionalProperties": TEXT},
        "required_packages_version": {"type": "object", "additionalProperties": TEXT},
        "references": {"type": "array", "items": TEXT},
        "network_data_format": {
            "type": "object",
            "properties": {"inputs": FORMAT, "outputs": FORMAT},
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*REQUIRED, "changelog", "required_packages_version", "network_data_format"],
}


def commands() -> dict[str, list[str]]:
    """Command of MONAI -> its arguments on the page."""
    lines = re.findall(r"^python -m monai.bundle (.*)$", PAGE.read_text(), re.M)
    return {words[0]: words[1:] for words in map(shlex.split, lines)}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """The bundle with an untrained model of metadata.json's shape and with both heads."""
    folder = tmp_path_factory.mktemp("zoo") / "discovr"
    shutil.copytree(BUNDLE, folder, ignore=shutil.ignore_patterns("data", "output", "*.pt"))
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16, "embed_dim": WIDTH, "depth": 1, "num_heads": 2}
    heads = {
        "ef": {"branch": "video_teacher", "pooling": "cls", "width": WIDTH},
        "segmentation": {"branch": "image_teacher", "head": "linear", "structures": ["lv_cavity"]},
    }
    about = {
        "video": VisionTransformer(num_frames=8, tubelet_size=2, **sizes).settings,
        "image": VisionTransformer(num_frames=1, tubelet_size=1, **sizes).settings,
        "clip": CLIP,
        "heads": heads,
    }
    (folder / "models").mkdir(exist_ok=True)
    torch.save(EchoModel(about).state_dict(), folder / "models" / "model.pt")
    return folder


def test_every_command_of_the_page_is_run_by_a_test():
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    found = {re.sub(r"^python -m monai.bundle (\w+) .*", r"\1", line) for line in lines}
    assert found == set(RUN_BY)


def test_network_and_metadata_agree(zoo):
    done = run(zoo, "verify_net_in_out", *commands()["verify_net_in_out"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verified with no error" in done.stdout + done.stderr


def test_the_metadata_is_a_bundles(zoo, tmp_path):
    (zoo / "output").mkdir(exist_ok=True)
    (zoo / "output" / "schema.json").write_text(json.dumps(SCHEMA))
    done = run(zoo, "verify_metadata", *commands()["verify_metadata"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "metadata is verified with no error" in done.stdout + done.stderr
    meta = json.loads((zoo / "configs" / "metadata.json").read_text())
    meta["network_data_format"]["outputs"]["pred"]["num_channels"] = "128"
    (tmp_path / "metadata.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="'128' is not of type 'integer'"):
        verify_metadata(
            str(tmp_path / "metadata.json"), filepath=str(zoo / "output" / "schema.json")
        )


def clips(batch: int) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))


def test_torchscript(zoo):
    done = run(zoo, "ckpt_export", *commands()["ckpt_export"])
    assert done.returncode == 0, done.stderr[-2000:]
    found, meta, extra = load_net_with_metadata(
        zoo / "models" / "model.ts", more_extra_files=["inference.json"]
    )
    assert meta["name"] == "DISCOVR"
    assert "network_def" in json.loads(extra["inference.json"])
    network = load_model(zoo / "models" / "model.pt")
    for batch in (1, 3):
        torch.testing.assert_close(found(clips(batch)), network(clips(batch)))


def test_another_file_is_named_twice(zoo, tmp_path):
    """By ckpt, which builds the network, and by ckpt_file."""
    other = tmp_path / "other.pt"
    state = torch.load(zoo / "models" / "model.pt", weights_only=True)
    state["video_teacher.norm.weight"] += 1
    torch.save(state, other)
    ckpt_export(
        net_id="network_def", ckpt_file=str(other), ckpt=str(other), use_trace=True,
        filepath=str(tmp_path / "model.ts"), meta_file=str(zoo / "configs" / "metadata.json"),
        config_file=str(zoo / "configs" / "inference.yaml"),
    )  # fmt: skip
    found, *_ = load_net_with_metadata(tmp_path / "model.ts")
    torch.testing.assert_close(found(clips(2)), load_model(other)(clips(2)))


def test_onnx(zoo, tmp_path):
    done = run(
        zoo, "onnx_export", *commands()["onnx_export"], env={**os.environ, "TMPDIR": str(tmp_path)}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.glob("*.data"))  # MONAI leaves the weights there otherwise
    found = open_exported(zoo / "models" / "model.onnx", "onnx")
    network = load_model(zoo / "models" / "model.pt")
    for batch in (1, 3):
        (embedding,) = found(clips(batch))
        torch.testing.assert_close(embedding, network(clips(batch)), rtol=1e-4, atol=1e-5)
