"""Where the information is: frozen features of one checkpoint, pooled in other ways.

    python benchmarks/compare/pooling.py CHECKPOINT ... --data output/compare/data --cache DIR

Validation section only (the test sections stay unseen): EF R2 by ridge, AUROC of normal against
abnormal by logistic regression, both with settings chosen by cross-validation on the training
section. Rows: CLS and mean, the token grid averaged over time, the grid's
deviation over time, and both; grids are reduced to 256 principal components.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from discovr_monai import LoadCined, SampleClipd
from discovr_monai.data.read.store import CineStore
from discovr_monai.evaluation.features.encoders import EvaluatedEncoder


@torch.no_grad()
def features(ckpt: Path, branch: str, loader: LoadCined, rows: list[dict]) -> dict[str, np.ndarray]:
    """Name of a pooling -> (M, D)."""
    encoder = EvaluatedEncoder(ckpt, branch)
    sample = SampleClipd(num_frames=encoder.num_frames, num_clips=2, stride=encoder.clip["stride"])
    vectors: dict[str, list[np.ndarray]] = {}
    for row in tqdm(rows, desc=f"{ckpt.parent.name} {branch}", unit="cine"):
        clips = sample(loader(dict(row)))["image"]
        ready = encoder.prepare({"image": clips}, encoder.device)
        pooled = encoder.module.embed(ready)
        tokens = encoder.module.tokens(ready).float()  # (n, t, h, w, d)
        both = torch.cat([pooled["cls"], pooled["mean"]], 1).mean(0)
        still, moving = tokens.mean((0, 1)), tokens.std(1).mean(0)  # (h, w, d)
        for name, value in (
            ("CLS and mean", both),
            ("grid", still.flatten()),
            ("grid's deviation over time", moving.flatten()),
            ("mean of the deviation over time", moving.mean((0, 1))),
            ("motion (the deviation on 4 x 4 places)", pooled["motion"].mean(0)),
        ):
            vectors.setdefault(name, []).append(value.numpy())
    return {name: np.stack(values) for name, values in vectors.items()}


def score(
    train: np.ndarray, held: np.ndarray, labels: dict[str, np.ndarray]
) -> tuple[float, float]:
    """(EF R2, AUROC) on the held section."""
    parts = min(256, len(train) - 1)
    steps = [StandardScaler()]
    if train.shape[1] > 512:
        steps.append(PCA(parts, random_state=0))
    ridge = make_pipeline(*steps, RidgeCV(np.logspace(-1, 5, 13)))
    ridge.fit(train, labels["train_ef"])
    logistic = make_pipeline(*steps, LogisticRegressionCV(Cs=np.logspace(-4, 1, 6), max_iter=500))
    logistic.fit(train, labels["train_label"])
    return (
        float(r2_score(labels["held_ef"], ridge.predict(held))),
        float(roc_auc_score(labels["held_label"], logistic.predict_proba(held)[:, 1])),
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--branches", nargs="+", default=["video_teacher"])
    options = parser.parse_args()
    sections = json.loads((options.data / "datalist.json").read_text())
    rows = {"train": sections["training"], "held": sections["validation"]}
    labels = {f"{n}_{k}": np.array([r[k] for r in rows[n]]) for n in rows for k in ("ef", "label")}
    torch.set_num_threads(1)
    print("| checkpoint | pooling | EF R2 | AUROC |\n| --- | --- | --- | --- |")
    for ckpt in options.checkpoints:
        for branch in options.branches:
            size = EvaluatedEncoder(ckpt, branch).image_size
            loader = LoadCined(root=options.data, size=size, store=CineStore(options.cache))
            both = {n: features(ckpt, branch, loader, rows[n]) for n in rows}
            names = list(both["train"])
            for name in names:
                r2, auroc = score(both["train"][name], both["held"][name], labels)
                print(
                    f"| {ckpt.parent.name}, {branch} | {name} | {r2:.2f} | {auroc:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
