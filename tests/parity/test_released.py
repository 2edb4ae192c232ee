"""Converted files against the layouts' meaning restated in float64, at the published sizes."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from discovr_monai.evaluation.features.encoders import EvaluatedEncoder
from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.heads import Decoder, ProjectionHead
from discovr_monai.networks.vit import VisionTransformer
from discovr_monai.training.initial import start_from
from discovr_monai.weights.convert import convert
from discovr_monai.weights.files import read_checkpoint
from discovr_monai.weights.positions import Wanted
from tests.parity import released
from tests.parity.test_parity import FILE, ROOT, present

LIMIT = 1e-5
SMALL, BASE = (384, 6), (768, 12)


@pytest.fixture
def convert_to_file(tmp_path):
    """Through files and back; big ones do not stay on the disk."""
    made = []

    def run(state, **options):
        source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, source)
        made.extend((source, output))
        convert(source, output, **options)
        return output

    yield run
    for file in made:
        file.unlink(missing_ok=True)


def clip_of(frames: int, size: int = 112) -> torch.Tensor:
    return released.draw(7, 3, frames, size, size, std=1)


def close(ours: torch.Tensor, expected: np.ndarray) -> None:
    assert ours.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    assert float(np.abs(ours.double().numpy() - expected).max()) / scale < LIMIT


def encoded(file, branch: str, clip: torch.Tensor) -> torch.Tensor:
    encoder = EvaluatedEncoder(file, branch).module.encoder
    with torch.no_grad():
        return encoder(clip[None])[0]


@pytest.mark.parametrize("bias", ["qv", "none"])
@pytest.mark.parametrize(("dim", "heads"), [SMALL, BASE])
def test_discovr(convert_to_file, dim, heads, bias):
    """Video and image branch, students and teachers, with and without q/v biases."""
    state = released.discovr(dim, 2, (2, 7, 7), 16, bias, decoder=dim // 2)
    file = convert_to_file(state)
    parts = {"video_student": "encoder", "video_teacher": "video_teacher",
             "image_student": "image_student", "image_teacher": "image_teacher"}  # fmt: skip
    for branch, part in parts.items():
        video = branch.startswith("video")
        clip = clip_of(4 if video else 1)
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
        table = released.positions_1d(98 if video else 49, dim)
        close(
            encoded(file, branch, clip),
            released.tokens(own, clip, heads, 1e-6 if video else 1e-5, table),
        )


def test_discovr_at_the_full_depth_of_vit_s(convert_to_file):
    dim, heads = SMALL
    own = released.encoder(dim, 12, (2, 16, 16), "qv", released.positions_1d(4 * 49, dim))
    file = convert_to_file(
        released.prefixed("module.video_teacher.", own), wanted=Wanted(image_size=112)
    )
    clip = clip_of(8)
    expected = released.tokens(own, clip, heads, 1e-6, released.positions_1d(4 * 49, dim))
    close(encoded(file, "video_teacher", clip), expected)
    close(encoded(file, "video_student", clip), expected)


@pytest.mark.parametrize("naming", ["own", "hugging face", "fine-tuned"])
@pytest.mark.parametrize(("dim", "heads"), [SMALL, BASE])
def test_videomae(convert_to_file, dim, heads, naming):
    """No CLS token: the first row is the mean of the final tokens."""
    state = released.videomae(dim, 2, 16)
    own = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    if naming == "hugging face":
        state = released.hugging_face(state)
    elif naming == "fine-tuned":
        state = {("fc_" if k.startswith("norm.") else "") + k: v for k, v in own.items()}
        state |= {"head.weight": torch.zeros(5, dim), "head.bias": torch.zeros(5)}
    file = convert_to_file(state, wanted=Wanted(image_size=112, num_frames=4))
    clip = clip_of(4)
    expected = released.tokens(own, clip, heads, 1e-6, released.positions_1d(98, dim))
    found = encoded(file, "video_teacher", clip)
    close(found, np.concatenate((expected.mean(0, keepdims=True), expected)))


@pytest.mark.parametrize(("dim", "heads"), [SMALL, BASE])
def test_dino_with_key_bias_and_layer_scale(convert_to_file, dim, heads):
    table = np.random.default_rng(0).normal(0, 0.3, (49, dim))
    state = released.encoder(dim, 2, (16, 16), "qkv", table, scale=True)
    state["pos_embed"][:, :1] += 0.4  # a learned table has a CLS slot
    file = convert_to_file(state, wanted=Wanted(num_frames=4))
    frame = clip_of(1)
    expected = released.tokens(state, frame, heads, 1e-6, state["pos_embed"][0].double().numpy())
    close(encoded(file, "image_teacher", frame), expected)
    # the video branch, inflated: the mean of a tubelet's frames in place of the frame
    clip = clip_of(4)
    pairs = clip.unflatten(1, (2, 2)).mean(2)  # (3, 2, H, W)
    slot, rows = state["pos_embed"][0].double().numpy()[:1], np.tile(table, (2, 1))
    expected = released.tokens(state, pairs, heads, 1e-6, np.concatenate((slot, rows)))
    close(encoded(file, "video_teacher", clip), expected)


def test_mae_positions(convert_to_file):
    """MAE's own 2-D table is verified and kept; at another size it is recomputed."""
    state = released.encoder(24, 1, (8, 8), "qkv", released.positions_2d(4, 24))
    network = read_checkpoint(
        convert_to_file(state, wanted=Wanted(num_heads=3, num_frames=4, image_size=48))
    )["network"]
    table = network["image_student.pos_embed"][0]
    np.testing.assert_allclose(table[1:], released.positions_2d(6, 24), atol=1e-6)
    np.testing.assert_array_equal(network["video_student.pos_embed"][0, 1:37], table[1:])
    np.testing.assert_array_equal(network["video_student.pos_embed"][0, 37:], table[1:])


@present
def test_the_released_instance_through_a_converted_file(tmp_path):
    """convert -> file -> a network that begins with it: every expected output."""
    spec = importlib.util.spec_from_file_location(
        "parity", ROOT / "benchmarks" / "checks" / "parity.py"
    )
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    convert(FILE, tmp_path / "tiny.safetensors")
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    video = VisionTransformer(num_frames=8, **sizes)
    network = Discovr(
        video=video,
        video_head=ProjectionHead(48, 40, 32, 12),
        image=VisionTransformer(num_frames=1, tubelet_size=1, qv_bias=False, norm_eps=1e-5, **sizes),
        image_head=ProjectionHead(48, 40, 32, 12),
        decoder=Decoder(in_dim=48, out_dim=48, grid=video.grid, embed_dim=24, depth=2, num_heads=3),
        num_prototypes=16,
    ).eval()  # fmt: skip
    start_from(network, tmp_path / "tiny.safetensors")
    groups = parity.load(FILE)
    with torch.no_grad():
        ours = parity.outputs(network, groups["input"], groups["expected"])
    assert len(ours) == 9
    for key, found in ours.items():
        close(found, groups["expected"][key].double().numpy())
