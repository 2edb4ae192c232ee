"""Does the small-scale training collapse? Variants of the demo preset under one protocol.

    python benchmarks/compare/collapse.py --data FOLDER [--epochs 40] [--variants NAME ...]

Each variant is a run of the bundle's own training command; printed are the teachers' entropies
and information at the end (nats; see training/diagnostics.py), the effective rank, the share of
prototypes used, and how well frozen features tell EF: ridge on the training section's cines,
R2 on the test section's, with a 95 % bootstrap interval over patients (1000 draws), beside the
same probe on the untrained network. Seeds and protocol are fixed; nothing is picked.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from discovr_monai.data.clips.dataset import ClipDataset
from discovr_monai.weights.files import read_checkpoint

BUNDLE = Path(__file__).parents[2] / "bundles" / "discovr"
NO_NORM = ["--video_head_def#norm", "none"]
SINKHORN = ["--loss#terms#video#centring", "sinkhorn"]
START, END = (f"--teacher_temperature_schedule#{end}" for end in ("start", "end"))
VARIANTS = {  # of the demo preset, whose head has a batch norm
    "paper_head": NO_NORM,
    "sinkhorn": [*NO_NORM, *SINKHORN],
    "batch_and_sinkhorn": SINKHORN,
    "batch_and_centre": [START, "0.04", END, "0.07"],
    "sharp": [START, "0.03"],
    "sharp_sinkhorn": [*SINKHORN, START, "0.03"],
}
FIGURES = (
    "video_entropy", "image_entropy", "video_information", "image_information",
    "video_effective_rank", "prototypes_used_target", "video", "image", "cluster",
)  # fmt: skip


def train(name: str, data: Path, out: Path, epochs: int) -> float:
    """Runs the bundle's command; returns seconds."""
    command = [
        sys.executable, "-m", "monai.bundle", "run", "training",
        "--config_file", "configs/train.yaml", "--dataset_dir", str(data.resolve()),
        "--output_dir", str(out.resolve()), "--epochs", str(epochs), "--resume", "never",
        "--train#handlers#4#every", "0", *VARIANTS[name],
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(
        command, cwd=BUNDLE, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def last_figures(out: Path) -> dict[str, float]:
    """Mean of the last five records of each figure."""
    figures = {}
    with sqlite3.connect(out / "mlruns.db") as store:
        for key in FIGURES:
            query = "select value from metrics where key = ? order by step desc limit 5"
            values = [v for (v,) in store.execute(query, (key,))]
            figures[key] = float(np.mean(values)) if values else float("nan")
    return figures


@torch.no_grad()
def features(network: torch.nn.Module, parser: ConfigParser, rows: list) -> dict[str, np.ndarray]:
    """Teacher features of the centre clips: {"cls": (M, d), "mean": (M, d)}."""
    transform = parser.get_parsed_content("validate::preprocessing")
    prepare = parser.get_parsed_content("prepare_batch")
    loader = torch.utils.data.DataLoader(ClipDataset(rows, transform), batch_size=16)
    network.eval()
    tokens = [network.video.teacher(prepare(batch)) for batch in loader]
    return {
        "cls": torch.cat([t[:, 0] for t in tokens]).numpy(),
        "mean": torch.cat([t[:, 1:].mean(1) for t in tokens]).numpy(),
    }


def probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test: list) -> str:
    """R2 and its interval."""
    scaler = StandardScaler().fit(train_x)
    model = RidgeCV(np.logspace(0, 5, 21)).fit(scaler.transform(train_x), train_y)
    predicted = model.predict(scaler.transform(test_x))
    truth = np.array([r["ef"] for r in test])
    patients = sorted({r["patient"] for r in test})
    of = {p: [i for i, r in enumerate(test) if r["patient"] == p] for p in patients}
    random = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        pick = [i for p in random.choice(patients, len(patients)) for i in of[p]]
        draws.append(r2_score(truth[pick], predicted[pick]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{r2_score(truth, predicted):+.2f} [{low:+.2f}, {high:+.2f}]"


def parse(data: Path, out: Path, name: str) -> ConfigParser:
    """The configuration of a variant, to build its network and transforms."""
    parser = ConfigParser()
    parser.read_config(BUNDLE / "configs" / "train.yaml")
    settings = VARIANTS[name]
    overrides = dict(zip(settings[::2], settings[1::2], strict=True))
    for key, value in overrides.items():
        parser[key.removeprefix("--")] = json.loads(value) if value[0] in "[0123456789" else value
    parser["dataset_dir"], parser["output_dir"] = str(data), str(out)
    parser["bundle_root"], parser["device"] = str(BUNDLE), "$torch.device('cpu')"
    return parser


def evaluate(network: torch.nn.Module, parser: ConfigParser, sections: dict) -> str:
    """Probe results of CLS and mean tokens."""
    pooled = {s: features(network, parser, sections[s]) for s in ("training", "test")}
    ef = np.array([r["ef"] for r in sections["training"]])
    parts = [
        f"{pool} {probe(pooled['training'][pool], ef, pooled['test'][pool], sections['test'])}"
        for pool in ("cls", "mean")
    ]
    return "R2 of EF: " + ", ".join(parts)


def main() -> None:
    """Runs the variants and prints one block each."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="a phantom data set")
    arguments.add_argument("--out", type=Path, default=Path("output/collapse"))
    arguments.add_argument("--epochs", type=int, default=40)
    arguments.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    options = arguments.parse_args()
    sections = json.loads((options.data / "datalist.json").read_text())
    for name in options.variants:
        out = options.out / name
        parser = parse(options.data, out, name)
        torch.manual_seed(0)
        network = parser.get_parsed_content("network_def")
        if name == options.variants[0]:
            print("untrained:", evaluate(network, parser, sections), flush=True)
        seconds = train(name, options.data, out, options.epochs)
        network.load_state_dict(read_checkpoint(out / "last.pt")["network"])
        print(f"\n{name} ({seconds:.0f} s):", evaluate(network, parser, sections))
        print("  ", ", ".join(f"{k} {v:.3f}" for k, v in last_figures(out).items()), flush=True)


if __name__ == "__main__":
    main()
