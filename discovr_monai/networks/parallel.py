"""How a network runs: whole on each process or in shards, with less memory, or compiled."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from discovr_monai.networks.discovr import Discovr
from discovr_monai.networks.vit import Block

STRATEGIES = ("ddp", "fsdp")
Network = TypeVar("Network", bound=nn.Module)


def parallel(network: Discovr, device: torch.device, strategy: str = "ddp") -> Discovr:
    """Makes the gradients of a network means over ranks. Each branch crosses ranks by itself.

    Args:
        network: on ``device`` already, the same on every rank.
        device: this rank's.
        strategy: "ddp" keeps everything on every rank. "fsdp" keeps 1 / ranks of the parameters
            (the teachers' too), gradients and optimiser state on each, and brings together a
            block at a time: for networks that do not fit otherwise. Same result.

    Returns:
        The same network.

    Raises:
        ValueError: for another strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} must be one of {', '.join(STRATEGIES)}")
    if strategy == "fsdp":
        from torch.distributed.fsdp import fully_shard  # a second to import, for this alone

        for module in list(network.modules()):
            if isinstance(module, Block):
                fully_shard(module)
        for branch in network.branches.values():
            fully_shard(branch)
        return network
    for name, branch in network.branches.items():
        if any(p.requires_grad for p in branch.parameters()):
            network.branches[name] = DistributedDataParallel(
                branch,
                device_ids=[device] if device.type == "cuda" else None,
                forward_sync_buffers=False,  # fixed tables, and centres that all ranks move alike
                gradient_as_bucket_view=True,  # no second copy of the gradients
            )
    return network


def is_sharded(network: Discovr) -> bool:
    """Whether each rank holds a part of the network only."""
    return hasattr(network.video, "set_requires_gradient_sync")


@contextmanager
def gradients_stay_here(network: Discovr, stay: bool) -> Iterator[None]:
    """Inside, backward leaves gradients on their rank if ``stay``: more batches are to come.

    DistributedDataParallel decides in forward already, so forward belongs inside, too.
    """
    with ExitStack() as stack:
        for branch in network.branches.values():
            if isinstance(branch, DistributedDataParallel) and stay:
                stack.enter_context(branch.no_sync())
            elif hasattr(branch, "set_requires_gradient_sync"):
                branch.set_requires_gradient_sync(not stay)  # type: ignore[operator]
        yield


def load_whole(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads whole tensors, which every rank has, also into a sharded network."""
    own = network.state_dict()
    parts = {}
    for name, value in state.items():
        target = own.get(name)
        if (
            target is not None
            and hasattr(target, "placements")
            and not hasattr(value, "placements")
        ):
            from torch.distributed.tensor import distribute_tensor  # slow to import

            value = value.to(target.device, target.dtype)
            value = distribute_tensor(
                value, target.device_mesh, target.placements, src_data_rank=None
            )
        parts[name] = value
    network.load_state_dict(parts)


def accelerate(
    network: Network, activation_checkpointing: bool = False, compile: bool = False
) -> Network:
    """Sets up the transformer blocks of a network, in place; its state dict stays the same.

    On a CPU the process keeps the memory that it has had: see :func:`keep_memory`.

    Args:
        network: on its device already; DDP goes around it afterwards.
        activation_checkpointing: blocks that train keep their input only and run again in
            backward; the result is the same to the last bit.
        compile: every block is compiled by itself (torch.compile), once for each shape that it
            is given: the first steps take long.

    Raises:
        ValueError: if ``compile`` finds no compiler.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    for block in blocks:
        trains = any(p.requires_grad for p in block.parameters())
        block.recompute = activation_checkpointing and trains
    if all(p.device.type == "cpu" for p in network.parameters()):
        keep_memory()
    if compile and blocks:
        _check_compiler(next(network.parameters()).device)
        torch._dynamo.config.recompile_limit = 64  # all blocks are one code of many shapes
        torch._dynamo.config.optimize_ddp = False  # a block's gradients come as one anyway
        for block in blocks:
            block.compile(dynamic=False)
    return network


def keep_memory() -> None:
    """Makes freed memory stay with the process, for the next step.

    By default glibc gives every large array back when it is freed, and the next step gets it
    anew, page by page and zeroed: a gigabyte a step of ViT-S with two clips, a tenth of its time.
    Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # of mallopt (malloc.h)
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def _check_compiler(device: torch.device) -> None:
    """What torch.compile would otherwise say in the middle of the first step, at length."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise ValueError(
                "compile: true needs Triton on a GPU and finds none that works there: install "
                "PyTorch's CUDA build for Linux, or set compile to false"
            )
        if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")):
            raise ValueError(
                "compile: true needs a C compiler and finds none: install gcc, name yours in the "
                "environment variable CC, or set compile to false"
            )
        return
    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            "compile: true needs a C++ compiler and finds none: install g++, name yours in the "
            "environment variable CXX, or set compile to false"
        ) from error
