"""What makes a step smaller or faster and leaves its result as it is."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from typing import TypeVar

import torch
from torch import nn

from discovr_monai.networks.vit import Block

Network = TypeVar("Network", bound=nn.Module)


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
