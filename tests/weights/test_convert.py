"""Converting: what is read, what becomes of each tensor, what is refused."""

from __future__ import annotations

import argparse
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from discovr_monai.weights.convert import convert
from discovr_monai.weights.files import CheckpointError, read_checkpoint
from discovr_monai.weights.positions import Wanted, interpolate
from tests.parity import released

HEADS = Wanted(num_heads=3, decoder_num_heads=2)
SIZED = Wanted(image_size=32, num_frames=4, num_heads=3)


def save(path, state):
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def vit(**options):
    table = np.random.default_rng(0).normal(0, 0.3, (16, 24))
    return released.encoder(24, 2, (8, 8), "qkv", table, scale=True, **options)


STATES = {
    "discovr": (released.discovr, HEADS),
    "discovr, no biases": (lambda: released.discovr(bias="none"), HEADS),
    "discovr, prefixes": (lambda: released.prefixed("module.backbone.", released.discovr()), HEADS),
    "videomae": (released.videomae, SIZED),
    "videomae, hugging face": (lambda: released.hugging_face(released.videomae()), SIZED),
    "hugging face, bare": (lambda: released.hugging_face(released.videomae(), ""), SIZED),
    "vit": (vit, HEADS),
}


@pytest.mark.parametrize("name", STATES)
def test_every_tensor_is_in_the_account(tmp_path, name):
    make, wanted = STATES[name]
    state = make()
    lines = convert(
        save(tmp_path / "in.safetensors", state), tmp_path / "o.safetensors", wanted=wanted
    )
    counted = [line for line in lines if re.match(r" +\d+  ", line) and "key third" not in line]
    assert sum(int(line.split()[0]) for line in counted) == len(state)
    about = read_checkpoint(tmp_path / "o.safetensors")["about"]
    assert about["source"]["layout"] == name.split(",")[0].replace("hugging face", "videomae")


@pytest.mark.parametrize("name", STATES)
def test_a_key_that_nobody_knows_is_an_error(tmp_path, name):
    make, wanted = STATES[name]
    state = make() | {"surprise.0.weight": torch.zeros(2)}
    source = save(tmp_path / "in.safetensors", state)
    message = r"in.safetensors: 1 tensors have no known place: \['surprise.0.weight'\]"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out.safetensors", wanted=wanted)
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_left_out_is_named_with_its_reason(tmp_path):
    state = vit() | {"head.weight": torch.zeros(5, 24), "mask_token": torch.zeros(1, 1, 8)}
    state |= {
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
    }
    lines = convert(
        save(tmp_path / "i.safetensors", state), tmp_path / "o.safetensors", wanted=HEADS
    )
    text = "\n".join(lines)
    assert re.search(r"2  blocks\.\*\.attn\.qkv\.bias \(its key third\): no effect", text)
    assert "1  head.weight: a classifier or projection head" in text
    assert "1  decoder_blocks.*.norm1.weight: the pretraining's decoder" in text
    assert re.search(
        r"2  blocks\.\*\.ls1\.gamma -> .*video_student\.blocks\.\*\.attn\.proj \(folded", text
    )
    notes = read_checkpoint(tmp_path / "o.safetensors")["about"]["source"]["notes"]
    assert any("key third" in note for note in notes)
    sigma = released.videomae() | {
        "prototypes": torch.zeros(7, 24),
        "head.0.weight": torch.zeros(8, 9),
    }
    lines = convert(
        save(tmp_path / "s.safetensors", sigma), tmp_path / "o.safetensors", wanted=SIZED
    )
    assert "   1  prototypes: SIGMA's targets" in lines
    assert "   1  head.*.weight: SIGMA's targets" in lines


def test_the_key_bias_has_no_effect(tmp_path):
    """Why it may be left out: attention is the same with any."""
    p = {k: v.double().numpy() for k, v in vit().items()}
    x = released.draw(3, 9, 24, std=1).double().numpy()
    with_bias = released.attention(x, p, "blocks.0.attn", 3)
    p["blocks.0.attn.qkv.bias"][24:48] = 0
    np.testing.assert_allclose(released.attention(x, p, "blocks.0.attn", 3), with_bias, atol=1e-12)


# ---- wrappers -------------------------------------------------------------------------------


def wrapped(**extra):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    return {"optimizer": optimizer, "epoch": 799, "scaler": {"scale": 1.0}} | extra


@pytest.mark.parametrize("legacy", [False, True])
def test_a_released_pickle_with_its_args_and_optimizer(tmp_path, legacy):
    """As the authors save it: a Namespace, numpy scalars, an optimizer."""
    args = argparse.Namespace(model="vit", lr=np.float64(0.1), steps=np.int64(3), betas=[0.9, 0.95])
    content = wrapped(model=released.prefixed("module.", released.discovr()), args=args)
    content["max_accuracy"] = np.float64(0.5)
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    lines = convert(tmp_path / "c.pth", tmp_path / "out.safetensors", wanted=HEADS)
    assert "   1  optimizer: 1 tensors, of that training, no weights" in lines
    assert "   1  args: of that training, no weights" in lines
    assert "video_teacher.norm.weight" in read_checkpoint(tmp_path / "out.safetensors")["network"]


def test_dinos_teacher_is_taken(tmp_path):
    teacher = released.prefixed("backbone.", vit()) | {
        "head.last_layer.weight_v": torch.zeros(3, 2)
    }
    student = {k: v + 1 for k, v in released.prefixed("module.backbone.", vit()).items()}
    content = wrapped(student=student, teacher=teacher, dino_loss={"center": torch.zeros(1, 3)})
    torch.save(content, tmp_path / "dino.pth")
    lines = convert(tmp_path / "dino.pth", tmp_path / "o.safetensors", wanted=HEADS)
    assert any("student" in line and "teacher is taken instead" in line for line in lines)
    network = read_checkpoint(tmp_path / "o.safetensors")["network"]
    assert torch.equal(network["image_teacher.cls_token"], vit()["cls_token"])


def test_unknown_tensors_in_a_wrapper_are_an_error(tmp_path):
    torch.save({"model": vit(), "target_network": vit()}, tmp_path / "c.pth")
    with pytest.raises(
        CheckpointError, match="tensors under 'target_network', which convert does not"
    ):
        convert(tmp_path / "c.pth", tmp_path / "o.safetensors")


def test_an_encoder_alone_gives_student_and_teacher(tmp_path):
    own = released.encoder(24, 1, (2, 8, 8), "qv", released.positions_1d(32, 24))
    for state in (released.prefixed("video_teacher.", own), own):  # with its part's name, and bare
        source = save(tmp_path / "in.safetensors", state)
        lines = convert(source, tmp_path / "o.safetensors", wanted=SIZED)
        state = read_checkpoint(tmp_path / "o.safetensors")
        assert any("is a copy of video_" in line for line in lines)
        for part in ("video_student", "video_teacher"):
            assert torch.equal(state["network"][f"{part}.cls_token"], own["cls_token"])
        assert state["about"]["image"] is None
        assert not any(name.startswith(("image", "decoder")) for name in state["network"])


def test_halves_are_widened(tmp_path):
    state = {k: v.half() for k, v in released.discovr().items()}
    wanted = Wanted(num_heads=3, decoder_num_heads=2, image_size=48)
    lines = convert(
        save(tmp_path / "in.safetensors", state), tmp_path / "o.safetensors", wanted=wanted
    )
    network = read_checkpoint(tmp_path / "o.safetensors")["network"]
    assert {v.dtype for v in network.values()} == {torch.float32}
    assert "      float16 tensors are stored as float32" in lines
    table = network["video_teacher.pos_embed"][0, 1:]  # known as sin-cos in half precision too
    np.testing.assert_allclose(table, released.positions_1d(2 * 36, 24), atol=1e-6)


# ---- positions ------------------------------------------------------------------------------


def test_sin_cos_tables_are_recomputed_for_another_size(tmp_path):
    source = save(tmp_path / "in.safetensors", released.discovr())
    wanted = Wanted(image_size=48, num_frames=8, num_heads=3, decoder_num_heads=2)
    lines = convert(source, tmp_path / "o.safetensors", wanted=wanted)
    state = read_checkpoint(tmp_path / "o.safetensors")
    network, about = state["network"], state["about"]
    video, image = network["video_teacher.pos_embed"][0], network["image_student.pos_embed"][0]
    np.testing.assert_allclose(video[1:], released.positions_1d(4 * 36, 24), atol=1e-6)
    np.testing.assert_allclose(image[1:], released.positions_1d(36, 24), atol=1e-6)
    assert not video[0].any()
    assert (about["video"]["num_frames"], about["video"]["image_size"]) == (8, 48)
    assert any("recomputed from (2, 4, 4) to (4, 6, 6) tokens" in line for line in lines)


def test_a_table_that_is_not_the_formulas_is_reported_and_kept(tmp_path):
    state = released.discovr()
    state["encoder.pos_embed"] = state["encoder.pos_embed"] + 0.01
    lines = convert(
        save(tmp_path / "in.safetensors", state), tmp_path / "o.safetensors", wanted=HEADS
    )
    assert any(re.search("encoder.pos_embed: learned .*, kept as it is", line) for line in lines)
    network = read_checkpoint(tmp_path / "o.safetensors")["network"]
    assert torch.equal(network["video_student.pos_embed"], state["encoder.pos_embed"])
    assert torch.equal(network["video_teacher.pos_embed"], state["video_teacher.pos_embed"])


def cubic(length: int, new: int) -> np.ndarray:
    """(new, length) matrix of Keys' cubic convolution, a = -0.75, edges repeated."""
    matrix = np.zeros((new, length))
    for i in range(new):
        at = (i + 0.5) * length / new - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x = abs(at - j)
            weight = (
                1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            )
            matrix[i, min(max(j, 0), length - 1)] += weight
    return matrix


def linear(length: int, new: int) -> np.ndarray:
    at = np.clip((np.arange(new) + 0.5) * length / new - 0.5, 0, length - 1)
    return np.stack([np.interp(at, np.arange(length), row) for row in np.eye(length)], 1)


@given(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 7)] * 3), st.integers(0, 99))
def test_interpolation_restated(own, new, seed):
    rows = released.draw(seed, own[0] * own[1] * own[2], 3, std=1)
    steps = (linear(own[0], new[0]), cubic(own[1], new[1]), cubic(own[2], new[2]))
    expected = np.einsum("ta,hb,wc,abcd->thwd", *steps, rows.view(*own, 3).double().numpy())
    found = interpolate(rows, own, new)
    np.testing.assert_allclose(found, expected.reshape(-1, 3), atol=1e-5)
    if own == new:
        np.testing.assert_allclose(found, rows, atol=1e-6)


def test_learned_tables_are_interpolated_and_keep_their_cls_slot(tmp_path):
    state = vit()
    state["pos_embed"][0, 0] = 5
    source = save(tmp_path / "in.safetensors", state)
    convert(
        source, tmp_path / "o.safetensors", wanted=Wanted(image_size=56, num_heads=3, num_frames=4)
    )
    table = read_checkpoint(tmp_path / "o.safetensors")["network"]["image_student.pos_embed"][0]
    expected = interpolate(state["pos_embed"][0, 1:], (1, 4, 4), (1, 7, 7))
    assert torch.equal(table[1:], expected)
    assert bool((table[0] == 5).all())


def test_equally_many_tokens_on_another_grid_are_another_table(tmp_path):
    """2 x 4 x 4 and 8 x 2 x 2 are both 32."""
    state = released.discovr()
    state["encoder.pos_embed"] = released.draw(5, 1, 33, 24, std=1)
    source = save(tmp_path / "in.safetensors", state)
    wanted = Wanted(image_size=16, num_frames=16, num_heads=3, decoder_num_heads=2)
    convert(source, tmp_path / "o.safetensors", wanted=wanted)
    network = read_checkpoint(tmp_path / "o.safetensors")["network"]
    expected = interpolate(state["encoder.pos_embed"][0, 1:], (2, 4, 4), (8, 2, 2))
    assert torch.equal(network["video_student.pos_embed"][0, 1:], expected)
    assert torch.equal(network["video_teacher.pos_embed"], state["video_teacher.pos_embed"])


def test_tokens_that_do_not_tell_their_grid(tmp_path):
    own = released.encoder(24, 1, (2, 8, 8), "qv", released.positions_1d(32, 24))
    source = save(tmp_path / "in.safetensors", own)
    with pytest.raises(CheckpointError, match="32 tokens, which does not tell .*give --image-size"):
        convert(source, tmp_path / "o.safetensors", wanted=HEADS)
    for told in ({"image_size": 32}, {"num_frames": 4}):
        convert(source, tmp_path / "o.safetensors", wanted=Wanted(num_heads=3, **told))
        video = read_checkpoint(tmp_path / "o.safetensors")["about"]["video"]
        assert (video["image_size"], video["num_frames"]) == (32, 4)
