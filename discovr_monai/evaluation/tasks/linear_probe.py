"""Linear and attentive probes: classification with a small head on frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from discovr_monai.evaluation.features.extract import Features, Section, subset_by_patient
from discovr_monai.evaluation.heads.fitting import fit, scaled_groups
from discovr_monai.evaluation.report.pictures import report_classes, show_classes, show_map
from discovr_monai.evaluation.report.plots import draw_learning_curve
from discovr_monai.evaluation.report.results import Results
from discovr_monai.evaluation.tasks.targets import section_labels

PROBES = ("logistic", "linear", "attentive")
HEADLINES = {"macro_f1": "probe macro F1", "auroc": "probe AUROC"}
Predictor = Callable[[Section], np.ndarray]


class LinearHead(nn.Module):
    """Batch norm without affine, then one linear layer (as MAE's linear probe)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, classes)
        nn.init.zeros_(self.linear.bias)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, C)."""
        return self.linear(self.norm(x))


class AttentiveHead(nn.Module):
    """One learnt query attends to all tokens, then a linear layer (as V-JEPA's probe)."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        heads = next(h for h in (8, 4, 2, 1) if dim % h == 0)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.head = LinearHead(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, C)."""
        x = self.norm(tokens.float())
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return self.head(pooled[:, 0])


def fit_logistic(
    train: np.ndarray,
    labels: np.ndarray,
    validation: np.ndarray,
    validation_labels: np.ndarray,
    grid: Sequence[float],
    count: int,
) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """Logistic regression on standardised features, with the C of the lowest validation loss.

    Args:
        train, validation: (M, D) features.
        labels, validation_labels: (M,) int classes.
        grid: values of C to choose from.
        count: number of classes.

    Returns:
        (features (M, D) -> probabilities (M, C)), and the chosen C.
    """
    scaler = StandardScaler().fit(train)
    best: tuple[float, float, LogisticRegression] | None = None
    for c in grid:
        model = LogisticRegression(C=c, max_iter=2000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a weak C loses on validation
            model.fit(scaler.transform(train), labels)
        p = _columns(model, scaler.transform(validation), count)
        loss = -np.log(np.maximum(p[np.arange(len(p)), validation_labels], 1e-12)).mean()
        if best is None or loss < best[0] - 1e-12:
            best = (float(loss), float(c), model)
    if best is None:
        raise ValueError("C: the list of values to choose from is empty")
    _, chosen, model = best
    return (lambda x: _columns(model, scaler.transform(x), count)), chosen


def _columns(model: LogisticRegression, x: np.ndarray, count: int) -> np.ndarray:
    """(M, count) probabilities; 0 for a class that was not trained on."""
    probabilities = np.zeros((len(x), count))
    probabilities[:, model.classes_] = model.predict_proba(x)
    return probabilities


def fit_head(
    head: nn.Module,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Trains a head with AdamW and a cosine; keeps the epoch of the lowest validation loss.

    Args:
        head: (B, ...) -> (B, C) logits.
        train, validation: inputs (M, ...) and int64 labels (M,).
    """
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        TensorDataset(*train),
        min(batch_size, len(train[0])),
        shuffle=True,
        drop_last=True,
        generator=generator,
    )

    def validation_loss() -> float:
        logits = torch.cat([head(x.to(device)) for x in validation[0].split(256)])
        return float(nn.functional.cross_entropy(logits, validation[1].to(device)))

    fit(
        head.to(device),
        scaled_groups(head, 1.0, weight_decay),
        loader,
        prepare=lambda batch, device, *_, **__: tuple(t.to(device) for t in batch),
        loss=nn.CrossEntropyLoss(),
        validate=validation_loss,
        epochs=epochs,
        lr=lr,
        device=device,
    )
    return head


@dataclass(eq=False, repr=False)
class LinearProbe:
    """Classification from frozen features by a small head.

    Args:
        features, results: as in :class:`KNN`; an attentive probe needs features with tokens.
        classes, label_key: as in :class:`KNN`.
        train, validation, test: sections.
        probe: "logistic" (scikit-learn, C chosen on validation), "linear" (batch norm and a
            linear layer, trained) or "attentive" (one attention layer over the tokens, trained).
        pooling: "cls", "mean", "both" or "motion"; see :class:`Section`.
        label_fractions: shares of the training patients whose labels are used, 1 among them.
        c: values of C to choose from.
        epochs, lr, weight_decay, batch_size: of the trained heads.
        seed: of initialisation, order and subsets.
    """

    features: Features
    results: Results
    _: KW_ONLY
    classes: Sequence[str]
    label_key: str = "label"
    train: str = "training"
    validation: str = "validation"
    test: Sequence[str] = ("test",)
    probe: str = "logistic"
    pooling: str = "mean"
    label_fractions: Sequence[float] = (1.0,)
    c: Sequence[float] = (0.001, 0.01, 0.1, 1, 10, 100)
    epochs: int = 60
    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probe not in PROBES:
            raise ValueError(f"probe {self.probe!r} must be one of {', '.join(PROBES)}")
        if self.probe == "attentive" and not self.features.keep_tokens:
            raise ValueError("an attentive probe needs features with tokens: set tokens to true")

    def run(self) -> dict[str, Any]:
        """Evaluates, writes the results and returns them."""
        rows = self.features.rows
        names = (self.train, self.validation, *self.test)
        labels = section_labels(rows, names, self.label_key, self.classes)
        curves: dict[str, list] = {}
        for fraction in self.label_fractions:
            kept = subset_by_patient(rows[self.train], fraction, self.seed, labels[self.train])
            predict = self._fit(kept, labels)
            for section in self.test:
                scores, truth = predict(self.features[section]), labels[section]
                metrics = report_classes(
                    self.results, section, self.probe, rows[section], truth, scores,
                    label_fraction=fraction, headlines=HEADLINES if fraction == 1 else None,
                )  # fmt: skip
                for name in ("macro_f1", "auroc"):
                    curves.setdefault(f"{section}, {name}", []).append(metrics[name])
                if fraction == 1:
                    show_classes(self.results, section, section, truth, scores, self.classes)
                    features = self.features[section].pooled(self.pooling)
                    show_map(self.results, section, features, truth, self.classes, section)
        if len(self.label_fractions) > 1:
            caption = "Figures over the share of the training labels, with 95 % intervals."
            draw = (draw_learning_curve, self.label_fractions, curves)
            self.results.draw("few_labels.png", caption, *draw)
        return self.results.finish()

    def _inputs(self, section: Section) -> np.ndarray:
        if self.probe != "attentive":
            return section.pooled(self.pooling)
        assert section.tokens is not None
        return section.tokens

    def _fit(self, kept: np.ndarray, labels: dict[str, np.ndarray]) -> Predictor:
        """Trains on the ``kept`` rows of the training section."""
        x, y = self._inputs(self.features[self.train])[kept], labels[self.train][kept]
        held, held_labels = self._inputs(self.features[self.validation]), labels[self.validation]
        if self.probe == "logistic":
            model, c = fit_logistic(x, y, held, held_labels, self.c, len(self.classes))
            self.results.facts.setdefault("chosen_c", []).append(c)
            return lambda section: model(self._inputs(section))
        device = self.features.encoder.device
        torch.manual_seed(self.seed)
        kind = LinearHead if self.probe == "linear" else AttentiveHead
        head = fit_head(
            kind(x.shape[-1], len(self.classes)),
            (torch.from_numpy(x), torch.from_numpy(y)),
            (torch.from_numpy(held), torch.from_numpy(held_labels)),
            epochs=self.epochs,
            lr=self.lr,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            seed=self.seed,
            device=device,
        )

        @torch.no_grad()
        def predict(section: Section) -> np.ndarray:
            inputs = torch.from_numpy(self._inputs(section)).to(device)
            logits = torch.cat([head(part) for part in inputs.split(256)])
            return logits.softmax(-1).cpu().numpy()

        return predict
