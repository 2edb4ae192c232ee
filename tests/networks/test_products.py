"""Products with what is around them are torch's own, keep less and take fewer passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from discovr_monai.networks import products
from discovr_monai.networks.products import add_linear, add_mlp, norm_linear, product
from discovr_monai.networks.vit import Block, VisionTransformer

D, HIDDEN = 24, 40
fused = pytest.mark.skipif(products._ONEDNN is None, reason="no bf16 products of oneDNN here")


def layers(dtype=torch.float32, bias=True):
    """norm, fc1 and fc2 with random parameters."""
    torch.manual_seed(0)
    made = (
        nn.LayerNorm(D, eps=1e-5),
        nn.Linear(D, HIDDEN, bias=bias),
        nn.Linear(HIDDEN, D, bias=bias),
    )
    for layer in made:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        layer.to(dtype)
    return made


def ways(name, norm, fc1, fc2):
    """What torch would write, what we call, and the layers in it; of a residual and an input."""
    return {
        "norm": (lambda r, x: fc1(norm(x)), lambda r, x: norm_linear(x, norm, fc1), (norm, fc1)),
        "add": (lambda r, x: r + fc2(fc1(x)), lambda r, x: add_linear(r, fc1(x), fc2), (fc1, fc2)),
        "mlp": (
            lambda r, x: x + fc2(F.gelu(fc1(norm(x)))),
            lambda r, x: add_mlp(x, norm, fc1, fc2),
            (norm, fc1, fc2),
        ),
    }[name]


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 7, D, dtype=dtype, generator=generator) for _ in range(2)]


def value_and_gradients(way, used, residual, x, autocast=None):
    parameters = {
        f"{i}.{n}": p for i, layer in enumerate(used) for n, p in layer.named_parameters()
    }
    wanted = {**parameters, "x": x, "residual": residual}
    wanted = {k: v for k, v in wanted.items() if v.requires_grad}
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = way(residual, x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    found = torch.autograd.grad(y, [*wanted.values()], direction, allow_unused=True)
    return y, dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize("name", ["norm", "add", "mlp"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("inputs",), ("weights",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_torchs(name, bias, frozen, dtype):
    theirs, ours, used = ways(name, *layers(dtype, bias))
    residual, x = (t.requires_grad_("inputs" not in frozen) for t in inputs(dtype))
    for layer in used:
        layer.requires_grad_("weights" not in frozen)
    y, expected = value_and_gradients(theirs, used, residual, x)
    again, found = value_and_gradients(ours, used, residual, x)
    close = {"rtol": 1e-6, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(again, y, **close)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
        else:
            torch.testing.assert_close(found[key], value, **close, msg=key)


@pytest.mark.parametrize("name", ["norm", "add", "mlp"])
@pytest.mark.parametrize("other", [None, "no oneDNN", "no CPU"])
def test_under_autocast_all_is_bf16_and_gradients_the_parameters_own(name, other, monkeypatch):
    if other == "no oneDNN":
        monkeypatch.setattr(products, "_ONEDNN", None)
    elif other == "no CPU":
        monkeypatch.setattr(products, "_kept", lambda weight, narrow: weight)
    theirs, ours, used = ways(name, *layers())
    residual, x = (t.bfloat16().requires_grad_() for t in inputs())
    wide = [t.detach().float().requires_grad_() for t in (residual, x)]
    y, expected = value_and_gradients(theirs, used, *wide)
    again, found = value_and_gradients(ours, used, residual, x, autocast=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert (again - y).norm() < 0.01 * y.norm()
    for key, value in expected.items():
        if value is not None:
            assert found[key].dtype == (torch.bfloat16 if key in ("x", "residual") else value.dtype)
            assert (found[key] - value).norm() < 0.015 * value.norm(), key


@fused
@pytest.mark.parametrize("kept", ["residual in fp32", "x in fp32"])
def test_a_sum_of_two_precisions_has_the_wider_one(kept):
    _, fc1, fc2 = layers()
    residual, x = inputs()
    residual = residual if kept == "residual in fp32" else residual.bfloat16()
    hidden = fc1(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = residual + fc2(hidden)
        found = add_linear(residual, hidden, fc2)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    gradient = torch.autograd.grad(found.sum(), fc2.weight)[0]
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize(("name", "expected"), [("norm", "x"), ("add", "hidden"), ("mlp", "x")])
def test_backward_keeps_no_output_of_norm_or_gelu(name, expected):
    norm, fc1, fc2 = layers()
    residual, x = inputs()
    x.requires_grad_()
    hidden = fc1(x).detach().requires_grad_()
    calls = {
        "norm": lambda: norm_linear(x, norm, fc1),
        "add": lambda: add_linear(residual, hidden, fc2),
        "mlp": lambda: add_mlp(x, norm, fc1, fc2),
    }
    kept = []
    own = {p.data_ptr() for layer in (norm, fc1, fc2) for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        calls[name]()
    kept = [t for t in kept if t.data_ptr() not in own]
    inside = [t for t in kept if t.data_ptr() not in (x.data_ptr(), hidden.data_ptr())]
    assert [t.data_ptr() for t in kept][:1] == [{"x": x, "hidden": hidden}[expected].data_ptr()]
    assert len(kept) == (2 if name == "mlp" else 1)
    for t in inside:  # what goes into GELU
        torch.testing.assert_close(t, fc1(norm(x)))


@fused
@pytest.mark.parametrize(("gelu", "add"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_call_of_onednn_takes_bias_and_gelu_into_the_product(gelu, add, bias):
    _, fc1, _ = layers(bias=bias)
    x = inputs()[0]
    residual = torch.randn(3, 7, HIDDEN) if add else None
    expected = F.gelu(fc1(x)) if gelu else fc1(x)
    expected = expected + residual if add else expected
    narrowly = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.profiler.profile() as seen, narrowly, torch.no_grad():
        found = product(x, fc1.weight, fc1.bias, residual, gelu)
    assert found.dtype == (torch.float32 if add else torch.bfloat16)
    assert (found - expected).norm() < 0.01 * expected.norm()
    names = {event.name for event in seen.events()}
    assert any(name.startswith("mkldnn::_linear_pointwise") for name in names)
    assert not names & {"aten::linear", "aten::addmm", "aten::gelu", "aten::add"}


@fused
def test_the_input_may_lie_in_any_order():
    _, fc1, _ = layers()
    x = torch.randn(D, 5, 2).bfloat16().permute(2, 1, 0)
    weight = fc1.weight.bfloat16()
    for way in (x, x[:, :1].expand(2, 5, D), x[:0]):
        expected = F.linear(way.float(), weight.float())
        torch.testing.assert_close(
            product(way, weight, None).float(), expected, rtol=1e-2, atol=1e-2
        )


def test_where_nothing_trains_no_function_of_ours_is_seen(monkeypatch):
    made = layers()
    residual, x = inputs()
    for function in (products._NormLinear, products._AddLinear):
        monkeypatch.setattr(function, "apply", None)
    for name in ("norm", "add", "mlp"):
        theirs, ours, _ = ways(name, *made)
        with torch.no_grad():
            torch.testing.assert_close(ours(residual, x), theirs(residual, x))
        with pytest.raises(TypeError, match="not callable"):
            ours(residual, x)


def tiny_encoder():
    return VisionTransformer(
        image_size=16, num_frames=2, patch_size=8, embed_dim=D, depth=2, num_heads=3
    )


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
@pytest.mark.parametrize("autocast", [True, False])
def test_what_is_traced_has_torchs_own_operations_only(autocast):
    encoder, clip = tiny_encoder().eval(), torch.randn(1, 3, 2, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        program = torch.export.export(encoder, (clip,))
        traced = torch.jit.trace(encoder, clip, check_trace=False)
    for graph in (str(program.graph), str(traced.inlined_graph)):
        assert not [word for word in ("mkldnn", "add_", "gelu_") if f"::{word}(" in graph]
        assert "linear" in graph
    assert "mkldnn" not in str(program.graph)
    casts = [n for n in program.graph.nodes if "aten.to.dtype" in str(n.target)]
    assert len(casts) <= 1


@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_a_layer_of_another_kind_does_not_bring_our_functions_into_a_trace(kind, tmp_path):
    block = Block(D, 3, 2.0, qv_bias=True, norm_eps=1e-6).requires_grad_(False)
    if kind == "hook":
        block.norm2.register_forward_hook(lambda *_: None)
    else:
        block.mlp.fc1 = Doubled(D, 2 * D).requires_grad_(False)
    x = torch.randn(2, 5, D)
    traced = torch.jit.trace(block, x, check_trace=False)
    traced.save(tmp_path / "block.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "block.pt")(x), block(x))


def test_shapes_are_known_without_memory():
    with torch.device("meta"):
        encoder, clip = tiny_encoder(), torch.empty(2, 3, 2, 16, 16)
        assert encoder(clip).shape == (2, 5, D)
        with torch.no_grad():
            assert encoder(clip).shape == (2, 5, D)


@fused
def test_forward_derivatives_are_not_lost():
    norm, fc1, fc2 = (layer.requires_grad_(False) for layer in layers())
    x, tangent = inputs()

    def way(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return add_mlp(x, norm, fc1, fc2)

    _, found = torch.func.jvp(way, (x,), (tangent,))
    _, expected = torch.func.jvp(lambda x: x + fc2(F.gelu(fc1(norm(x)))), (x,), (tangent,))
    assert (found - expected).norm() < 0.01 * expected.norm()


@fused
def test_in_bf16_backward_keeps_no_other_activation():
    norm, fc1, fc2 = layers()
    x = inputs()[0].requires_grad_()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        add_mlp(x, norm, fc1, fc2)
    shapes = sorted((tuple(t.shape) for t in kept if t.dim() > 1), key=len)
    assert shapes == [(HIDDEN, D), (D, HIDDEN), (3, 7, D), (3, 7, HIDDEN)]


def test_under_autocast_what_blocks_add_to_stays_in_fp32():
    encoder = tiny_encoder()
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _, x, y: seen.extend((x[0].dtype, y.dtype)))
    clip = torch.randn(1, 3, 2, 16, 16)
    mask = torch.tensor([[[False, True, False, True]]])
    expected = encoder(clip, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(clip, mask)
        with torch.no_grad():
            assert (encoder(clip, mask) - expected).norm() < 0.02 * expected.norm()
    assert set(seen) == {torch.float32}
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def listening(forward, heard):
    return lambda x: heard.append(1) or forward(x)


@pytest.mark.parametrize(
    "kind", ["another linear", "another norm", "no affine", "hooks", "global hooks", "patched"]
)
def test_layers_of_another_kind_are_called_as_they_are(kind, monkeypatch, request):
    norm, fc1, fc2 = layers()
    heard = []
    if kind == "another linear":
        fc1, fc2 = Doubled(D, HIDDEN), Doubled(HIDDEN, D)
    elif kind == "another norm":
        norm = nn.RMSNorm(D)
    elif kind == "no affine":
        norm = nn.LayerNorm(D, elementwise_affine=False)
    elif kind == "hooks":
        for layer in (fc1, fc2):
            layer.register_forward_hook(lambda *_: heard.append(1))
    elif kind == "patched":
        for layer in (fc1, fc2):
            monkeypatch.setattr(layer, "forward", listening(layer.forward, heard))
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda layer, *_: heard.append(1) if isinstance(layer, nn.Linear) else None
        )
        request.addfinalizer(handle.remove)
    residual, x = inputs()
    for gradient in (True, False):
        for name, hooks in (("norm", 1), ("add", 2), ("mlp", 2)):
            theirs, ours, _ = ways(name, norm, fc1, fc2)
            heard.clear()
            with torch.set_grad_enabled(gradient):
                found = ours(residual, x)
                assert len(heard) == (hooks if kind in ("hooks", "global hooks", "patched") else 0)
                torch.testing.assert_close(found, theirs(residual, x))
