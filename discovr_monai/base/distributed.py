"""Reductions over ranks, which do nothing in a single process."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether this process has joined a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 when alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of ranks; 1 when alone."""
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of ``tensor`` over ranks; overwrites it if there are several. Has no gradient."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


class _SumOverRanks(torch.autograd.Function):
    """As torch.distributed.nn.functional.all_reduce, which newer versions of torch deprecate."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of ``tensor`` over ranks. Backward sums the gradients of all ranks, too."""
    return _SumOverRanks.apply(tensor) if is_distributed() else tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of ``tensor`` over ranks; overwrites it if there are several."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean of ``tensor`` over ranks, all of equal weight; overwrites it. Has no gradient."""
    return all_reduce_sum(tensor).div_(world_size()) if is_distributed() else tensor


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in rank order."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits for all ranks."""
    if is_distributed():
        dist.barrier()


def local_device() -> torch.device:
    """This process's GPU under torchrun, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def start() -> None:
    """Joins torchrun's process group: NCCL on GPUs, gloo on CPUs.

    Raises:
        RuntimeError: when not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise RuntimeError(
            "multi_gpu_train.yaml needs torchrun: torchrun --standalone --nproc_per_node=2 "
            "-m monai.bundle run training --config_file ..."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def shut_down() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
