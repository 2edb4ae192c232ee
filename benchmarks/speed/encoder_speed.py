"""Inference's encoder against the plain formulation of the same network, alternated.

    python benchmarks/speed/encoder_speed.py [--sizes S B] [--batch 4] [--rounds 5] [--docs]

Whole clips of the paper's size (64 x 112 x 112, 1568 tokens), no gradient. The plain one differs in
its attention only: softmax weights written out (plain_step.py). Prints clips/s, the
ratios, and our share of the best matrix product seen in the same run; --docs puts the table into
docs/inference.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from operations import encoder as operations_of
from plain_step import plain_encoder
from step_parts import matrix_peak

from discovr_monai.networks.vit import VisionTransformer

sys.path.append(str(Path(__file__).parents[1]))
from shared import write_between_markers

SIZES = {"S": (384, 6), "B": (768, 12)}
PAGE = Path(__file__).parents[2] / "docs" / "inference.md"


@torch.inference_mode()
def seconds(run: Callable[[torch.Tensor], torch.Tensor], clip: torch.Tensor, bf16: bool) -> float:
    """Of one forward pass."""
    device = clip.device.type
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        run(clip)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(size: str, batch: int, rounds: int, device: torch.device, quick: bool) -> list[str]:
    """Table rows of one size: every way once a round, in turn."""
    width, heads = SIZES[size]
    shape = {"num_frames": 8, "image_size": 32} if quick else {}
    torch.manual_seed(0)
    network = VisionTransformer(embed_dim=width, num_heads=heads, depth=2 if quick else 12, **shape)
    network = network.to(device).eval()
    clip = torch.randn(batch, *network.clip_shape, device=device)
    with torch.inference_mode():
        apart = (network(clip[:1]) - plain_encoder(network, clip[:1])).abs().max().item()
    assert apart < 1e-4, apart
    ways = {
        "plain fp32": (lambda x: plain_encoder(network, x), False),
        "ours fp32": (network, False),
        "plain bf16": (lambda x: plain_encoder(network, x), True),
        "ours bf16": (network, True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (run, bf16) in ways.items():
            took = seconds(run, clip, bf16)
            if number:  # the first round warms up
                times[name].append(took)
    flops = operations_of(network, batch, network.num_tokens, train=False)
    rows = []
    for name in ways:
        precision = name.split()[1]
        ratio = [p / o for p, o in zip(times["plain fp32"], times[name], strict=True)]
        median = statistics.median(times[name])
        share = flops / median / matrix_peak(precision, device, quick=quick)
        rows.append(
            f"| ViT-{size} | {name} | {batch / median:.2f} | {statistics.median(ratio):.2f} "
            f"[{min(ratio):.2f}, {max(ratio):.2f}] | {100 * share:.0f} % |"
        )
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny, to try it out")
    parser.add_argument(
        "--docs", action="store_true", help="write the table into docs/inference.md"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines = [
        f"{what}, {torch.get_num_threads()} threads, batch {options.batch}, torch "
        f"{torch.__version__}, {time.strftime('%Y-%m-%d')}; ratio: plain fp32 / this, "
        f"median [lowest, highest] of {options.rounds} rounds.",
        "",
        "| encoder | formulation | clips/s | ratio | of the matrix peak |",
        "| --- | --- | --- | --- | --- |",
    ]
    for size in options.sizes:
        lines += measure(size, options.batch, options.rounds, device, options.quick)
    text = "\n".join(lines)
    print(text)
    if options.docs:
        write_between_markers(PAGE, text, "speed/encoder_speed.py")


if __name__ == "__main__":
    main()
