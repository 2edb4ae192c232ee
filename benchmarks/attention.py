"""torch's fused attention in bf16 on this CPU, against a pass in fp32 and the formula written out.

    python benchmarks/attention.py

Prints the time ratios fused bf16 / fused fp32 (with the casts) and fused bf16 / written out,
forward and with gradient, for the shapes of the demo preset and of ViT-S; alternated in one run,
medians. Above 1: the other is faster. networks/vit.py's ``attend`` chooses by them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {  # (batch, heads, tokens, width of a head)
    "demo, video students": (80, 4, 49, 32),
    "demo, video teacher": (16, 4, 513, 32),
    "demo, image students": (512, 4, 7, 32),
    "demo, image teacher": (128, 4, 65, 32),
    "ViT-S, video students": (10, 6, 161, 64),
    "ViT-S, image students": (512, 6, 6, 64),
    "ViT-S, image teacher": (128, 6, 50, 64),
    "ViT-S, video teacher": (2, 6, 1569, 64),
}
ROUNDS = 15


Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fused, between casts."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


def seconds(shape: tuple[int, ...], gradient: bool, way: Way) -> float:
    """One pass."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=gradient) for _ in range(3))
    start = time.perf_counter()
    out = way(q, k, v)
    if gradient:
        out.sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Prints one line for each shape."""
    ways: tuple[Way, ...] = (F.scaled_dot_product_attention, in_fp32, written_out)
    for name, shape in SHAPES.items():
        words = []
        for gradient in (False, True):
            rounds = [[seconds(shape, gradient, way) for way in ways] for _ in range(ROUNDS)][3:]
            fp32, out = (statistics.median(r[0] / r[i] for r in rounds) for i in (1, 2))
            how = "with gradient" if gradient else "forward"
            words.append(f"{how} {fp32:.2f} (fp32), {out:.2f} (written out)")
        print(f"{name}: {'; '.join(words)}")


if __name__ == "__main__":
    main()
