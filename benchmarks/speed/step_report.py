"""The tables of bench.json, as they stand in docs/performance.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from shared import busy_warning

GIB = 2**30


def tables(bench: dict[str, Any]) -> str:
    """Markdown: the machine, the ratios, the shares of the peak, the parts, the options."""
    lines = _machine(bench)
    for size, figures in bench["sizes"].items():
        lines += ["", f"### ViT-{size}, batch {bench['batch']}", "", *_ratios(figures)]
        for precision, parts in figures["parts"].items():
            lines += ["", *_parts(precision, parts)]
        if "options" in figures:
            lines += ["", *_options(figures)]
    return "\n".join(lines)


def option_tables(bench: dict[str, Any]) -> str:
    """Markdown: the machine, and the options of each size."""
    lines = _machine(bench)
    for size, figures in bench["sizes"].items():
        lines += ["", f"### Options of ViT-{size}, batch {bench['batch']}", "", *_options(figures)]
    return "\n".join(lines)


def _machine(bench: dict[str, Any]) -> list[str]:
    about, peaks = bench["machine"], bench["peaks"]
    where = about["gpu"] or f"{about['cpu']}{' with AMX' if about['amx'] else ''}"
    rates = [f"{precision} {rate / 1e9:,.0f} Gflop/s" for precision, rate in peaks.items()]
    lines = [
        f"{where}, {about['threads']} threads, PyTorch {about['torch']}, {bench['date']}; "
        f"{bench['repeats']} rounds. Best matrix product of the same run: {', '.join(rates)}."
    ]
    if bench["quick"]:
        lines.append("\n**--quick: tiny sizes. These figures mean nothing.**")
    return lines + busy_warning(about["busy_cores"])


def _times(value: float, bounds: list[float]) -> str:
    return f"{value:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"


def _ratios(figures: dict[str, Any]) -> list[str]:
    rows = ["| plain / ours | median [lowest, highest] |", "| --- | --- |"]
    for key, label in (
        ("ratio_fp32", "time, both fp32"),
        ("ratio_bf16", "time, both bf16"),
        ("ratio_plain_fp32_to_ours_bf16", "time, plain fp32 to ours bf16"),
    ):
        if key in figures:
            rows.append(f"| {label} | {_times(figures[key], figures[f'{key}_spread'])} |")
    memory = figures["memory_bytes"]
    for precision in figures["parts"]:
        ours, plain = (memory[f"{name}_{precision}"] / GIB for name in ("ours", "plain"))
        ratio = figures[f"memory_ratio_{precision}"]
        rows.append(
            f"| peak memory, {precision} | {ratio:.2f} ({plain:.2f} GiB to {ours:.2f} GiB) |"
        )
    rows += ["", "| ours | seconds a step | share of the matrix peak |"]
    rows.append("| --- | --- | --- |")
    for precision in figures["parts"]:
        spent = figures["seconds"][f"ours_{precision}"]
        seconds = f"{spent['median']:.2f} [{spent['lowest']:.2f}, {spent['highest']:.2f}]"
        share = 100 * figures[f"share_of_peak_{precision}"]
        low, high = (100 * x for x in figures[f"share_of_peak_{precision}_spread"])
        rows.append(f"| {precision} | {seconds} | {share:.0f} % [{low:.0f}, {high:.0f}] |")
    if "equal" in figures:
        equal = figures["equal"]
        rows += [
            "",
            f"The same step in both formulations (fp32): the loss differs by {equal['loss']:.1e}, "
            f"the gradients of {equal['parameters']} tensors by at most {equal['gradient']:.1e} "
            "of the tensor's norm.",
        ]
    return rows


def _parts(precision: str, parts: dict[str, Any]) -> list[str]:
    rows = [
        f"| part, {precision} | seconds | of the step | Gflop | of the peak |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, part in parts.items():
        counted = ["", ""]
        if "operations" in part:
            share = 100 * part["share_of_peak"]
            counted = [f"{part['operations'] / 1e9:.1f}", f"{share:.0f} %"]
        time = f"{part['seconds']:.3f} | {100 * part['share_of_step']:.0f} %"
        rows.append(f"| {name} | {time} | {' | '.join(counted)} |")
    return rows


def _options(figures: dict[str, Any]) -> list[str]:
    rows = [
        "| option | operations a clip | precision | seconds a clip, without | with "
        "| without / with | memory, without / with | first two steps, s |",
        f"| --- |{' --- |' * 7}",
    ]
    for name, option in figures["options"].items():
        for precision, memory in option["memory_bytes"].items():
            without, used = (s["median"] for s in option["seconds_per_clip"][precision])
            ratio = _times(option[f"ratio_{precision}"], option[f"ratio_{precision}_spread"])
            held = figures["memory_bytes"][f"ours_{precision}"] / memory
            first = " to ".join(f"{s:.1f}" for s in option["first_steps"][precision])
            rows.append(
                f"| {name} | {100 * option['operations']:.0f} % | {precision} | {without:.2f} "
                f"| {used:.2f} | {ratio} | {held:.2f} | {first} |"
            )
    return rows
