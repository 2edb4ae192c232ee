from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from discovr_monai.networks import vit as vit_module
from discovr_monai.networks.heads import Decoder
from discovr_monai.networks.masking import visible_indices
from discovr_monai.networks.vit import SHORT, VisionTransformer, attend, sincos_positions
from tests.conftest import tiny_encoder
from tests.networks.test_masking import tube_masks


def test_positions_restated():
    table = sincos_positions(7, 6)
    for position in range(7):
        for column in range(6):
            angle = position / 10000 ** (2 * (column // 2) / 6)
            expected = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-6)


def test_patches_hold_their_own_pixels():
    vit = tiny_encoder()
    clip = torch.arange(3 * 4 * 16 * 16.0).view(1, 3, 4, 16, 16)
    patches = vit.patchify(clip)
    t, h, w = 1, 2, 3
    token = (t * 4 + h) * 4 + w
    expected = clip[0, :, 2:4, 8:12, 12:16]
    assert torch.equal(patches[0, token].view(3, 2, 4, 4), expected)


def _attention64(x, block, heads):
    """Pre-norm attention and MLP of one block, explicit, float64 numpy."""
    p = {k: v.detach().double().numpy() for k, v in block.state_dict().items()}

    def norm(a, name, eps):
        mean, var = a.mean(-1, keepdims=True), a.var(-1, keepdims=True)
        return (a - mean) / np.sqrt(var + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]

    eps = block.norm1.eps
    y = norm(x, "norm1", eps) @ p["attn.qkv.weight"].T
    if "attn.q_bias" in p:
        y = y + np.concatenate(
            (p["attn.q_bias"], np.zeros_like(p["attn.q_bias"]), p["attn.v_bias"])
        )
    n, dim = x.shape
    out = np.zeros((n, dim))
    for head in range(heads):
        width = dim // heads
        columns = slice(head * width, (head + 1) * width)
        q, k, v = (y[:, i * dim : (i + 1) * dim][:, columns] for i in range(3))
        scores = q @ k.T / math.sqrt(width)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, columns] = weights / weights.sum(1, keepdims=True) @ v
    x = x + out @ p["attn.proj.weight"].T + p["attn.proj.bias"]
    hidden = norm(x, "norm2", eps) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    erf = np.vectorize(math.erf)
    hidden = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
    return x + hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]


@pytest.mark.parametrize("qv_bias", [True, False])
def test_a_block_restated_in_float64(qv_bias):
    torch.manual_seed(0)
    block = tiny_encoder(qv_bias=qv_bias).blocks[0]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(9, 24)
    expected = _attention64(x.double().numpy(), block, 3)
    np.testing.assert_allclose(block(x[None])[0].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("tokens", [6, SHORT, SHORT + 1])
def test_every_way_of_bf16_attention_is_the_formula(tokens, gradient):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, 16, generator=generator).bfloat16() for _ in range(3))
    narrow = [x.clone().requires_grad_(gradient) for x in (q, k, v)]
    exact = [x.double().requires_grad_(gradient) for x in (q, k, v)]
    found = attend(*narrow)
    expected = (exact[0] @ exact[1].mT / 4).softmax(-1) @ exact[2]
    assert found.dtype == torch.bfloat16
    assert _relative(found, expected) < 0.01
    if gradient:
        found.float().square().sum().backward()
        expected.square().sum().backward()
        for one, other in zip(narrow, exact, strict=True):
            assert _relative(one.grad, other.grad) < 0.02


def _relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_masked_mode_sees_visible_tokens_only(clip):
    torch.manual_seed(0)
    vit = tiny_encoder()
    mask = tube_masks(torch.rand(3, 16), vit.grid, 0.7)
    tokens = vit(clip, mask)
    assert tokens.shape == (3, 1 + int((~mask[0]).sum()), 24)
    hidden = vit.patchify(torch.ones_like(clip))[0, 0]
    poisoned = vit.patchify(clip).clone()
    poisoned[mask] = hidden * 100
    vit.patchify = lambda _: poisoned  # type: ignore[method-assign]
    assert torch.equal(vit(clip, mask), tokens)


def test_masked_tokens_equal_the_formula(clip):
    """Positions are added first, then visible tokens kept in raster order behind CLS."""
    torch.manual_seed(0)
    vit = tiny_encoder()
    mask = tube_masks(torch.rand(3, 16), vit.grid, 0.5)
    keep = visible_indices(mask)
    full = vit.patch_embed(vit.patchify(clip)) + vit.pos_embed[:, 1:]
    x = torch.stack([row[i] for row, i in zip(full, keep, strict=True)])
    x = torch.cat((vit.cls_token.expand(3, -1, -1), x), 1)
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(vit(clip, mask), vit.norm(x), rtol=0, atol=1e-6)


def test_views_in_one_call_equal_views_one_by_one(clip):
    torch.manual_seed(0)
    vit = tiny_encoder()
    masks = tube_masks(torch.rand(4, 3, 16), vit.grid, 0.7)
    together = vit(clip, masks)
    alone = torch.stack([vit(clip, mask) for mask in masks])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_decoder_puts_tokens_back_in_raster_order():
    torch.manual_seed(0)
    decoder = Decoder(in_dim=8, out_dim=5, grid=(2, 2, 2), embed_dim=8, depth=0, num_heads=2)
    tokens = torch.randn(2, 1 + 4, 8)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 0, 1, 0, 0, 1, 0, 1]], dtype=torch.bool)
    out = decoder(tokens, mask)
    x = decoder.mask_token.expand(2, 8, -1).clone()
    for row in range(2):
        x[row, ~mask[row]] = decoder.embed(tokens[row, 1:])
    expected = decoder.head(decoder.norm(x + sincos_positions(9, 8)[1:]))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image_size": 100},
            "image_size 100 is not divisible by patch_size 16: use image_size 96",
        ),
        ({"num_frames": 15}, "num_frames 15 is not divisible by tubelet_size 2: use num_frames 16"),
        ({"num_frames": 0}, "num_frames 0 and tubelet_size 2 must be at least 1"),
        ({"num_heads": 7}, "width 768 is not divisible by the number of heads 7"),
    ],
)
def test_sizes_that_do_not_divide(options, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**({"depth": 1} | options))


def test_a_clip_of_another_size_is_refused(clip):
    with pytest.raises(ValueError, match=r"built for clips \(B, 3, 4, 16, 16\) but got \(3, 3, 2"):
        tiny_encoder()(clip[:, :, :2])


@pytest.mark.parametrize("whole", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"qv_bias": False}, {"depth": 0}, {"cls_token": False}])
def test_skipping_what_nobody_reads_changes_no_value_and_no_gradient(clip, whole, options):
    torch.manual_seed(0)
    encoder = tiny_encoder(**options).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    masks = tube_masks(torch.rand(3, 3, 16), encoder.grid, 0.7)
    results = []
    for skip in (False, True):
        encoder.zero_grad(set_to_none=True)
        if skip:
            cls, tokens = encoder.encode(clip.double(), masks, whole)
        else:
            x = encoder(clip.double(), masks)
            cls, tokens = x[..., 0, :], x[len(x) - whole :]
        (cls.sin().sum() + tokens.cos().sum()).backward()
        grads = {n: p.grad for n, p in encoder.named_parameters()}
        results.append((cls, tokens, grads))
    (cls, tokens, grads), (our_cls, our_tokens, found) = results
    torch.testing.assert_close(our_cls, cls)
    torch.testing.assert_close(our_tokens, tokens)
    assert tokens.shape == our_tokens.shape
    for name, value in grads.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, msg=name)


class Scaled(VisionTransformer):
    def forward(self, clip, mask=None):
        return 3 * super().forward(clip, mask)


def test_somebodys_own_forward_is_what_encode_gives(clip):
    encoder = tiny_encoder()
    encoder.__class__ = Scaled
    cls, tokens = encoder.encode(clip, whole=1)
    x = encoder(clip)
    assert torch.equal(cls, x[:, 0])
    assert torch.equal(tokens, x[2:])


def test_the_last_block_computes_cls_alone(clip):
    """Also where it is of a class derived from Block, as sharding makes them."""
    encoder, rows = tiny_encoder(), []
    encoder.blocks[-1].__class__ = type("Sharded", (vit_module.Block,), {})
    encoder.blocks[-1].register_forward_hook(lambda block, x, y: rows.append(y.shape))
    encoder.encode(clip)
    assert rows == [(3, 1, 24)]


def test_positions_of_visible_tokens_are_taken_as_their_mask_is(clip):
    encoder = tiny_encoder()
    masks = tube_masks(torch.rand(3, 3, 16), encoder.grid, 0.7)
    assert torch.equal(encoder(clip, visible_indices(masks)), encoder(clip, masks))
    with pytest.raises(ValueError, match=r"mask \(3, 2, 10\) does not fit \(3, 32\)"):
        encoder(clip, visible_indices(masks)[:, :2])


def test_more_whole_views_than_there_are_is_refused(clip):
    with pytest.raises(ValueError, match=r"whole 5 must lie in \[0, 3\]"):
        tiny_encoder().encode(clip, whole=5)


def test_without_a_mask_the_last_clips_stay_whole(clip):
    encoder = tiny_encoder()
    x = encoder(clip)
    cls, tokens = encoder.encode(clip, whole=2)
    torch.testing.assert_close(cls, x[:, 0])
    torch.testing.assert_close(tokens, x[1:])
    assert encoder.encode(clip)[1].shape == (0, *x.shape[1:])
