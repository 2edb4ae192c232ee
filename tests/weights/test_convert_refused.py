"""What convert refuses: files that cannot be read, tensors and sizes that do not fit."""

from __future__ import annotations

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discovr_monai.weights.convert import convert, read_foreign
from discovr_monai.weights.files import CheckpointError, read_checkpoint
from discovr_monai.weights.positions import Wanted
from tests.parity import released
from tests.weights.test_convert import HEADS, save, vit
from tests.weights.test_weights import write_ours


def changed(**tensors):
    def make():
        state = released.discovr() | tensors
        return {k: v for k, v in state.items() if v is not None}

    return make


BLOCK = "encoder.blocks.1.attn"
REFUSED = {
    "image kernel in the video branch": (
        changed(**{"encoder.patch_embed.proj.weight": torch.zeros(24, 3, 1, 8, 8)}),
        r"encoder.patch_embed.proj.weight covers 1 frame\(s\), but a video branch's two: are the branches mixed up",
    ),
    "video kernel in the image branch": (
        changed(**{"image_teacher.patch_embed.proj.weight": torch.zeros(24, 3, 2, 8, 8)}),
        r"image_teacher.patch_embed.proj.weight covers 2 frame\(s\), but an image branch's covers one",
    ),
    "video tokens of another frame size": (
        changed(**{"encoder.pos_embed": torch.zeros(1, 34, 24)}),
        "33 video tokens are no multiple of the image branch's 4 x 4",
    ),
    "no video encoder": (
        lambda: {k: v for k, v in released.discovr().items() if k.startswith("image_")},
        "the file holds no video encoder",
    ),
    "grey input": (
        changed(**{"encoder.patch_embed.proj.weight": torch.zeros(24, 1, 2, 8, 8)}),
        r"is \(24, 1, 2, 8, 8\): only 3 channels and square patches fit",
    ),
    "a missing tensor": (
        changed(**{f"{BLOCK}.proj.bias": None}),
        r"our video_student is built otherwise: 1 missing \(blocks.1.attn.proj.bias\)",
    ),
    "a missing head layer": (
        changed(**{"video_dino_head.last_layer.weight_v": None}),
        "video_head.last_layer.weight_v .* is missing",
    ),
    "a misshapen tensor": (
        changed(**{"video_teacher.norm.weight": torch.zeros(3)}),
        r"our video_teacher is built otherwise: 1 of another shape \(norm.weight is \(3,\)",
    ),
    "biases in one block only": (
        changed(**{f"{BLOCK}.q_bias": None, f"{BLOCK}.v_bias": None}),
        r"our video_student is built otherwise: 2 missing \(blocks.1.attn.q_bias\)",
    ),
    "prototypes of another width": (
        changed(prototypes=torch.zeros(16, 7)),
        r"our prototypes is \(16, 7\) where decoder.head.weight has 24 rows",
    ),
    "not finite": (
        changed(**{"encoder.norm.weight": torch.full((24,), float("nan"))}),
        "encoder.norm.weight holds values that are not finite",
    ),
    "registers": (lambda: vit() | {"reg_token": torch.zeros(1, 4, 24)}, "reg_token: register tokens"),
    "normed queries": (
        lambda: vit() | {"blocks.0.attn.q_norm.weight": torch.zeros(8)},
        "blocks.0.attn.q_norm.weight: norms inside attention, which our encoders have not",
    ),
    "SwiGLU": (
        lambda: vit() | {"blocks.0.mlp.w12.weight": torch.zeros(8, 24)},
        r"blocks.0.mlp.w12.weight: a gated MLP \(SwiGLU\)",
    ),
    "relative positions": (
        lambda: vit() | {"blocks.0.attn.relative_position_bias_table": torch.zeros(9, 3)},
        "rotary or relative positions",
    ),
    "no positions": (
        lambda: {k: v for k, v in vit().items() if k != "pos_embed"},
        r"pos_embed \(1, tokens, width\) is missing",
    ),
    "not square": (lambda: vit() | {"pos_embed": torch.zeros(1, 13, 24)}, "13 positions: no square"),
    "no transformer": (lambda: {"conv1.weight": torch.zeros(3, 3)}, "no vision transformer of a known"),
    "a name that plays with the terminal": (
        lambda: vit() | {"head.\x1b[2J": torch.zeros(1)},
        r"'head.\\x1b\[2J' is no name of a tensor: the file is damaged",
    ),
    "two names for one": (
        lambda: vit() | {"module.cls_token": torch.zeros(1, 1, 24)},
        "module.cls_token and cls_token name the same tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, name):
    make, message = REFUSED[name]
    source = save(tmp_path / "in.safetensors", make())
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, tmp_path / "out.safetensors", wanted=HEADS)
    assert str(caught.value).startswith("in.safetensors: ")
    assert str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_heads_are_not_guessed_at_an_unusual_width(tmp_path):
    source = save(tmp_path / "in.safetensors", vit())
    with pytest.raises(
        CheckpointError, match="width 24 does not tell the number of heads: give --num-heads"
    ):
        convert(source, tmp_path / "o.safetensors")
    with pytest.raises(CheckpointError, match="width 24 is not divisible by the number of heads 5"):
        convert(source, tmp_path / "o.safetensors", wanted=Wanted(num_heads=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride 0 must be at least 1"),
        ({"std": [0.1, 0.1, 0]}, "std above 0"),
        ({"mean": [0.1]}, "mean and std need three values each"),
    ],
)
def test_impossible_clips_are_refused(tmp_path, options, message):
    source = save(tmp_path / "in.safetensors", vit())
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "o.safetensors", wanted=HEADS, **options)
    with pytest.raises(ValueError, match="--num-frames 0 must be at least 1"):
        Wanted(num_frames=0)
    with pytest.raises(CheckpointError, match="num_frames 15 is not divisible by tubelet_size 2"):
        convert(source, tmp_path / "o.safetensors", wanted=Wanted(num_heads=3, num_frames=15))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def damaged(tmp_path, kind):
    path = tmp_path / "in.pth"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404: not found</html>")
    elif kind == "cut zip":
        torch.save(vit(), path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "cut safetensors":
        save(path, vit())
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "code":
        torch.save({"model": vit(), "x": Evil()}, path)
    elif kind == "old code":
        torch.save({"model": vit(), "x": Evil()}, path, _use_new_zipfile_serialization=False)
    elif kind == "bare code":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    elif kind == "numbers":
        torch.save({"epoch": 3}, path)
    elif kind == "objects":
        np.savez(path.with_suffix(".npz"), a=np.array([Evil()], dtype=object))
        path.with_suffix(".npz").rename(path)
    elif kind == "ours":
        write_ours(path)
    return path


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The same weights in each kind of file."""
    folder = tmp_path_factory.mktemp("intact")
    state = released.encoder(24, 1, (8, 8), "qkv", released.positions_2d(4, 24))
    torch.save({"model": state, "args": argparse.Namespace(a=1)}, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save(folder / "s.safetensors", state)
    np.savez(folder / "n.npz", **{k: v.numpy() for k, v in state.items()})
    return [file.read_bytes() for file in sorted(folder.iterdir())]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.floats(0, 1), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_ends_in_one_sentence(intact, tmp_path_factory, which, end, changes):
    """Cut anywhere, bytes changed in the first part (where the structure is) or anywhere."""
    data = bytearray(intact[which])
    for place, value in changes:
        data[int(place * min(len(data) - 1, 4000))] = value
    data = data[: max(1, int(end * len(data)))]
    file = tmp_path_factory.mktemp("damaged") / "in.pth"
    file.write_bytes(bytes(data))
    for read in (read_foreign, read_checkpoint):
        try:
            read(file)
        except CheckpointError as error:
            assert "\n" not in str(error)
            assert "in.pth" in str(error)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "in.pth does not exist"),
        ("empty", "in.pth is empty"),
        ("text", "in.pth is no checkpoint, or a damaged one"),
        ("cut zip", "in.pth is no checkpoint, or a damaged one"),
        ("cut safetensors", r"in.pth is damaged \(cut short\?\)"),
        ("code", "in.pth wants posix.system, which is code: .* nothing in it is executed"),
        ("old code", "in.pth wants posix.system, which is code"),
        ("bare code", "in.pth"),
        ("list", "in.pth holds a list, no named tensors"),
        ("numbers", "in.pth holds no named tensors: it is no checkpoint"),
        ("objects", "in.pth is damaged or holds pickled objects"),
        ("ours", "in.pth is a training checkpoint of discovr-monai already"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    source = damaged(tmp_path, kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_foreign(source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
