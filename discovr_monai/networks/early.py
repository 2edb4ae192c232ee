"""A backward in the middle of the forward: what it kept is free for what comes after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def early_backward(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Tensor:
    """A scalar whose gradients are known already, and all else that it needed forgotten.

    The later backward scales these gradients and hands them on: they are accumulated once, and
    DistributedDataParallel sees nothing unusual. The order of work is another, the result the
    same. (A hook that Tensor.register_hook has put on a parameter fires both times.)

    Args:
        loss: gives a scalar, from these parameters and from nothing else that trains.
        parameters: those that do not train are left out.

    Returns:
        loss()'s value.
    """
    result: Tensor = _Early.apply(loss, *(p for p in parameters if p.requires_grad))
    return result


class _Early(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Callable[[], Tensor], *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            value = loss()
        with torch.autocast(value.device.type, enabled=False):  # as any backward
            gradients = torch.autograd.grad(value, parameters)
        ctx.save_for_backward(*gradients)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *torch._foreach_mul(ctx.saved_tensors, grad)
