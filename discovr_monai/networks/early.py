"""A backward in the middle of the forward: what it kept is free for what comes after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def early_backward(
    loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]
) -> Callable[[], Tensor]:
    """Takes a scalar's gradients at once, and forgets all else that it needed.

    The order of work is another; the result is the same but for the rounding of the factor that
    the later backward brings. Not for parameters with hooks of Tensor.register_hook, which would
    fire here and there.

    Args:
        loss: gives a scalar, from these parameters and from nothing else that trains.
        parameters: those that do not train are left out.

    Returns:
        Gives loss()'s value. Its backward scales the gradients and hands them on to be
        accumulated, as if they came from there: DistributedDataParallel sees nothing unusual.
        What is called last comes first in backward: called at the end of the forward, the
        gradients can cross ranks while the rest of the backward runs.
    """
    trained = [p for p in parameters if p.requires_grad]
    with torch.enable_grad():
        value = loss()
    if not value.requires_grad:
        return lambda: value
    with torch.autocast(value.device.type, enabled=False):  # as any backward
        found = torch.autograd.grad(value, trained, allow_unused=True)
    used = {p: g for p, g in zip(trained, found, strict=True) if g is not None}
    value = value.detach().reshape(())
    return lambda: _HandOn.apply(value, [*used.values()], *used)


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the image branch's backward was early: it cannot come twice")
        if grad.device.type != "cpu" or float(grad) != 1:  # on a CPU it costs nothing to ask
            torch._foreach_mul_(gradients, grad)  # in place: a copy would come at the memory's peak
        return None, None, *gradients
