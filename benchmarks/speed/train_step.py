"""Compares our pretraining step with a plain formulation of it, and with the machine's peak.

    python benchmarks/speed/train_step.py            ViT-S and ViT-B, batch 2, fp32 and bf16
    python benchmarks/speed/train_step.py --sizes S --precisions bf16 --repeats 9
    python benchmarks/speed/train_step.py --device cuda --batch 48
    python benchmarks/speed/train_step.py --options image_frame_step=4 num_views=2,batch=2x compile
    python benchmarks/speed/train_step.py --quick             tiny sizes, seconds, to try it out

plain_step.py is the plain formulation and says what differs; operations.py counts the operations
that a step needs. Both formulations take turns in one process, and a ratio compares the steps of
one round. Their memory is measured in a process for each. The script writes OUT/bench.json and
prints its tables. --docs also puts them into docs/performance.md: all tables, or with --options
only those of the options. Measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import operations
import torch
from step_memory import KNOWN, memory_ratios, peak_of, settings_of
from step_parts import matrix_peak, time_parts
from step_report import option_tables, tables
from step_setup import SIZES, build, difference, now, step

from discovr_monai.base.files import save_atomic
from discovr_monai.training.trainer import DiscovrTrainer

sys.path.append(str(Path(__file__).parents[1]))
from shared import machine, write_between_markers

DOCS = Path(__file__).parents[2] / "docs" / "performance.md"
PRECISIONS = ("fp32", "bf16")
FORMULATIONS = ("ours", "plain")
Seconds = dict[str, list[float]]


def main() -> None:
    """Measures what the command line asks for."""
    options = parse()
    device = pick_device(options.device)
    file = Path(options.out) / "bench.json"
    bench: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "batch": options.batch,
        "repeats": options.repeats,
        "quick": options.quick,
        "sizes": {},
    }
    common = {"batch": options.batch, "quick": options.quick, "device": str(device)}
    for size in options.sizes:
        memory = memory_ratios(size, options.precisions, common)
        bench["peaks"] = peaks(options.precisions, device, options.quick, bench.get("peaks", {}))
        bench["sizes"][size] = measure(size, options, common, bench["peaks"]) | memory
        save(bench, file)
        for option in options.options:
            figures = bench["sizes"][size].setdefault("options", {})
            figures[option] = measure_option(size, option, options, common)
            save(bench, file)
    print(tables(bench))
    if options.docs and options.options:
        write_between_markers(DOCS, option_tables(bench), "speed/train_step.py --options")
    elif options.docs:
        write_between_markers(DOCS, tables(bench), "speed/train_step.py")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument("--batch", type=int, default=2, help="clips; 48 suits a large GPU")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--out", default="output/bench", help="folder for bench.json")
    parser.add_argument("--options", nargs="+", default=[], help=f"rows of our options: {KNOWN}")
    parser.add_argument("--docs", action="store_true", help="tables into docs/performance.md")
    options = parser.parse_args()
    if options.repeats < 1 or options.batch < 1:
        parser.error("--repeats and --batch must be at least 1")
    for option in options.options:
        try:
            settings_of(option)
        except ValueError as error:
            parser.error(str(error))
    return options


def pick_device(name: str) -> torch.device:
    """The device asked for; prints a line if "auto" finds no GPU."""
    if torch.cuda.is_available() and name != "cpu":
        return torch.device("cuda")
    if name == "cuda":
        raise SystemExit("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    if name == "auto":
        print("no CUDA GPU here: measured on the CPU")
    return torch.device("cpu")


def peaks(
    precisions: list[str], device: torch.device, quick: bool, before: dict[str, float]
) -> dict[str, float]:
    """Precision -> operations/s of the best matrix product that this run has seen."""
    return {p: max(matrix_peak(p, device, quick=quick), before.get(p, 0.0)) for p in precisions}


def measure(
    size: str, options: argparse.Namespace, common: dict[str, Any], peak: dict[str, float]
) -> dict[str, Any]:
    """Ratios, shares of the peak and parts of one model size."""
    trainers = {
        name: build(size, plain=name == "plain", precision=options.precisions[0], **common)
        for name in FORMULATIONS
    }
    figures: dict[str, Any] = {"seconds": {}}
    seconds: Seconds = {f"{n}_{p}": [] for p in options.precisions for n in FORMULATIONS}
    for number in range(options.repeats + 1):
        for precision in options.precisions:
            order = FORMULATIONS if number % 2 else FORMULATIONS[::-1]
            losses = {}
            for name in order:
                trainer, batch = trainers[name]
                trainer.precision = precision
                start = now(trainer.state.device)
                losses[name] = step(trainer, batch)["loss"]
                if number:  # the first round warms up
                    spent = now(trainer.state.device) - start
                    seconds[f"{name}_{precision}"].append(spent)
            if not number and precision == options.precisions[0] == "fp32":
                figures["equal"] = agreement(losses, *(trainers[n][0] for n in FORMULATIONS))
    for name, values in seconds.items():
        figures["seconds"][name] = spread(values)
    figures |= ratios(seconds)
    del trainers["plain"], trainer, batch
    gc.collect()
    figures["parts"] = {}
    for precision in options.precisions:
        trainer, batch = trainers["ours"]
        trainer.precision = precision
        figures |= shares(trainer, precision, options, seconds[f"ours_{precision}"], peak)
        figures["parts"][precision] = part_rows(
            trainer, batch, precision, options, peak, figures["seconds"][f"ours_{precision}"]
        )
    return figures


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def ratios(seconds: Seconds) -> dict[str, Any]:
    """Median and range of plain / ours over the rounds; above 1, ours is faster."""
    pairs = {
        "ratio_fp32": ("plain_fp32", "ours_fp32"),
        "ratio_bf16": ("plain_bf16", "ours_bf16"),
        "ratio_plain_fp32_to_ours_bf16": ("plain_fp32", "ours_bf16"),
    }
    figures: dict[str, Any] = {}
    for key, (plain, ours) in pairs.items():
        if plain in seconds and ours in seconds:
            values = [a / b for a, b in zip(seconds[plain], seconds[ours], strict=True)]
            figures[key] = statistics.median(values)
            figures[f"{key}_spread"] = [min(values), max(values)]
    return figures


def agreement(
    losses: dict[str, float], ours: DiscovrTrainer, plain: DiscovrTrainer
) -> dict[str, Any]:
    """How far loss and gradients of the first step differ; both started from the same weights."""
    gradients = difference(ours, plain)
    worst = max(gradients, key=lambda name: gradients[name])
    return {
        "loss": abs(losses["ours"] - losses["plain"]) / abs(losses["plain"]),
        "gradient": gradients[worst],
        "parameter": worst,
        "parameters": len(gradients),
    }


def count(trainer: DiscovrTrainer, batch: int) -> dict[str, float]:
    """Part -> operations of matrix products that a step of this trainer needs."""
    cluster = trainer.loss_function.terms["cluster"]
    network = trainer.network
    return operations.step(
        network,
        batch,
        trainer.masking.num_views,
        trainer.masking.ratio,
        cluster.iterations,  # type: ignore[arg-type]
        teacher_tokens=trainer.masking.teacher_tokens(network.video.student.num_tokens),
    )


def shares(
    trainer: DiscovrTrainer,
    precision: str,
    options: argparse.Namespace,
    seconds: list[float],
    peak: dict[str, float],
) -> dict[str, Any]:
    """The share of the matrix peak that the whole step reaches."""
    needed, best = sum(count(trainer, options.batch).values()), peak[precision]
    return {
        "operations": needed,
        f"share_of_peak_{precision}": needed / statistics.median(seconds) / best,
        f"share_of_peak_{precision}_spread": [
            needed / max(seconds) / best,
            needed / min(seconds) / best,
        ],
    }


def part_rows(
    trainer: DiscovrTrainer,
    batch: dict[str, Any],
    precision: str,
    options: argparse.Namespace,
    peak: dict[str, float],
    whole: dict[str, float],
) -> dict[str, dict[str, float]]:
    """Time of each part by itself; "the rest" is what the whole step takes beyond their sum."""
    needed = count(trainer, options.batch)
    rows = {}
    spent = time_parts(trainer, batch, max(2, options.repeats // 2))
    for name, seconds in spent.items():
        rows[name] = {"seconds": seconds, "share_of_step": seconds / whole["median"]}
        if name in needed:
            rate = needed[name] / seconds
            rows[name] |= {"operations": needed[name], "share_of_peak": rate / peak[precision]}
    rest = whole["median"] - sum(spent.values())
    rows["the rest"] = {"seconds": rest, "share_of_step": rest / whole["median"]}
    return rows


def measure_option(
    size: str, option: str, options: argparse.Namespace, common: dict[str, Any]
) -> dict[str, Any]:
    """Seconds a clip of our step without and with an option, which take turns, and its memory.

    "first_steps" are the seconds of the first two steps, which do not count otherwise. Compilation
    starts from an empty cache and falls into them.
    """
    from torch._inductor.utils import fresh_cache

    settings, times = settings_of(option)
    clips = common["batch"], common["batch"] * times
    pair = build(size, **common), build(size, **settings, **common | {"batch": clips[1]})
    needed = [
        sum(count(trainer, b).values()) / b for (trainer, _), b in zip(pair, clips, strict=True)
    ]
    figures: dict[str, Any] = {"operations": needed[1] / needed[0]}
    figures |= {"memory_bytes": {}, "seconds_per_clip": {}, "first_steps": {}}
    for precision in options.precisions:
        torch._dynamo.reset()  # an option before this one may have compiled the same
        with fresh_cache():
            seconds = turns(pair, precision, options.repeats + 2)
        figures["first_steps"][precision] = [sum(spent[:2]) for spent in seconds]
        rates = [[s / b for s in spent[2:]] for spent, b in zip(seconds, clips, strict=True)]
        figures["seconds_per_clip"][precision] = [spread(values) for values in rates]
        ratio = [a / b for a, b in zip(*rates, strict=True)]
        figures[f"ratio_{precision}"] = statistics.median(ratio)
        figures[f"ratio_{precision}_spread"] = [min(ratio), max(ratio)]
        job = {"size": size, "precision": precision, "option": option}
        figures["memory_bytes"][precision] = peak_of(job | common)
    return figures


def turns(pair: Sequence[tuple[DiscovrTrainer, Any]], precision: str, rounds: int) -> list:
    """Seconds of each round's step, for each of the two."""
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for (trainer, batch), spent in zip(pair, seconds, strict=True):
            trainer.precision = precision
            start = now(trainer.state.device)
            step(trainer, batch)
            spent.append(now(trainer.state.device) - start)
    return seconds


def save(bench: dict[str, Any], file: Path) -> None:
    """Writes what has been measured so far."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_atomic(lambda path: Path(path).write_text(json.dumps(bench, indent=1)), file)


if __name__ == "__main__":
    main()
