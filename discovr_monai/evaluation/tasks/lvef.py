"""Left ventricular ejection fraction from frozen features, or by fine-tuning the last blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from discovr_monai.base.types import DatalistRow
from discovr_monai.data.clips.dataset import ClipDataset, EpochSampler
from discovr_monai.data.lists.split import patient_order
from discovr_monai.evaluation.features.encoders import FrozenEncoder
from discovr_monai.evaluation.features.extract import Features, patients_of, subset_by_patient
from discovr_monai.evaluation.heads.fitting import fit
from discovr_monai.evaluation.heads.regressor import Regressor
from discovr_monai.evaluation.heads.saved import (
    EFHead,
    check_all_labels,
    fit_familiarity,
    views_of,
    write_head,
)
from discovr_monai.evaluation.report.nearest import show_nearest
from discovr_monai.evaluation.report.pictures import show_map
from discovr_monai.evaluation.report.plots import draw_agreement, draw_learning_curve, draw_roc
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.report.statistics import (
    Estimate,
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
    """Ridge regression on standardised features.

    The penalty alpha is chosen by leave-one-out on the training cines, so that the validation
    section stays untouched for the conformal interval.

    Args:
        train: (M, D) features.
        values: (M,) EF in percent.
        alphas: to choose from.

    Returns:
        Weights (D,) and bias, for features that are not standardised, and the chosen alpha.
    """
    scaler = StandardScaler().fit(train)
    model = RidgeCV(list(alphas)).fit(scaler.transform(train.astype(np.float64)), values)
    weight = model.coef_ / scaler.scale_
    bias = float(model.intercept_ - weight @ scaler.mean_)
    return weight, bias, float(model.alpha_)


def halves_by_patient(
    rows: Sequence[DatalistRow], seed: int, section: str
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows of one half of the patients, and of the other half.

    Args:
        seed: of the patients' order.
        section: of the rows, for the error.

    Raises:
        ValueError: if there is only one patient.
    """
    owners = patients_of(rows)
    order = patient_order(owners, seed)
    if len(order) < 2:
        raise ValueError(
            f"section {section!r} has cines of {len(order)} patient, too few to choose the epoch "
            "of fine-tuning and to calibrate its interval on others: add patients, or use method "
            "ridge"
        )
    first = np.isin(owners, order[: len(order) // 2])
    return np.flatnonzero(first), np.flatnonzero(~first)


@dataclass(eq=False, repr=False)
class LVEF:
    """Ejection fraction in percent, beside the error of predicting the training median.

    The interval is split-conformal: its half-width is a quantile of the errors on validation cines
    that had no part in the training. Ridge chooses its penalty on the training section, so all of
    the validation section calibrates. Fine-tuning splits the validation section by patient: one
    half chooses the epoch, the other calibrates.

    Args:
        features, results: as in :class:`KNN`.
        label_key: row key of the EF in percent.
        train, validation, test: sections.
        method: "ridge" on frozen features, or "fine_tune".
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        label_fractions: shares of the training patients whose labels are used, 1 among them.
        alphas: ridge penalties to choose from.
        thresholds: EF below which a heart counts as positive in an AUROC.
        coverage: share of the cines whose true EF the interval shall hold, between 0 and 1.
        blocks, layer_decay, epochs, lr, weight_decay, warmup_epochs, batch_size: fine-tuning.
        seed: of fine-tuning, of the subsets and of the validation section's halves.
        save_head: file to write the ridge head of all labels to, for inference; None for none.
        view: of the training cines, where the datalist does not say; a head needs it.

    Raises:
        ValueError: if the options do not fit together, or the labels cannot be used.
    """

    features: Features
    results: Results
    _: KW_ONLY
    label_key: str = "ef"
    train: str = "training"
    validation: str = "validation"
    test: Sequence[str] = ("test",)
    method: str = "ridge"
    pooling: str = "motion"
    label_fractions: Sequence[float] = (1.0,)
    alphas: Sequence[float] = tuple(10.0 ** (e / 2) for e in range(-6, 13))
    thresholds: Sequence[float] = (40, 50)
    coverage: float = 0.9
    blocks: int = 3
    layer_decay: float = 0.75
    epochs: int = 10
    lr: float = 5e-4
    weight_decay: float = 0.05
    warmup_epochs: float = 1
    batch_size: int = 16
    seed: int = 0
    save_head: str | Path | None = None
    view: str | None = None

    def __post_init__(self) -> None:
        encoder = self.features.encoder
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} must be one of {', '.join(METHODS)}")
        if self.method == "fine_tune" and not isinstance(encoder.module, FrozenEncoder):
            raise ValueError(f"branch {encoder.branch!r} has no blocks to fine-tune")
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage {self.coverage} must lie in (0, 1)")
        self.views: list[str] = []
        if self.save_head is not None:
            if self.method != "ridge" or not self.features.own_sampling:
                raise ValueError(
                    "save_head needs method ridge and the training's stride and duration"
                )
            check_all_labels(self.label_fractions)
            rows = self.features.rows
            self.views = views_of([*rows[self.train], *rows[self.validation]], self.view)
        self.calibration = np.arange(len(self.features.rows[self.validation]))
        if self.method == "fine_tune":
            self.choosing, self.calibration = halves_by_patient(
                self.features.rows[self.validation], self.seed, self.validation
            )

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
            errors = (truth[self.validation] - predict(self.validation))[self.calibration]
            radius = conformal_radius(errors, self.coverage)
            if self.save_head is not None and fraction == 1:
                self._save(radius)
            for section in self.test:
                metrics = self._report(section, truth[section], predict(section), radius, fraction)
                curves.setdefault(f"{section}, MAE", []).append(metrics["mae"])
        for section in self.test:
            constant = np.full(len(truth[section]), median)
            self._add(section, "training median", truth[section], constant)
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
        means: Mapping[str, np.ndarray] | None = None,
        **options: Any,
    ) -> dict[str, Estimate]:
        """Adds a method's metrics; of ``means``, name -> (M,) values, it adds the mean."""

        def metrics(w: np.ndarray) -> dict[str, np.ndarray]:
            low = {f"auroc_under_{t:g}": auroc(truth < t, -predicted, w) for t in self.thresholds}
            extra = {name: mean_metric(values, w) for name, values in (means or {}).items()}
            return {**regression_metrics(truth, predicted, w), **low, **extra}

        return self.results.add(section, method, self.features.rows[section], metrics, **options)

    def _report(
        self, section: str, truth: np.ndarray, predicted: np.ndarray, radius: float, fraction: float
    ) -> dict[str, Estimate]:
        """Metrics and predictions of a section with their interval of half-width ``radius``."""
        means = {
            f"coverage_{100 * self.coverage:g}": (np.abs(truth - predicted) <= radius).astype(
                float
            ),
            "half_width": np.full(len(truth), radius),
        }
        headlines = {"mae": "EF MAE", "r2": "EF R2"} if fraction == 1 else None
        metrics = self._add(
            section, self.method, truth, predicted, means,
            label_fraction=fraction, headlines=headlines,
        )  # fmt: skip
        low, high = (np.clip(predicted + r, 0, 100) for r in (-radius, radius))
        columns = {"truth": truth, "predicted": predicted, "low": low, "high": high}
        self.results.predict(section, self.method, self.features.rows[section], fraction, **columns)
        if fraction == 1:
            self._show(section, truth, predicted)
        return metrics

    def _show(self, section: str, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Pictures, and best, median and worst prediction beside the nearest training cines."""
        draw = self.results.draw
        caption = f"{section}: predicted against true EF, and their difference (Bland-Altman)."
        draw(f"{section}_agreement.png", caption, draw_agreement, truth, predicted, "EF", "%")
        low = np.stack([truth < t for t in self.thresholds], 1)
        names = [f"EF < {t:g}" for t in self.thresholds]
        scores = np.repeat(-predicted[:, None], len(names), 1)
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
            x = self.features[section].pooled(self.pooling).astype(np.float64)
            return x @ weight + bias  # type: ignore[no-any-return]

        return predict

    def _save(self, radius: float) -> None:
        """Writes the ridge head of all labels, and which cines are like its training cines."""
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
        """Trains the encoder's last blocks on the ``kept`` rows of the training section."""
        encoder, all_rows = self.features.encoder, self.features.rows
        assert isinstance(encoder.module, FrozenEncoder)
        torch.manual_seed(self.seed)
        values = truth[self.train][kept]
        network = Regressor(
            encoder.module,
            self.blocks,
            self.pooling,
            float(values.mean()),
            float(values.std() + 1e-6),
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
        ).to(encoder.device)
        rows = [
            {**all_rows[self.train][i], "target": float(v)}
            for i, v in zip(kept, values, strict=True)
        ]
        dataset = ClipDataset(
            rows, self.features.clips(1, random=True), self.seed, keep=("image", "target")
        )
        sampler = EpochSampler(len(rows), min(self.batch_size, len(rows)), seed=self.seed)
        epoch = iter(range(1, self.epochs + 1))
        choosing = [all_rows[self.validation][i] for i in self.choosing]

        def prepare(batch: Any, device: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            return encoder.prepare(batch, device), batch["target"].float().to(device)

        def validate() -> float:
            sampler.set_epoch(next(epoch))  # of the epoch that comes
            errors = self._predict(network, choosing) - truth[self.validation][self.choosing]
            return float(np.abs(errors).mean())

        fit(
            network,
            network.groups,
            DataLoader(dataset, sampler.batch_size, sampler=sampler),
            prepare=prepare,
            loss=lambda p, t: nn.functional.smooth_l1_loss(p / network.spread, t / network.spread),
            validate=validate,
            device=encoder.device,
            progress="fine-tuning",
            epochs=self.epochs,
            lr=self.lr,
            warmup_epochs=self.warmup_epochs,
        )
        return lambda section: self._predict(network, all_rows[section])

    @torch.no_grad()
    def _predict(self, network: Regressor, rows: Sequence[DatalistRow]) -> np.ndarray:
        """(M,) EF in percent, the mean over each cine's evenly spaced clips."""
        encoder, n = self.features.encoder, self.features.clips_per_cine
        values = []
        for batch in DataLoader(ClipDataset(rows, self.features.clips()), self.batch_size):
            image = torch.as_tensor(batch["image"])
            clips = image.flatten(0, 1) if n > 1 else image
            per_clip = network(encoder.prepare({"image": clips}, encoder.device))
            values.append(per_clip.unflatten(0, (-1, n)).mean(1).double().cpu().numpy())
        return np.concatenate(values)
