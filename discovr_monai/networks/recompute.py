"""Products whose input is cheap to make again: autograd keeps less, the result is the same.

A transformer block keeps for its backward, in widths d of a token, the input and the output of
both norms (4), queries, keys, values and what attention gives (4), the hidden layer before and
after GELU (8). The outputs of norms and GELU are one pass over what is kept anyway: made again in
backward, they take a few per cent of a step's time and 6 of the 16 widths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def norm_linear(
    x: Tensor, norm: nn.Module, linear: nn.Linear, bias: Tensor | None = None
) -> Tensor:
    """linear(norm(x)); backward keeps x alone.

    Layers that are somebody's own kind, or have hooks, are called as they are.

    Args:
        x: (..., d).
        norm: over d.
        linear: d to out.
        bias: (out), in place of the layer's own.

    Returns:
        (..., out).
    """
    bias = linear.bias if bias is None else bias
    if _is_plain(norm, linear) and isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        inputs = (x, norm.weight, norm.bias, linear.weight, bias)
        if _trains(*inputs):
            return _NormLinear.apply(*inputs, norm.eps)
    if bias is linear.bias:
        return linear(norm(x))
    return F.linear(norm(x), linear.weight, bias)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gelu(x)); backward keeps x alone. A layer of another kind is called as it is.

    Args:
        x: (..., d).
        linear: d to out.

    Returns:
        (..., out).
    """
    if _is_plain(linear) and _trains(x, linear.weight, linear.bias):
        return _GeluLinear.apply(x, linear.weight, linear.bias)
    return linear(F.gelu(x))


def _is_plain(*layers: nn.Module) -> bool:
    """Whether these layers do what their weights say, and nobody listens."""
    return all(
        type(layer) in (nn.LayerNorm, nn.Linear)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )


def _trains(*tensors: Tensor | None) -> bool:
    """Whether a backward can come; what is traced for export must not see our functions."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, scale, shift, weight)
        ctx.eps = eps
        return F.linear(F.layer_norm(x, scale.shape, scale, shift, eps), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        shape, needs = scale.shape, ctx.needs_input_grad
        kind, x = x.dtype, x.to(scale.dtype)  # as autocast has it in the forward
        y, mean, rstd = torch.native_layer_norm(x, shape, scale, shift, ctx.eps)
        d_y, d_weight, d_bias = _linear_backward(grad, y, weight, any(needs[:3]), *needs[3:5])
        if d_y is None:
            return None, None, None, d_weight, d_bias, None
        d_x, d_scale, d_shift = torch.ops.aten.native_layer_norm_backward(
            d_y.to(y.dtype), x, shape, mean, rstd, scale, shift, list(needs[:3])
        )
        d_x = None if d_x is None else d_x.to(kind)
        return d_x, d_scale, d_shift, d_weight, d_bias, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_y, d_weight, d_bias = _linear_backward(grad, F.gelu(x), weight, *ctx.needs_input_grad)
        d_x = None if d_y is None else torch.ops.aten.gelu_backward(d_y, x)
        return d_x, d_weight, d_bias


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of linear(x, weight, bias), in the precision that ``grad`` came in."""
    rows = grad.flatten(0, -2)  # (rows, out)
    d_x = grad @ weight.to(grad.dtype) if of_x else None  # (..., d)
    d_weight = d_bias = None
    if of_weight:
        d_weight = (rows.T @ x.to(grad.dtype).flatten(0, -2)).to(weight.dtype)  # (out, d)
    if of_bias:
        d_bias = rows.sum(0).to(weight.dtype)  # sums in fp32 inside
    return d_x, d_weight, d_bias
