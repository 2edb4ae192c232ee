"""The methods under one protocol: pretrain each, evaluate each, write docs/results.md.

    python benchmarks/compare/compare_methods.py run [--jobs 2]   hours; goes on where it stopped
    python benchmarks/compare/compare_methods.py run --quick      a size that ends within an hour
    python benchmarks/compare/compare_methods.py report           docs/results.md from the JSONs
    python benchmarks/compare/compare_methods.py run --protocol benchmarks/compare/options.yaml
                                      our options instead; a table in docs/performance.md

Data, sizes, seeds and settings are in protocol.yaml, which is written before any result is seen.
Each finished (method, seed) leaves results/SIZE/METHOD-SEED.json in this folder (of another
protocol, results/ITS NAME/...). What exists for the same protocol is not done again, and an
interrupted pretraining resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from comparison_report import options_tables, write_report
from comparison_results import BUNDLE, HERE, PROTOCOL, ROOT, digest, protocol, results_of

sys.path.append(str(Path(__file__).parents[1]))
from shared import write_between_markers

KEPT = {  # task -> the method and columns of each test cine's prediction that a JSON keeps
    "knn": ("k=10", ("truth", "score_1")),
    "linear_probe": ("logistic", ("truth", "score_1")),
    "lvef": ("ridge", ("truth", "predicted")),
    "anomaly": ("5 nearest", ("truth", "score")),
    "segmentation": ("linear head", ("dice_ED", "dice_ES", "dice_all")),
}


def make_data(plan: dict[str, Any], folder: Path) -> None:
    """Phantoms of every part and one datalist over them; patients of different parts differ."""
    from discovr_monai.phantom.dataset import write_phantom_dataset

    sections: dict[str, list] = {}
    for part, settings in plan["data"].items():
        settings = dict(settings)
        split = settings.pop("sections")
        write_phantom_dataset(folder / part, num_clips=settings.pop("clips"), **settings)
        datalist = json.loads((folder / part / "datalist.json").read_text())
        for section, sources in split.items():
            for row in (r for s in sources for r in datalist[s]):
                place = {k: f"{part}/{row[k]}" for k in ("image", "mask")}
                sections.setdefault(section, []).append(
                    {**row, **place, "patient": f"{part}-{row['patient']}"}
                )
    (folder / "datalist.json").write_text(json.dumps(sections))


def run_measured(command: list[str], log: Path) -> tuple[float, float]:
    """Runs a command; returns wall seconds and peak memory in GiB.

    Raises:
        RuntimeError: if it failed.
    """
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "DISCOVR_MONAI_SALT": "benchmark"}
    start = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        process = os.posix_spawn(
            command[0],
            command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, out.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, out.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"failed, see {log.name}: {' '.join(command[1:6])} ...")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def pretrain(name: str, seed: int, plan: dict[str, Any], work: Path, out: Path) -> dict[str, float]:
    """The bundle's own training command; an untrained network for ``train: false``."""
    method = plan["methods"][name]
    done = out / "trained.json"
    if done.exists():
        return json.loads(done.read_text())
    configs = ["train.yaml", *([method["config"]] if "config" in method else [])]
    settings = {
        **plan["settings"],
        **method.get("overrides", {}),
        "epochs": plan["size"]["epochs"],
        "seed": seed,
        "dataset_dir": str((work / "data").resolve()),
        "output_dir": str(out.resolve()),
        "cache_dir": str((work / "cache").resolve()),
    }
    if not method.get("train", True):
        from untrained import write_untrained

        write_untrained(out / "last.pt", settings)
        cost = {"pretraining_seconds": 0.0, "pretraining_gib": 0.0}
    else:
        from discovr_monai.configuration import MOVED

        out.mkdir(parents=True, exist_ok=True)
        overlay = out / "settings.yaml"
        overlay.write_text(yaml.safe_dump({MOVED.get(k, k): v for k, v in settings.items()}))
        files = [*(str((BUNDLE / "configs" / c).resolve()) for c in configs), str(overlay)]
        command = [sys.executable, "-m", "monai.bundle", "run", "training"]
        command += ["--config_file", str(files), "--bundle_root", str(BUNDLE.resolve())]
        seconds, memory = run_measured(command, out / "train.log")
        cost = {"pretraining_seconds": round(seconds, 1), "pretraining_gib": round(memory, 2)}
    done.write_text(json.dumps(cost))
    return cost


def evaluate(
    ckpt: Path, method: dict[str, Any], plan: dict[str, Any], work: Path, out: Path
) -> dict:
    """The five tasks of a checkpoint: figures, each test cine's prediction, and its patient.

    A task that was evaluated with the same settings before is not evaluated again.
    """
    from monai.bundle import ConfigParser
    from monai.utils import set_determinism

    by_task = {}
    branch, other = method.get("branch", "video_teacher"), method.get("evaluation", {})
    for task, settings in plan["evaluation"]["tasks"].items():
        settings = {**settings, **{k: v for k, v in other.items() if k in settings}}
        key = digest({**plan["evaluation"]["common"], **settings, "training": plan["training"]})
        kept = out / f"{task}-{key}.json"
        if kept.exists():
            by_task[task] = json.loads(kept.read_text())
            continue
        parser = ConfigParser()
        parser.read_config(str(BUNDLE / "configs" / f"{task}.yaml"))
        overrides = {
            **plan["evaluation"]["common"],
            **settings,
            "bundle_root": str(BUNDLE),
            "ckpt": str(ckpt),
            "branch": branch,
            "dataset_dir": str(work / "data"),
            "output_dir": str(out / task),
            "cache_dir": str(work / "cache"),
            "mlflow": False,
        }
        if task != "segmentation":
            overrides["features_file"] = str(out / f"{branch}.npz")
        for key, value in overrides.items():
            parser[key] = value
        set_determinism(0)
        content = parser.get_parsed_content("evaluation").run()
        predictions = parser.get_parsed_content("results").predictions
        by_task[task] = {"results": content["results"], "predictions": _columns(task, predictions)}
        kept.write_text(json.dumps(by_task[task]))
    data = _rows(work)
    sections = plan["evaluation"]["common"]["test_sections"]
    return {"tasks": by_task, "patients": {s: _owners(data[s]) for s in sections}}


def _rows(work: Path) -> dict[str, list]:
    return json.loads((work / "data" / "datalist.json").read_text())


def _owners(rows: list) -> list[int]:
    """A number for each row's patient."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(r["patient"], len(numbers)) for r in rows]


def _columns(task: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, list]]:
    """What the report needs, by "section, method": column -> values, in the datalist's order."""
    wanted, columns = KEPT[task]
    out: dict[str, dict[str, list]] = {}
    for row in rows:
        if row["method"] == wanted:
            kept = out.setdefault(f"{row['section']}, {row['method']}", {c: [] for c in columns})
            for key in columns:
                value = row[key]
                kept[key].append(float(f"{value:.4g}") if isinstance(value, float) else value)
    return out


def finished(name: str, seed: int, plan: dict[str, Any]) -> bool:
    """Whether a method's seed has its JSON of this protocol."""
    target = results_of(name, plan) / f"{name}-{seed}.json"
    return target.exists() and json.loads(target.read_text())["protocol"] == plan["key"]


def open_groups(plan: dict[str, Any], only: list[str] | None) -> list[tuple[str, int]]:
    """(checkpoint, seed) of what is not done, the first seed of every method first."""
    jobs: dict[tuple[int, str, int], None] = {}
    seeds = plan["size"]["seeds"]
    for name, method in plan["methods"].items():
        for number, seed in enumerate(method.get("seeds", seeds)[: len(seeds)]):
            if (only is None or name in only) and not finished(name, seed, plan):
                jobs[number, method.get("checkpoint", name), seed] = None
    return [(source, seed) for _, source, seed in sorted(jobs, key=lambda job: job[0])]


def run_group(size: str, plan: dict[str, Any], work: Path, source: str, seed: int) -> None:
    """Pretrains one checkpoint and evaluates every method that looks at it."""
    import torch

    os.environ["DISCOVR_MONAI_SALT"] = "benchmark"
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    folder = work / f"{size}-{plan['training']}" / f"{source}-{seed}"
    print(f"== {source}, seed {seed}: pretraining", flush=True)
    cost = pretrain(source, seed, plan, work, folder)
    for name, method in plan["methods"].items():
        wanted = seed in method.get("seeds", plan["size"]["seeds"])
        same = method.get("checkpoint", name) == source
        if not (same and wanted) or finished(name, seed, plan):
            continue
        print(f"== {name}, seed {seed}: evaluation", flush=True)
        start = time.perf_counter()
        branch = method.get("branch", "video_teacher")
        evaluated = evaluate(folder / "last.pt", method, plan, work, folder / f"eval-{branch}")
        content = {
            "method": name,
            "seed": seed,
            "protocol": plan["key"],
            **(cost if source == name else {}),
            "threads": torch.get_num_threads(),
            "evaluation_seconds": round(time.perf_counter() - start, 1),
            **evaluated,
        }
        target = results_of(name, plan) / f"{name}-{seed}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content))
        print(f"== {name}, seed {seed}: done", flush=True)


def run(size: str, file: Path, work: Path, only: list[str] | None, jobs: int) -> None:
    """Everything that is not done yet; with several jobs, each on its share of the cores."""
    plan = protocol(size, file)
    if not (work / "data" / "datalist.json").exists():
        make_data(plan, work / "data")
    groups = open_groups(plan, only)
    if jobs == 1:
        for source, seed in groups:
            run_group(size, plan, work, source, seed)
        return
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}

    def one(group: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "group", group[0], str(group[1])]
        command += ["--work", str(work), "--protocol", str(file)]
        command += ["--quick"] if size == "quick" else []
        return subprocess.run(command, env=environment).returncode

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(one, groups))
    failed = [f"{s}-{n}" for (s, n), code in zip(groups, codes, strict=True) if code]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see train.log in their folders")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "report", "group"))
    parser.add_argument("group", nargs="*", help=argparse.SUPPRESS)  # checkpoint and seed
    parser.add_argument("--quick", action="store_true", help="the small size, for a look")
    parser.add_argument("--protocol", type=Path, default=PROTOCOL, help="another file")
    parser.add_argument("--work", type=Path, help="default: output/compare, or output/PROTOCOL")
    parser.add_argument("--only", nargs="+", help="these methods")
    parser.add_argument("--jobs", type=int, default=1, help="at once, sharing the cores")
    options = parser.parse_args()
    size, file = "quick" if options.quick else "recorded", options.protocol.resolve()
    plan, main_one = protocol(size, file), file == PROTOCOL
    work = (options.work or Path("output") / ("compare" if main_one else file.stem)).resolve()
    if options.what == "group":
        run_group(size, plan, work, options.group[0], int(options.group[1]))
        return
    if options.what == "run":
        run(size, file, work, options.only, options.jobs)
    docs = ROOT / "docs"
    if main_one:
        write_report(plan, plan["results"], docs)
        return
    tables = options_tables(plan)
    print(tables)
    if size == "recorded":
        write_between_markers(docs / "performance.md", tables, "compare/compare_methods.py")


if __name__ == "__main__":
    main()
