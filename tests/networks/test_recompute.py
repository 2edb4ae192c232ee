"""Products that make their input again in backward are torch's own, and keep less."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from discovr_monai.networks import recompute
from discovr_monai.networks.recompute import gelu_linear, norm_linear


def layers(dtype):
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(24, eps=1e-5).to(dtype), nn.Linear(24, 40).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, linear, torch.randn(3, 7, 24, dtype=dtype)


def both(name, dtype, autocast=None, bias=True, frozen=()):
    """(value and gradients) of torch's own formulation and of ours."""
    norm, linear, x = layers(dtype)
    parameters = {"scale": norm.weight, "shift": norm.bias, "weight": linear.weight}
    parameters |= {"bias": linear.bias} if bias else {}
    inputs = {
        "x": x,
        **(
            parameters
            if name == "norm"
            else {n: parameters[n] for n in parameters if n in ("weight", "bias")}
        ),
    }
    for key, value in inputs.items():
        value.requires_grad_(key not in frozen)
    if not bias:
        linear.bias = None
    shift = linear.bias
    ways = {
        "norm": (
            lambda: F.linear(norm(x), linear.weight, shift),
            lambda: norm_linear(x, norm, linear),
        ),
        "gelu": (
            lambda: F.linear(F.gelu(x), linear.weight, shift),
            lambda: gelu_linear(x, linear),
        ),
    }[name]
    found = []
    for way in ways:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            y = way()
        wanted = [v for k, v in inputs.items() if k not in frozen]
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        found.append((y, dict(zip((k for k in inputs if k not in frozen),
                                  torch.autograd.grad(y, wanted, direction.to(y.dtype)),
                                  strict=True))))  # fmt: skip
    return found


@pytest.mark.parametrize("name", ["norm", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [(), ("x",), ("weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradients_are_torchs(name, bias, frozen, dtype):
    frozen = tuple(f for f in frozen if bias or f != "bias")
    (y, expected), (ours, found) = both(name, dtype, bias=bias, frozen=frozen)
    assert torch.equal(y, ours)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_under_autocast_products_are_bf16_and_gradients_the_parameters_own(name):
    (y, expected), (ours, found) = both(name, torch.float32, autocast=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(y, ours)
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        torch.testing.assert_close(found[key], value, rtol=2e-2, atol=5e-2, msg=key)


@pytest.mark.parametrize("name", ["norm", "gelu"])
def test_backward_keeps_the_input_alone(name):
    norm, linear, x = layers(torch.float32)
    x.requires_grad_()
    kept = []
    own = {p.data_ptr() for p in (*norm.parameters(), *linear.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        if name == "norm":
            norm_linear(x, norm, linear)
        else:
            gelu_linear(x, linear)
    assert [t.data_ptr() for t in kept if t.data_ptr() not in own] == [x.data_ptr()]


def test_where_nothing_trains_no_function_of_ours_is_seen(monkeypatch):
    norm, linear, x = layers(torch.float32)
    for function in (recompute._NormLinear, recompute._GeluLinear):
        monkeypatch.setattr(function, "apply", None)
    with torch.no_grad():
        expected = linear(norm(x)), linear(F.gelu(x))
        found = norm_linear(x, norm, linear), gelu_linear(x, linear)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(TypeError, match="not callable"):
        norm_linear(x, norm, linear)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["another linear", "another norm", "no affine", "hooks"])
def test_layers_of_another_kind_are_called_as_they_are(kind):
    norm, linear, x = layers(torch.float32)
    heard = []
    if kind == "another linear":
        linear = Doubled(24, 40)
    elif kind == "another norm":
        norm = nn.RMSNorm(24)
    elif kind == "no affine":
        norm = nn.LayerNorm(24, elementwise_affine=False)
    else:
        linear.register_forward_hook(lambda *_: heard.append(1))
    found = norm_linear(x, norm, linear), gelu_linear(x, linear)
    assert len(heard) == (2 if kind == "hooks" else 0)
    for ours, expected in zip(found, (linear(norm(x)), linear(F.gelu(x))), strict=True):
        assert torch.equal(ours, expected)
