"""Teachers as exponential moving averages of their students."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Student = TypeVar("Student", bound=nn.Module)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def make_teacher(student: Student) -> Student:
    """A frozen copy in evaluation mode."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, one fused call.

    Parameters are averaged; buffers are fixed tables and are left as they are. Teacher and
    student are sharded alike, so each rank averages its own parts.
    """
    teachers = [local(p.detach()) for p in teacher.parameters()]
    students = [local(p.detach()) for p in student.parameters()]
    if teachers:
        torch._foreach_lerp_(teachers, students, 1.0 - momentum)
