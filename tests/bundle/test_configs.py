"""What the configs promise, without running them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow

from discovr_monai.configuration import (
    GONE,
    MOVED,
    check_command_line,
    parameters,
    resolve_precision,
)
from discovr_monai.weights.files import describe_encoders
from tests.bundle.conftest import BUNDLE, run
from tests.bundle.resolved import SNAPSHOT

CONFIGS = BUNDLE / "configs"


def parse(*names: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in names])
    parser["bundle_root"] = str(BUNDLE)
    return parser


def test_paper_is_the_paper_to_the_letter():
    parser = parse("train.yaml", "paper.yaml")
    expected = {
        "image_size": 112, "num_frames": 64, "stride": 3, "patch_size": 16, "tubelet_size": 2,
        "embed_dim": 768, "depth": 12, "num_heads": 12, "decoder_dim": 384, "decoder_depth": 4,
        "decoder_heads": 6, "head_outputs": 16384, "head_hidden": 2048, "head_bottleneck": 256,
        "head_norm": "none", "num_prototypes": 3000, "image_frame_step": 1, "teacher_keep": 1.0,
        "activation_checkpointing": False, "compile": False, "num_views": 4,
        "mask_ratio": 0.9, "centring": "centre", "student_temperature": 0.1,
        "teacher_temperature": [0.04, 0.07], "teacher_temperature_epochs": 30,
        "teacher_momentum": [0.996, 1.0], "centre_momentum": 0.9, "cluster_temperature": 0.1,
        "sinkhorn_eps": 0.05, "sinkhorn_iterations": 10, "assignments": "soft", "epochs": 400,
        "lr": 1.5e-4, "lr_batch": 256, "warmup_epochs": 40, "weight_decay": 0.05,
        "betas": "$(0.9, 0.95)", "crop_scales": [1, 0.875, 0.75, 0.66], "normal_only": True,
        "weights": {"video": 1.0, "image": 1.0, "cluster": 1.0}, "gradient_clip": None,
    }  # fmt: skip
    schedules = {
        "teacher_temperature": "teacher_temperature_schedule",
        "teacher_momentum": "train#trainer#teacher_momentum",
    }
    found = {}
    for key in expected:
        if key in schedules:
            found[key] = [parser[f"{schedules[key]}#{end}"] for end in ("start", "end")]
        else:
            found[key] = parser[MOVED.get(key, key)]
    assert found == expected
    assert 16 <= parser["batch_size"] <= 48


@pytest.mark.parametrize(("overlay", "millions"), [("small.yaml", 22), ("paper.yaml", 86)])
def test_encoders_have_the_size_of_their_name(overlay, millions):
    video = parse("train.yaml", overlay).get_parsed_content("video_def")
    count = sum(p.numel() for p in video.parameters()) / 1e6
    assert millions * 0.97 < count < millions * 1.03
    assert video.num_tokens == 1568


def test_overlays_change_known_keys_only():
    base = set(yaml.safe_load((CONFIGS / "train.yaml").read_text()))
    for file in [*CONFIGS.glob("baselines/*.yaml"), *(CONFIGS / f"{n}.yaml" for n in
                 ("small", "paper", "multi_gpu_train"))]:  # fmt: skip
        keys = {key.split("#")[0] for key in yaml.safe_load(file.read_text())}
        assert keys <= base, file.name


@pytest.mark.parametrize(("kind", "config"), [("train", "train.yaml"), ("infer", "inference.yaml")])
def test_the_ids_that_monai_requires(kind, config, phantom, tmp_path, monkeypatch):
    monkeypatch.chdir(BUNDLE)
    workflow = ConfigWorkflow(
        config_file=str(CONFIGS / config), meta_file=str(CONFIGS / "metadata.json"),
        workflow_type=kind, bundle_root=str(BUNDLE), dataset_dir=str(phantom),
        output_dir=str(tmp_path), section="test", batch_size=2,
    )  # fmt: skip
    workflow.initialize()
    missing = workflow.check_properties() or []
    assert not missing


def test_network_and_metadata_agree(bundle):
    done = run(
        bundle, "verify_net_in_out", "--net_id", "network_def", "--meta_file",
        "configs/metadata.json", "--config_file", "configs/inference.yaml",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "verified with no error" in done.stdout + done.stderr


def test_metadata_has_what_the_model_zoo_asks():
    meta = json.loads((CONFIGS / "metadata.json").read_text())
    assert meta["version"] in meta["changelog"]
    for key in ("schema", "monai_version", "pytorch_version", "numpy_version", "task", "name",
                "required_packages_version", "authors", "copyright", "network_data_format",
                "intended_use", "data_source"):  # fmt: skip
        assert meta[key]
    for file in ("LICENSE", "docs/README.md", "docs/data_license.txt", "configs/inference.yaml"):
        assert (BUNDLE / file).is_file()


def test_what_saves_work_reaches_its_part_and_no_checkpoint():
    parser, plain = parse("train.yaml"), parse("train.yaml")
    parser["masking#teacher_keep"], parser["accelerated#activation_checkpointing"] = 0.5, True
    assert parser.get_parsed_content("masking").teacher_keep == 0.5
    network, without = (p.get_parsed_content("network") for p in (parser, plain))
    blocks = [
        *network.video.student.blocks,
        *network.image.student.blocks,
        *network.video.decoder.blocks,
    ]
    assert all(block.recompute for block in blocks)
    assert not any(block.recompute for block in network.video.teacher.blocks)
    assert describe_encoders(network, {}) == describe_encoders(without, {})
    assert list(network.state_dict()) == list(without.state_dict())
    parser["accelerated#compile"] = True
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        parser["device"] = torch.device("cpu")
        with pytest.raises(RuntimeError) as caught:
            parser.get_parsed_content("network", lazy=False)
    assert "compile: true needs a C++ compiler" in str(caught.value.__cause__)
    assert "@accelerated" in str(parse("train.yaml", "multi_gpu_train.yaml")["network"])


def test_every_user_key_is_documented():
    text = (CONFIGS / "train.yaml").read_text()
    keys = [k for k in yaml.safe_load(text.split("# ====")[0]) if k != "imports"]
    page = (Path(BUNDLE).parents[1] / "docs" / "configs.md").read_text()
    places = [place for moved in MOVED.values() for place in moved.split(", ")]
    assert not [key for key in [*keys, *places] if f"`{key}`" not in page]
    assert len(keys) < 32 and len(text.splitlines()) < 250


def test_precision_words():
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cpu")) in ("bf16", "fp32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "1"], "no config knows this key"),
        (["--mlflow", "false"], "--mlflow false: write True or False"),
        (["--num_frame", "1"], "Did you mean 'num_frames'"),
        (["--train#dataset#seed", "1"], None),
        (["--loss#terms#cluster#eps", "0.1"], None),
        (["--train#handlers#2#_disabled_", "True"], None),
        (["--loss#terms#cluster#epz", "0.1"], "Did you mean 'loss#terms#cluster#eps'"),
        (["--train#handlers#1#intervall", "1"], "Did you mean 'train#handlers#1#interval'"),
        (["--validate#dataloader#drop_lats", "1"], "Did you mean 'validate#dataloader#drop_last'"),
        (["--network_def#video#depth", "1"], "network_def#video#depth is now video_def#depth"),
        (["--validate#dataloader#drop_last", "True"], None),
        (["--tracking", "mlflow"], None),
    ],
)
def test_keys_are_checked(words, message, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the check replaces
    words = ["run", "training", "--config_file", str(CONFIGS / "train.yaml"), *words]
    if message is None:
        check_command_line(words)
    else:
        with pytest.raises(ValueError, match=message):
            check_command_line(words)


@pytest.mark.parametrize("key", [*MOVED, *GONE])
def test_a_key_of_before_is_refused_with_its_place(key, tmp_path, monkeypatch):
    """On the command line and in an overlay; the place itself is there."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the check replaces
    train = str(CONFIGS / "train.yaml")
    place = MOVED.get(key, "").replace(", ", " and ")
    sentence = f"{key} is now {place}" if place else f"{key} is gone. {GONE[key]}"
    with pytest.raises(ValueError, match=re.escape(f"--{sentence}")):
        check_command_line(["run", "training", "--config_file", train, f"--{key}", "1"])
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(f"{key}: 1\n")
    files = f"['{train}','{overlay}']"
    with pytest.raises(ValueError, match=re.escape(f"mine.yaml: {sentence}")):
        check_command_line(["run", "training", "--config_file", files])
    for moved in MOVED.get(key, "").split(", ") if place else []:
        assert moved in parse("train.yaml")


def test_an_overlay_may_add_a_term_but_no_misspelt_key(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    overlay = tmp_path / "mine.yaml"
    words = ["run", "--config_file", f"['{CONFIGS / 'train.yaml'}','{overlay}']"]
    overlay.write_text("loss#terms#mine: {_target_: my.Term}\nloss#terms#cluster#eps: 0.1\n")
    check_command_line(words)
    overlay.write_text("loss#terms#cluster#epz: 0.1\n")
    with pytest.raises(ValueError, match="mine.yaml: loss#terms#cluster#epz: no config knows"):
        check_command_line(words)


def test_mlflow_gets_all_settings_and_no_path():
    """Those of before by the same names and values; what could be a path or a name, never."""
    parser = parse("train.yaml")
    before = json.loads(SNAPSHOT.read_text())["train"]
    start = "train#trainer.train_handlers.3.parameters."
    listed = {w.removeprefix(start): v for w, v in before.items() if w.startswith(start)}
    parser["record"], parser["total_steps"] = {"cines": 3, "global_batch": 16}, 7
    parser["train#dataset#data#section"] = parser["experiment_name"] = "planted"
    for key in (
        "dataset_dir",
        "datalist",
        "output_dir",
        "init",
        "resume",
        "loader#store#directory",
    ):
        parser[key] = "planted"
    parser["bundle_root"] = parser["dataset_dir"] = 19501224  # a folder's name may be a number
    recorded = parser.get_parsed_content("parameters")
    assert {way.split(".")[0] for way in listed} <= recorded.keys()
    for name, value in recorded.items():
        if name in listed and name not in ("cines", "global_batch", "total_steps", "precision"):
            assert value == listed[name], name
    assert recorded["betas"] == [0.9, 0.95] and recorded["teacher_temperature"] == [0.03, 0.03]
    assert recorded["sinkhorn_eps"] == 0.05 and recorded["precision"] in ("bf16", "fp32")
    assert "planted" not in str(recorded) and "19501224" not in str(recorded)
    assert parameters({"a": 1}, b=2) == {"a": 1, "b": 2}  # called by no config
