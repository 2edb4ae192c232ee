"""Teachers as exponential moving averages of their students."""

from __future__ import annotations

import copy

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, one fused call.

    Parameters are averaged; buffers are fixed tables and are left as they are.
    """
    teachers: list[torch.Tensor] = list(teacher.parameters())
    students = [p.detach() for p in student.parameters()]
    if teachers:
        torch._foreach_lerp_(teachers, students, 1.0 - momentum)
