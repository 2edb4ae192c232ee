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

    The order of work is another, the result the same. (A hook that Tensor.register_hook has put
    on a parameter fires here and again in the later backward.)

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
    with torch.autocast(value.device.type, enabled=False):  # as any backward
        gradients = torch.autograd.grad(value, trained)
    value = value.detach()
    return lambda: _HandOn.apply(value, gradients, *trained)


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, grad)
