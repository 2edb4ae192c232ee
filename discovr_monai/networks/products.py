"""Matrix products with what comes before and after them: less is kept, and fewer passes are made.

A transformer block keeps for its backward, in widths d of a token, the input and the output of
both norms (4), queries, keys, values and what attention gives (4), the hidden layer before and
after GELU (8). The outputs of norms and GELU are one pass over what is kept anyway: made again in
backward, they take a few per cent of a step's time and 6 of the 16 widths.

On a CPU, torch copies a bias into the result before the product adds to it: two passes over memory,
adding it in place afterwards is one. In bf16, oneDNN adds the bias, and takes GELU where nothing
trains, while the result is in cache. (Its fp32 products lose that again to MKL's.) What blocks add
to stays in fp32 (the residual in bf16 is faster and was tried: docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# what torch's own compiler calls for the same purpose
_ONEDNN: Any = None
if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def norm_linear(
    x: Tensor, norm: nn.Module, linear: nn.Linear, bias: Tensor | None = None
) -> Tensor:
    """linear(norm(x)); backward keeps x alone (and on a CPU in bf16 the weight's cast).

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
        return product(norm(x), linear.weight, bias)
    if bias is linear.bias:
        return linear(norm(x))
    return F.linear(norm(x), linear.weight, bias)


def add_linear(residual: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
    """residual + linear(x); a layer of another kind, or with hooks, is called as it is.

    Args:
        residual: (..., out).
        x: (..., d).
        linear: d to out.

    Returns:
        (..., out).
    """
    if not _is_plain(linear):
        return residual + linear(x)
    if _trains(residual, x, linear.weight, linear.bias):
        return _AddLinear.apply(residual, x, linear.weight, linear.bias, False)
    return product(x, linear.weight, linear.bias, residual)


def add_mlp(
    x: Tensor, norm: nn.Module, fc1: nn.Linear, fc2: nn.Linear, keep: bool = False
) -> Tensor:
    """x + fc2(gelu(fc1(norm(x)))); backward keeps x and what goes into GELU.

    Layers of another kind, or with hooks, are called as they are.

    Args:
        x: (..., d).
        norm: over d.
        fc1: d to hidden.
        fc2: hidden to d.
        keep: keep what comes out of GELU, too. What runs again in backward stops at the last
            thing kept, which then comes before the last product; the result is the same. Not
            where oneDNN makes that product.

    Returns:
        (..., d).
    """
    plain = _is_plain(norm, fc1, fc2)
    if plain and not _trains(x, *norm.parameters(), *fc1.parameters(), *fc2.parameters()):
        hidden = product(norm(x), fc1.weight, fc1.bias, gelu=True)  # (..., hidden)
        return product(hidden, fc2.weight, fc2.bias, x)
    hidden = norm_linear(x, norm, fc1)
    if not (_is_plain(fc2) and _trains(x, hidden, fc2.weight, fc2.bias)):
        return add_linear(x, F.gelu(hidden), fc2)
    if keep and not _is_fused(x):
        return product(F.gelu(hidden), fc2.weight, fc2.bias, x)
    return _AddLinear.apply(x, hidden, fc2.weight, fc2.bias, True)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """residual + x W^T + b, or gelu(x W^T + b), in autocast's precision.

    Autograd follows it, without GELU, where oneDNN is not used.

    Args:
        x: (..., d).
        weight: (out, d).
        bias: (out).
        residual: (..., out).
        gelu: take GELU of the result; not with a residual.

    Returns:
        (..., out).
    """
    kind = _compute_type(x)
    if _is_fused(x):
        bias = None if bias is None else bias.to(kind)
        after, how = ("gelu", "none") if gelu else ("none", "")
        y = _ONEDNN(x.to(kind), weight.to(kind), bias, after, [], how)
    elif x.device.type == "cpu" and kind in (torch.float32, torch.float64) and not _is_traced():
        y = F.linear(x, weight)
        y = y if bias is None else y.add_(bias)
        y = torch.ops.aten.gelu_(y) if gelu else y
    else:
        y = F.linear(x, weight, bias)
        y = F.gelu(y) if gelu else y
        return y if residual is None else residual + y
    if residual is None:
        return y
    # in place: of two precisions, that is a pass less than torch's own sum
    return y.to(torch.promote_types(y.dtype, residual.dtype)).add_(residual)


def _is_fused(x: Tensor) -> bool:
    """Whether oneDNN takes what follows such an input's product into it."""
    return (
        _ONEDNN is not None
        and not _is_traced()
        and torch.autograd.forward_ad._current_level < 0  # it would drop the tangent
        and x.device.type == "cpu"
        and _compute_type(x) == torch.bfloat16
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
    )


def _is_traced() -> bool:
    """What is compiled, exported or traced by torch.jit is to hold torch's own operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _compute_type(x: Tensor) -> torch.dtype:
    """The precision of a product: autocast's, where there is one."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _is_plain(*layers: nn.Module) -> bool:
    """Whether these layers do what their weights say, and nobody listens."""
    if nn.modules.module._has_any_global_hook():
        return False
    return all(
        type(layer) in (nn.LayerNorm, nn.Linear)
        and "forward" not in vars(layer)
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
        y = F.layer_norm(x, scale.shape, scale, shift, eps)
        ctx.eps, ctx.kind = eps, weight.dtype
        narrow = weight.to(_compute_type(y))
        ctx.save_for_backward(x, scale, shift, _kept(weight, narrow))
        return product(y, narrow, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        shape, needs = scale.shape, ctx.needs_input_grad
        kind, x = x.dtype, x.to(scale.dtype)  # as autocast has it in the forward
        y, mean, rstd = torch.native_layer_norm(x, shape, scale, shift, ctx.eps)
        d_y, d_weight, d_bias = _linear_backward(
            grad, y, weight, ctx.kind, any(needs[:3]), *needs[3:5]
        )
        if d_y is None:
            return None, None, None, d_weight, d_bias, None
        d_x, d_scale, d_shift = torch.ops.aten.native_layer_norm_backward(
            d_y.to(y.dtype), x, shape, mean, rstd, scale, shift, list(needs[:3])
        )
        d_x = None if d_x is None else d_x.to(kind)
        return d_x, d_scale, d_shift, d_weight, d_bias, None


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
    ) -> Tensor:
        narrow = weight.to(_compute_type(x))
        ctx.kind, ctx.narrow = weight.dtype, narrow.dtype
        ctx.residual_kind, ctx.gelu = residual.dtype, gelu
        ctx.save_for_backward(x, _kept(weight, narrow))
        return product(F.gelu(x) if gelu else x, narrow, bias, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_residual = grad.to(ctx.residual_kind) if ctx.needs_input_grad[0] else None
        y = F.gelu(x) if ctx.gelu else x
        d_y, d_weight, d_bias = _linear_backward(
            grad.to(ctx.narrow), y, weight, ctx.kind, *ctx.needs_input_grad[1:4]
        )
        if d_y is None or not ctx.gelu:
            return d_residual, d_y if d_y is None else d_y.to(x.dtype), d_weight, d_bias, None
        d_x = torch.ops.aten.gelu_backward(d_y.to(x.dtype), x)
        return d_residual, d_x, d_weight, d_bias, None


def _kept(weight: Tensor, narrow: Tensor) -> Tensor:
    """What backward multiplies by: on a CPU, where casts take long, the one that there is.

    Elsewhere the weight itself, which is there anyway; where it is sharded, it is gathered anew,
    and a cast that is kept would be the whole network again.
    """
    return narrow if weight.device.type == "cpu" else weight


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kind: torch.dtype,
    of_x: bool, of_weight: bool, of_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of linear(x, weight, bias), in the precision that ``grad`` came in.

    Args:
        grad: (..., out).
        x: (..., d).
        weight: (out, d), of any precision.
        kind: of the parameters, and of their gradients.
        of_x, of_weight, of_bias: which are wanted; None is returned for the others.
    """
    rows = grad.flatten(0, -2)  # (rows, out)
    d_x = grad @ weight.to(grad.dtype) if of_x else None  # (..., d)
    d_weight = d_bias = None
    if of_weight:
        columns = x.to(grad.dtype).flatten(0, -2)  # (rows, d)
        if kind != grad.dtype and x.shape[-1] > grad.shape[-1]:  # it is copied: the faster way
            d_weight = torch.empty_like(weight, dtype=kind).copy_((columns.T @ rows).T)
        else:
            d_weight = (rows.T @ columns).to(kind)  # (out, d)
    if of_bias:
        d_bias = rows.sum(0).to(kind)  # sums in fp32 inside
    return d_x, d_weight, d_bias
