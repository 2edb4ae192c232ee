"""What many GPUs cost, from shapes and stated speeds alone: communication, memory, efficiency.

python benchmarks/speed/scaling.py                  prints the tables
python benchmarks/speed/scaling.py --docs           puts them into docs/scaling.md
python benchmarks/speed/scaling.py --batch 16 --utilisation 0.2 --gpus 4 32

Nothing is measured: benchmarks/speed/scaling_model.py says what is counted, and how.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from monai.bundle import ConfigParser
from scaling_model import (
    FABRICS,
    FLOAT,
    LAUNCH,
    NODE,
    REACHED,
    SIZES,
    Compute,
    collectives,
    compute,
    configuration,
    efficiency,
    memory,
    ring,
    shapes,
    trained,
    waiting,
)

from discovr_monai.data.clips.dataset import SharedBatches
from discovr_monai.networks.discovr import Discovr

sys.path.append(str(Path(__file__).parents[1]))
from shared import write_between_markers

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
ACCUMULATED = 16  # batches of a step, in the efficiencies' last column
EPOCH = 20  # steps
DISK = 1e9  # B/s of one process that writes a checkpoint
LOADED = 503  # clips/s of one loading process with the paper's crop (docs/data.md, measured)
ECHONET = 7465  # training clips of EchoNet-Dynamic


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def amount(size: float) -> str:
    """12 kB, 903 MB, 1.6 GB."""
    steps = 0
    while size >= 999.5:
        size, steps = size / 1000, steps + 1
    digits = 1 if steps and size < 10 else 0
    return f"{size:.{digits}f} {('', 'k', 'M', 'G', 'T')[steps]}B"


def exchanges(parser: ConfigParser, network: Discovr, work: Compute, gpus: list[int]) -> str:
    """Each kind of exchange: calls, bytes, and the milliseconds that it adds."""
    all_of, fabric = collectives(parser, network), FABRICS[0]
    added = [waiting(all_of, work, fabric, n) for n in gpus]
    rows = []
    for one in all_of:
        ms = [f"{1000 * seconds[one.name]:.2f}" for seconds in added]
        hidden = "behind backward" if one.hidden else "no"
        rows.append([one.name, str(one.calls), amount(one.size), hidden, *ms])
    calls = sum(one.calls for one in all_of)
    size = amount(sum(one.calls * one.size for one in all_of))
    ms = [f"**{1000 * sum(seconds.values()):.2f}**" for seconds in added]
    rows.append(["**all**", f"**{calls}**", f"**{size} in all**", "", *ms])
    return table(["exchange", "calls", "each", "hidden", *(f"ms on {n} GPUs" for n in gpus)], rows)


def efficiencies(batch: int, speed: float, gpus: list[int]) -> str:
    """Sizes of network against numbers of GPUs, fabrics and accumulated batches."""
    inside = [(FABRICS[0], n, 1) for n in gpus if n <= NODE]
    across = [(f, n, 1) for f in FABRICS for n in gpus if n > NODE]
    cases = [*inside, *across, *((f, n, ACCUMULATED) for f, n, _ in across[-1:])]
    rows = []
    for name in SIZES:
        parser = configuration(name)
        network = shapes(parser)
        all_of, work = collectives(parser, network), compute(parser, network, batch, speed)
        shares = [f"{100 * efficiency(all_of, work, *case):.1f}" for case in cases]
        gradients = amount(ring(FLOAT * trained(network), gpus[-1]))
        learn = f"{trained(network) / 1e6:.0f} M"
        rows.append([name, learn, gradients, f"{work.step:.2f} s", *shares])
    names = [f"{n} GPUs, {'NVLink' if n <= NODE else f.name}" for f, n, _ in cases]
    if across:
        names[-1] += f", {ACCUMULATED} batches a step"
    sent = f"gradients sent, {gpus[-1]} GPUs"
    return table(["network", "trained", sent, "computation", *names], rows)


def memories(gpus: int = NODE) -> str:
    """States of a step on each GPU."""
    rows = []
    for name in SIZES:
        network = shapes(configuration(name))
        for sharded in (False, True):
            kept = memory(network, gpus, sharded=sharded)
            parts = (kept.parameters, kept.teachers, kept.gradients, kept.moments, kept.whole)
            scheme = "in shards" if sharded else "DDP"
            figures = [f"{part / 1e9:.2f}" for part in parts]
            rows.append([f"{name}, {scheme}", *figures, f"**{kept.total / 1e9:.2f}**"])
    head = ["GB on each GPU", "students", "teachers", "gradients", "AdamW", "whole for a time"]
    return table([*head, "together"], rows)


def validation(parser: ConfigParser, work: Compute, batch: int, gpus: int) -> float:
    """Time for validation / time for training, epochs of EPOCH steps.

    Every GPU takes what is left of the held-out clips after whole global batches.
    """
    share = parser["data#val_fraction"]
    held = round(EPOCH * batch * gpus * share / (1 - share))
    batches = len(SharedBatches(held, batch, world_size=gpus))
    return batches * work.forward / (parser["val_interval"] * EPOCH * work.step)


def saved(network: Discovr) -> int:
    """Bytes of a checkpoint: all parameters, and two moments of the trained ones."""
    return FLOAT * (sum(p.numel() for p in network.parameters()) + 2 * trained(network))


def scores(parser: ConfigParser, network: Discovr, clips: int) -> int:
    """Bytes of so many clips' scores, one side, as Sinkhorn holds them."""
    return FLOAT * clips * network.video.student.num_tokens * parser["num_prototypes"]


def growth(
    parser: ConfigParser, network: Discovr, work: Compute, batch: int, gpus: list[int]
) -> str:
    """What changes with the number of GPUs besides the exchanges."""
    clips = [batch * n for n in gpus]
    rate = [n / work.step for n in clips]
    per_gpu = batch / work.step
    rows = {
        "clips in a step": [f"{n:,}" for n in clips],
        "learning rate by the rule": [
            f"{parser['lr'] * n / parser['lr_batch']:.2g}" for n in clips
        ],
        "steps in an epoch of EchoNet-Dynamic": [str(ECHONET // n) for n in clips],
        f"clips for epochs of {EPOCH} steps": [f"{EPOCH * n:,}" for n in clips],
        "validation / training time of these": [
            f"{100 * validation(parser, work, batch, n):.0f} %" for n in gpus
        ],
        "checkpoints / training time of these": [
            f"{100 * saved(network) / DISK / (EPOCH * work.step):.0f} %" for _ in gpus
        ],
        "clips read per second": [f"{n:,.0f}" for n in rate],
        "pixels read per second": [
            amount(n * math.prod(network.video.student.clip_shape[1:])) for n in rate
        ],
        "loading processes per GPU": [f"{per_gpu / LOADED:.1f}" for _ in gpus],
        "Sinkhorn's matrix of a side, ours": [amount(scores(parser, network, batch)) for _ in gpus],
        "the same if scores were gathered": [amount(scores(parser, network, n)) for n in clips],
    }
    lines = [[name, *figures] for name, figures in rows.items()]
    return table(["ViT-B", *(f"{n} GPUs" for n in gpus)], lines)


def stated(batch: int, peak: float, utilisation: float) -> str:
    """What the tables rest on."""
    lines = [
        f"Stated, not measured: {batch} clips per GPU; {peak / 1e12:.0f} TFLOP/s (bf16, dense), "
        f"{100 * utilisation:.0f} % of it used; nodes of {NODE} GPUs; {100 * REACHED:.0f} % of "
        f"each bandwidth reached; {1e6 * LAUNCH:.0f} us to start a collective."
    ]
    for f in FABRICS:
        lines.append(
            f"{f.name}: {f.between / 1e9:g} GB/s out of a node, {1e6 * f.between_hop:.0f} us a "
            f"hop; in the node NVLink, {f.inside / 1e9:.0f} GB/s, {1e6 * f.inside_hop:.0f} us."
        )
    lines.append(f"Checkpoints are written at {DISK / 1e9:.0f} GB/s.")
    return "\n".join(lines)


def report(batch: int, peak: float, utilisation: float, gpus: list[int]) -> str:
    """All tables, for the page."""
    parser = configuration("ViT-B")
    network, speed = shapes(parser), peak * utilisation
    work = compute(parser, network, batch, speed)
    parts = [
        stated(batch, peak, utilisation),
        f"**Exchanges of one step**, ViT-B, {FABRICS[0].name}.",
        exchanges(parser, network, work, gpus),
        "**Efficiency in per cent**: computation / (computation + waiting for exchanges).",
        efficiencies(batch, speed, gpus),
        "**What else grows.**",
        growth(parser, network, work, batch, gpus),
        f"**States of a step**, {NODE} GPUs, without activations.",
        memories(),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Prints, and with --docs writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=48, help="clips per GPU")
    parser.add_argument("--peak", type=float, default=990, help="TFLOP/s of a GPU")
    parser.add_argument("--utilisation", type=float, default=0.45, help="share of it, 0 to 1")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--docs", action="store_true", help="write them into docs/scaling.md")
    options = parser.parse_args()
    if options.batch < 1 or options.peak <= 0 or not 0 < options.utilisation <= 1:
        parser.error("--batch from 1, --peak above 0, --utilisation in (0, 1]")
    if min(options.gpus) < 1:
        parser.error(f"--gpus {min(options.gpus)}: from 1")
    text = report(options.batch, 1e12 * options.peak, options.utilisation, sorted(options.gpus))
    print(text)
    if options.docs:
        write_between_markers(PAGE, text, "speed/scaling.py")


if __name__ == "__main__":
    main()
