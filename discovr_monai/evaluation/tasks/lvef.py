"""Left ventricular ejection fraction from frozen features, or by fine-tuning the last blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from discovr_monai.data.clips.dataset import ClipDataset, EpochSampler
from discovr_monai.evaluation.features.encoders import PLACES, FrozenEncoder, pool_tokens, pooled
from discovr_monai.evaluation.features.extract import Features, Section, subset_by_patient
from discovr_monai.evaluation.heads.fitting import fit, last_blocks, scaled_groups
from discovr_monai.evaluation.heads.saved import EFHead, fit_familiarity, views_of, write_head
from discovr_monai.evaluation.report.nearest import show_nearest
from discovr_monai.evaluation.report.pictures import show_map
from discovr_monai.evaluation.report.plots import draw_agreement, draw_learning_curve, draw_roc
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import (
    auroc,
    conformal_radius,
    mean_metric,
    regression_metrics,
)
from discovr_monai.evaluation.tasks.targets import ejection_fractions

METHODS = ("ridge", "fine_tune")
Predictor = Callable[[str], np.ndarray]


def fit_ridge(
    train: np.ndarray, values: np.ndarray, alphas: Sequence[float]
) -> tuple[np.ndarray, float, float]:
    """Ridge on standardised features; alpha by leave-one-out on the training cines.

    So the validation section stays untouched for the conformal interval.

    Returns:
        Weights (D,) and bias on features as they are, and the chosen alpha.
    """
    scaler = StandardScaler().fit(train)
    model = RidgeCV(list(alphas)).fit(scaler.transform(train.astype(np.float64)), values)
    weight = model.coef_ / scaler.scale_
    bias = float(model.intercept_ - weight @ scaler.mean_)
    return weight, bias, float(model.alpha_)


class Regressor(nn.Module):
    """An encoder whose last blocks are trained, a norm and one linear output.

    Args:
        encoder: is copied.
        blocks: how many last blocks are trained.
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        mean, spread: of the training values; the output starts at the mean.
        layer_decay, weight_decay: see :func:`last_blocks`.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        blocks: int,
        pooling: str,
        mean: float,
        spread: float,
        *,
        layer_decay: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.pooling, self.mean, self.spread = pooling, mean, spread
        places = min(encoder.grid[1], PLACES) * min(encoder.grid[2], PLACES)
        width = encoder.token_dim * {"both": 2, "motion": places}.get(pooling, 1)
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.LayerNorm(width), last)
        self.groups = last_blocks(
            self.encoder.encoder, blocks, layer_decay=layer_decay, weight_decay=weight_decay
        ) + scaled_groups(self.head, 1.0, weight_decay)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B,) values in the labels' unit."""
        found = self.encoder(clip)  # (B, t, 1 + n, d)
        x = pooled(pool_tokens(found, self.encoder.grid), self.pooling)
        return self.mean + self.spread * self.head(x)[:, 0]


class LVEF:
    """Ejection fraction in percent, beside the error of predicting the training median.

    Args:
        features, results: as in :class:`KNN`.
        label_key: row key of the EF in percent.
        train, validation, test: sections.
        method: "ridge" on frozen features, or "fine_tune".
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        label_fractions: shares of the training patients whose labels are used, 1 among them.
        alphas: ridge penalties to choose from.
        thresholds: EF below which a heart counts as positive in an AUROC.
        coverage: of the split-conformal interval, calibrated on the validation section.
        blocks, layer_decay, epochs, lr, weight_decay, warmup_epochs, batch_size: fine-tuning.
        seed: of fine-tuning and subsets.
        save_head: file to write the ridge head of all labels to, for inference; None for none.
        view: of the training cines, where the datalist does not say; a head needs it.
    """

    def __init__(
        self,
        features: Features,
        results: Results,
        *,
        label_key: str = "ef",
        train: str = "training",
        validation: str = "validation",
        test: Sequence[str] = ("test",),
        method: str = "ridge",
        pooling: str = "mean",
        label_fractions: Sequence[float] = (1.0,),
        alphas: Sequence[float] = tuple(np.logspace(-1, 6, 15)),
        thresholds: Sequence[float] = (40, 50),
        coverage: float = 0.9,
        blocks: int = 3,
        layer_decay: float = 0.75,
        epochs: int = 10,
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        warmup_epochs: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
        save_head: str | Path | None = None,
        view: str | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method {method!r} must be one of {', '.join(METHODS)}")
        if method == "fine_tune" and not isinstance(features.encoder.module, FrozenEncoder):
            raise ValueError(f"branch {features.encoder.branch!r} has no blocks to fine-tune")
        if save_head is not None and (method != "ridge" or not features.own_sampling):
            raise ValueError("save_head needs method ridge and the training's stride and duration")
        if not 0 < coverage < 1:
            raise ValueError(f"coverage {coverage} must lie in (0, 1)")
        self.features, self.results, self.label_key = features, results, label_key
        self.train, self.validation, self.test = train, validation, list(test)
        self.method, self.pooling = method, pooling
        self.label_fractions, self.alphas = list(label_fractions), list(alphas)
        self.thresholds, self.coverage, self.seed = list(thresholds), coverage, seed
        self.blocks, self.layer_decay = blocks, layer_decay
        self.weight_decay, self.batch_size = weight_decay, batch_size
        self.epochs, self.lr, self.warmup_epochs = epochs, lr, warmup_epochs
        self.save_head = save_head
        if save_head is not None and 1 not in self.label_fractions:
            raise ValueError("save_head needs 1.0 among the label_fractions: a head has all labels")
        both = [*features.rows[train], *features.rows[validation]]
        self.views = [] if save_head is None else views_of(both, view)

    def run(self) -> dict:
        """Evaluates, writes, returns the results."""
        rows = self.features.rows
        truth = {
            name: ejection_fractions(rows[name], self.label_key, name)
            for name in (self.train, self.validation, *self.test)
        }
        curves: dict[str, list] = {}
        median = float(np.median(truth[self.train]))
        self.results.facts["training_median"] = float(f"{median:.6g}")
        for fraction in self.label_fractions:
            kept = subset_by_patient(rows[self.train], fraction, self.seed)
            predict = self._fit(kept, truth)
            radius = conformal_radius(
                truth[self.validation] - predict(self.validation), self.coverage
            )
            if self.save_head is not None and fraction == 1:
                self._save(radius)
            for section in self.test:
                found = self._report(section, truth[section], predict(section), radius, fraction)
                curves.setdefault(f"{section}, MAE", []).append(found["mae"])
        for section in self.test:
            constant = np.full(len(truth[section]), median)
            self._add(section, "training median", truth[section], constant, {})
        if len(self.label_fractions) > 1:
            caption = "The error over the share of the training labels, with 95 % intervals."
            draw = (draw_learning_curve, self.label_fractions, curves)
            self.results.draw("few_labels.png", caption, *draw)
        return self.results.finish()

    def _add(
        self,
        section: str,
        method: str,
        truth: np.ndarray,
        predicted: np.ndarray,
        more: dict,
        **kw: Any,
    ) -> dict:
        def metrics(w: np.ndarray) -> dict[str, np.ndarray]:
            low = {f"auroc_under_{t:g}": auroc(truth < t, -predicted, w) for t in self.thresholds}
            extra = {name: mean_metric(values, w) for name, values in more.items()}
            return {**regression_metrics(truth, predicted, w), **low, **extra}

        return self.results.add(section, method, self.features.rows[section], metrics, **kw)

    def _report(
        self, section: str, truth: np.ndarray, predicted: np.ndarray, radius: float, fraction: float
    ) -> dict:
        inside = (np.abs(truth - predicted) <= radius).astype(float)
        more = {
            f"coverage_{100 * self.coverage:g}": inside,
            "half_width": np.full(len(truth), radius),
        }
        found = self._add(
            section,
            self.method,
            truth,
            predicted,
            more,
            label_fraction=fraction,
            headlines={"mae": "EF MAE", "r2": "EF R2"} if fraction == 1 else None,
        )
        rows = self.features.rows[section]
        self.results.predict(
            section,
            self.method,
            rows,
            fraction,
            truth=truth,
            predicted=predicted,
            low=np.clip(predicted - radius, 0, 100),
            high=np.clip(predicted + radius, 0, 100),
        )
        if fraction == 1:
            self._show(section, truth, predicted)
        return found

    def _show(self, section: str, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Pictures, and best, median and worst prediction beside the nearest training cines."""
        draw = self.results.draw
        caption = f"{section}: predicted against true EF, and their difference (Bland-Altman)."
        draw(f"{section}_agreement.png", caption, draw_agreement, truth, predicted, "EF", "%")
        low = np.stack([truth < t for t in self.thresholds], 1)
        names = [f"EF < {t:g}" for t in self.thresholds]
        scores = np.stack([-predicted] * len(names), 1)
        caption = f"{section}: hearts below an EF by the predicted one."
        draw(f"{section}_roc.png", caption, draw_roc, low, scores, names)
        pooled = self.features[section].pooled(self.pooling)
        show_map(self.results, section, pooled, truth, None, "EF (%)")
        order = np.argsort(np.abs(truth - predicted), kind="stable").tolist()
        chosen = {
            i: f"EF {truth[i]:.0f} %, predicted {predicted[i]:.0f} %"
            for i in dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
        }
        bank = (self.train, np.arange(len(self.features.rows[self.train])))
        show_nearest(
            self.results, self.features, (section, chosen), bank, self.pooling,
            lambda row: f"EF {row[self.label_key]:.0f} %",  # type: ignore[literal-required]
        )  # fmt: skip

    def _fit(self, kept: np.ndarray, truth: dict[str, np.ndarray]) -> Predictor:
        if self.method == "fine_tune":
            return self._fine_tune(kept, truth)
        x = self.features[self.train].pooled(self.pooling)[kept]
        self._line = weight, bias, alpha = fit_ridge(x, truth[self.train][kept], self.alphas)
        self.results.facts.setdefault("chosen_alpha", []).append(float(f"{alpha:.6g}"))

        def predict(section: str) -> np.ndarray:
            found: Section = self.features[section]
            return found.pooled(self.pooling).astype(np.float64) @ weight + bias

        return predict

    def _save(self, radius: float) -> None:
        """The ridge head of all labels, and what is like its training."""
        assert self.save_head is not None
        encoder, (weight, bias, _) = self.features.encoder, self._line
        head = EFHead(len(weight))
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.fill_(bias)
        head.radius.fill_(radius)
        about = {
            "kind": "ef",
            "checkpoint": encoder.sha256,
            "branch": encoder.branch,
            "pooling": self.pooling,
            "width": len(weight),
            "clips_per_cine": self.features.clips_per_cine,
            "coverage": self.coverage,
            "views": self.views,
            "cines": len(self.features.rows[self.train]),
        }
        familiar = fit_familiarity(self.features[self.train], self.features[self.validation])
        write_head(self.save_head, about, {"ef": head, "ef_familiarity": familiar})

    def _fine_tune(self, kept: np.ndarray, truth: dict[str, np.ndarray]) -> Predictor:
        encoder, module = self.features.encoder, self.features.encoder.module
        assert isinstance(module, FrozenEncoder)
        torch.manual_seed(self.seed)
        values = truth[self.train][kept]
        network = Regressor(
            module,
            self.blocks,
            self.pooling,
            float(values.mean()),
            float(values.std() + 1e-6),
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
        ).to(encoder.device)
        rows = [
            {**self.features.rows[self.train][i], "target": float(truth[self.train][i])}
            for i in kept
        ]
        dataset = ClipDataset(
            rows, self.features.clips(1, random=True), self.seed, keep=("image", "target")
        )
        sampler = EpochSampler(len(rows), min(self.batch_size, len(rows)), seed=self.seed)
        loader = DataLoader(dataset, sampler.batch_size, sampler=sampler)
        epoch = iter(range(1, self.epochs + 1))

        def prepare(batch: Any, device: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return encoder.prepare(batch, device), batch["target"].float().to(device)

        def validate() -> float:
            sampler.set_epoch(next(epoch))  # of the epoch that comes
            error = self._predict(network, self.validation) - truth[self.validation]
            return float(np.abs(error).mean())

        fit(
            network,
            network.groups,
            loader,
            prepare=prepare,
            loss=lambda p, t: nn.functional.smooth_l1_loss(p / network.spread, t / network.spread),
            validate=validate,
            device=encoder.device,
            progress="fine-tuning",
            epochs=self.epochs,
            lr=self.lr,
            warmup_epochs=self.warmup_epochs,
        )
        return lambda section: self._predict(network, section)

    @torch.no_grad()
    def _predict(self, network: Regressor, section: str) -> np.ndarray:
        """(M,) the mean over each cine's evenly spaced clips."""
        encoder, n = self.features.encoder, self.features.clips_per_cine
        dataset = ClipDataset(self.features.rows[section], self.features.clips())
        found = []
        for batch in DataLoader(dataset, self.batch_size):
            image = torch.as_tensor(batch["image"])
            clips = image.flatten(0, 1) if n > 1 else image
            values = network(encoder.prepare({"image": clips}, encoder.device))
            found.append(values.unflatten(0, (-1, n)).mean(1).double().cpu().numpy())
        return np.concatenate(found)
