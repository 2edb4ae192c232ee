"""torch's fused attention on this CPU: bf16 inputs as they are, against a pass in fp32.

    python benchmarks/attention.py

Prints the time ratio bf16 / fp32 (with the casts), forward and with gradient, for the shapes of
the demo preset and of ViT-S; alternated in one run, medians. Above 1: fp32 is faster.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

SHAPES = {  # (batch, heads, tokens, width of a head)
    "demo, video students": (80, 4, 49, 32),
    "demo, video teacher": (16, 4, 513, 32),
    "demo, image students": (512, 4, 7, 32),
    "demo, image teacher": (128, 4, 65, 32),
    "ViT-S, video students": (10, 6, 161, 64),
    "ViT-S, video teacher": (2, 6, 1569, 64),
}
ROUNDS = 15


def seconds(shape: tuple[int, ...], gradient: bool, fp32: bool) -> float:
    """One pass."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=gradient) for _ in range(3))
    start = time.perf_counter()
    if fp32:
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    if gradient:
        out.sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Prints one line for each shape."""
    for name, shape in SHAPES.items():
        ratios = []
        for gradient in (False, True):
            pairs = [
                (seconds(shape, gradient, False), seconds(shape, gradient, True))
                for _ in range(ROUNDS)
            ]
            ratios.append(statistics.median(a / b for a, b in pairs[3:]))
        print(f"{name}: bf16 / fp32 forward {ratios[0]:.2f}, with gradient {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
