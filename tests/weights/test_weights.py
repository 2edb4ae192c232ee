"""Files of ours: converted ones, back to the released layout, and what reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from discovr_monai.cli import main
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.vit import VisionTransformer
from discovr_monai.weights.convert import convert, to_released
from discovr_monai.weights.files import (
    FORMAT,
    CheckpointError,
    describe_encoders,
    load_strict,
    read_checkpoint,
    write_weights,
)
from discovr_monai.weights.positions import Wanted
from tests.conftest import tiny_encoder, tiny_network
from tests.evaluation.conftest import CLIP
from tests.parity import released

HEADS = Wanted(num_heads=3, decoder_num_heads=2)


def write_ours(path, network=None):
    """A training checkpoint whose tensors all differ."""
    torch.manual_seed(0)
    network = network or tiny_network()
    for value in network.state_dict().values():
        if value.shape[1:2] != network.video.student.pos_embed.shape[1:2] and value.dim() != 3:
            torch.nn.init.normal_(value)
    about = describe_encoders(network, CLIP)
    torch.save({"format": FORMAT, "about": about, "network": network.state_dict()}, path)
    return path


def converted(tmp_path, state, name="converted.safetensors", **wanted):
    save_file(state, tmp_path / "in.safetensors")
    (tmp_path / "in.safetensors.licence.txt").write_text("terms of the publisher\n")
    sizes = {"num_heads": 3, "decoder_num_heads": 2} | wanted
    convert(tmp_path / "in.safetensors", tmp_path / name, wanted=Wanted(**sizes))
    return tmp_path / name


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("bias", [True, False])
def test_ours_to_released_and_back_is_exact(tmp_path, suffix, bias):
    image = tiny_encoder(1, 1, qv_bias=False, norm_eps=1e-5)
    network = tiny_network(video=tiny_encoder(qv_bias=bias), image=image)
    write_ours(tmp_path / "last.pt", network)
    lines = to_released(tmp_path / "last.pt", tmp_path / f"released{suffix}")
    convert(tmp_path / f"released{suffix}", tmp_path / "again.safetensors", wanted=HEADS)
    left, right = (
        read_checkpoint(tmp_path / "last.pt"),
        read_checkpoint(tmp_path / "again.safetensors"),
    )
    assert left["network"].keys() == right["network"].keys()
    for name, value in left["network"].items():
        assert torch.equal(value, right["network"][name]), name
    for key in ("video", "image", "decoder_num_heads"):
        assert left["about"][key] == right["about"][key]
    assert "      image: 3 heads, epsilon 1e-05 (released models: 1e-05)" in lines


def test_released_names_and_shapes_are_the_public_ones(tmp_path):
    """The names of a released state, and nothing else."""
    expected = released.discovr(decoder=12, patch=4)
    write_ours(tmp_path / "last.pt")
    to_released(tmp_path / "last.pt", tmp_path / "released.safetensors")
    found = load_file(tmp_path / "released.safetensors")
    assert found.keys() == expected.keys()
    assert found["encoder.patch_embed.proj.weight"].shape == (24, 3, 2, 4, 4)
    assert found["image_teacher.patch_embed.proj.weight"].shape == (24, 3, 1, 4, 4)


def test_parts_without_a_released_name_are_reported(tmp_path):
    write_ours(tmp_path / "last.pt", tiny_network(reconstruct=True))
    lines = to_released(tmp_path / "last.pt", tmp_path / "released.npz")
    assert "   1  pixel_head.weight: the released layout has no such part" in lines
    with np.load(tmp_path / "released.npz", allow_pickle=False) as file:
        assert not any("pixel" in name for name in file.files)


def test_a_converted_file_says_all_that_evaluation_needs(tmp_path):
    file = converted(tmp_path, released.discovr(), num_frames=8)
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["discovr_monai"])
    assert header["format"] == FORMAT
    assert set(header["about"]) == {"video", "image", "decoder_num_heads", "clip", "source"}
    assert set(header["about"]["source"]) == {"layout", "sha256", "licence", "notes"}
    assert header["about"]["clip"] == CLIP
    assert header["about"]["source"]["licence"] == "terms of the publisher"
    encoder = EvaluatedEncoder(file)
    assert (encoder.image_size, encoder.num_frames) == (32, 8)
    clip = torch.randint(0, 256, (2, 1, 8, 32, 32), dtype=torch.uint8)
    found = encoder.module.embed(encoder.prepare({"image": clip}))
    assert found["cls"].shape == (2, 24)
    by_hand = VisionTransformer(**header["about"]["video"])
    state = read_checkpoint(file)["network"]
    load_strict(by_hand, {k[14:]: v for k, v in state.items() if k.startswith("video_teacher.")})
    assert torch.equal(by_hand(encoder.prepare({"image": clip}))[:, 0], found["cls"])


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"embed_dim": 768}, "was trained with embed_dim 24, the config expects 768"),
        ({"depth": 12}, "was trained with depth 2, the config expects 12"),
        ({"patch_size": 16}, "was trained with patch_size 8, the config expects 16"),
    ],
)
def test_a_config_that_expects_another_encoder(tmp_path, expect, message):
    file = converted(tmp_path, released.discovr())
    with pytest.raises(CheckpointError, match=message):
        EvaluatedEncoder(file, expect=expect)


def test_equal_input_gives_equal_bytes(tmp_path):
    state = released.discovr()
    first = converted(tmp_path, state, "a.safetensors").read_bytes()
    assert converted(tmp_path, state, "b.safetensors").read_bytes() == first


def test_the_teachers_of_a_converted_file_make_a_model(tmp_path):
    file = converted(tmp_path, released.discovr())
    assert main(["model", str(file), str(tmp_path / "model.pt")]) == 0
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {key.split(".")[0] for key in found} == {"description", "video_teacher"}
    teacher = released.discovr()["video_teacher.norm.weight"]
    assert torch.equal(found["video_teacher.norm.weight"], teacher)


def test_writing_is_atomic(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").write_bytes(b"old")

    def full(tensors, path, header):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("discovr_monai.weights.files.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_weights(tmp_path / "w.safetensors", {"a": torch.zeros(2)}, {})
    assert [f.name for f in tmp_path.iterdir()] == ["w.safetensors"]
    assert (tmp_path / "w.safetensors").read_bytes() == b"old"


def test_shared_and_strided_tensors_are_written_as_they_are(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    network = {"a": base, "b": base, "c": base.T, "d": base[1:], "e": base.expand(2, 3, 4)}
    write_weights(tmp_path / "w.safetensors", network, {"x": 1})
    state = read_checkpoint(tmp_path / "w.safetensors")
    assert state["about"] == {"x": 1}
    assert all(torch.equal(state["network"][k], v) for k, v in network.items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.write_bytes(b""), "checkpoint w.safetensors is empty"),
        (
            lambda f: f.write_bytes(f.read_bytes()[:-10]),
            r"w.safetensors is damaged \(cut short\?\)",
        ),
        (lambda f: f.write_bytes(b"hello, world"), "w.safetensors is damaged"),
        (
            lambda f: save_file({"a": torch.zeros(1)}, f),
            "not a training checkpoint .* nor converted",
        ),
        (lambda f: save_file({"a": torch.zeros(1)}, f, {"discovr_monai": "{"}), "not a training"),
        (
            lambda f: save_file({"a": torch.zeros(1)}, f, {"discovr_monai": '{"format": 99}'}),
            "not a training",
        ),
    ],
)
def test_files_that_are_not_ours(tmp_path, spoil, message):
    file = tmp_path / "w.safetensors"
    write_weights(file, {"a": torch.zeros(2)}, {})
    spoil(file)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(file)


# ---- encoders without a CLS token -----------------------------------------------------------


def test_without_a_cls_token_the_first_row_is_the_mean(clip):
    torch.manual_seed(0)
    vit = tiny_encoder(cls_token=False)
    assert not any("cls" in name for name in vit.state_dict())
    assert vit.pos_embed.shape == (1, 32, 24)
    out = vit(clip)
    assert out.shape == (3, 33, 24)
    torch.testing.assert_close(out[:, 0], out[:, 1:].mean(1))
    x = vit.patch_embed(vit.patchify(clip)) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(out[:, 1:], vit.norm(x), rtol=0, atol=1e-6)


def test_a_network_without_a_cls_token_trains(clip):
    from discovr_monai.networks.masking import TubeMasking
    from tests.conftest import tiny_objective

    torch.manual_seed(0)
    network = tiny_network(video=tiny_encoder(cls_token=False))
    masks = TubeMasking(2, 0.7, seed=1)(0, range(3), video_grid=(2, 4, 4),
                                        image_grid=(1, 4, 4), frames=4, device="cpu")  # fmt: skip
    before = network.video.teacher.norm.bias.clone()
    tiny_objective()(network(clip, *masks), 0)["loss"].backward()
    grads = [p.grad for p in network.video.student.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)
    with torch.no_grad():
        network.video.student.norm.bias += 1
    network.update_teachers(0.5)
    torch.testing.assert_close(network.video.teacher.norm.bias, before + 0.5)


def test_settings_from_before_the_setting_build_the_same_encoder():
    settings = dict(tiny_encoder().settings)
    assert settings.pop("cls_token") is True
    assert VisionTransformer(**settings).state_dict().keys() == tiny_encoder().state_dict().keys()


def test_an_encoder_without_a_cls_token_is_evaluated(tmp_path):
    file = converted(tmp_path, released.videomae(), image_size=32, num_frames=4)
    encoder = EvaluatedEncoder(file)
    clip = encoder.prepare({"image": torch.randint(0, 256, (2, 1, 4, 32, 32), dtype=torch.uint8)})
    found = encoder.module.embed(clip)
    torch.testing.assert_close(found["cls"], found["mean"])
    assert encoder.module.tokens(clip).shape == (2, 2, 4, 4, 24)
    with pytest.raises(CheckpointError, match="was trained without an image branch"):
        EvaluatedEncoder(file, "image_teacher")


# ---- the commands ---------------------------------------------------------------------------


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(released.videomae(), "videomae.safetensors")
    words = ["convert", "videomae.safetensors", "out.safetensors", "--image-size", "32",
             "--num-frames", "4", "--num-heads", "3", "--stride", "2", "--mean", ".5", ".5", ".5",
             "--std", ".25", ".25", ".25", "--licence", "CC-BY-NC-4.0", "--layout", "videomae"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "licence: CC-BY-NC-4.0" in out
    assert "clips: 4 frames of stride 2, 32 x 32 pixels, mean [0.5, 0.5, 0.5]" in out
    about = read_checkpoint("out.safetensors")["about"]
    assert about["clip"] == CLIP | {"stride": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
    assert about["source"]["licence"] == "CC-BY-NC-4.0"
    assert main(["convert", "out.safetensors", "back.npz", "--to-released"]) == 0
    assert "video_student.blocks.*" in capsys.readouterr().out
    for words, message in (
        (["out.safetensors", "x.safetensors"], "out.safetensors is converted already"),
        (["videomae.safetensors", "x.pth"], "x.pth must end in .safetensors"),
        (
            ["videomae.safetensors", "x.safetensors", "--layout", "resnet"],
            "layout 'resnet' must be",
        ),
        (["out.safetensors", "x.pth", "--to-released"], "x.pth must end in .npz or .safetensors"),
        (
            ["videomae.safetensors", "x.npz", "--to-released"],
            "not a training checkpoint of discovr",
        ),
    ):
        assert main(["convert", *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert message in error
        assert error.count("\n") == 1


def test_reconstruction_baselines_keep_their_parts(tmp_path):
    """A checkpoint without clustering or image branch is read back as it is."""
    network = Discovr(video=tiny_encoder())
    write_ours(tmp_path / "last.pt", network)
    to_released(tmp_path / "last.pt", tmp_path / "r.npz")
    convert(tmp_path / "r.npz", tmp_path / "o.safetensors",
            wanted=Wanted(num_heads=3, image_size=16))  # fmt: skip
    right = read_checkpoint(tmp_path / "o.safetensors")["network"]
    assert all(torch.equal(v, right[k]) for k, v in network.state_dict().items())
