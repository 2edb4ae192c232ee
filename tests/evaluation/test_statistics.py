"""Metrics against scikit-learn; intervals that cover; bootstrap over patients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from discovr_monai.evaluation.report.statistics import (
    auroc,
    average_precision,
    best_threshold,
    bootstrap_weights,
    classification_metrics,
    conformal_radius,
    estimate,
    f1,
    mean_metric,
    regression_metrics,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
def test_classification_is_that_of_scikit_learn(seed, classes, ties):
    rng = np.random.default_rng(seed)
    truth = np.r_[np.arange(classes), rng.integers(0, classes, 30)]
    scores = rng.random((len(truth), classes))
    scores = np.round(scores, 1) + 0.1 if ties else scores
    scores = scores / scores.sum(1, keepdims=True)
    weights = rng.integers(1, 4, len(truth)).astype(float)
    found = classification_metrics(truth, scores, weights)
    said = scores.argmax(1)
    options = {"average": "macro", "sample_weight": weights, "zero_division": 0}
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(truth, said, **options))
    assert found["precision"] == pytest.approx(metrics.precision_score(truth, said, **options))
    assert found["recall"] == pytest.approx(metrics.recall_score(truth, said, **options))
    balanced = metrics.balanced_accuracy_score(truth, said, sample_weight=weights)
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    area = (
        metrics.roc_auc_score(truth, scores[:, 1], sample_weight=weights)
        if classes == 2
        else np.mean(
            [
                metrics.roc_auc_score(truth == c, scores[:, c], sample_weight=weights)
                for c in range(classes)
            ]
        )
    )
    assert found["auroc"] == pytest.approx(area)
    precision = metrics.average_precision_score(truth == 1, scores[:, 1], sample_weight=weights)
    assert average_precision(truth == 1, scores[:, 1], weights) == pytest.approx(precision)
    assert f1(truth == 1, said == 1, weights) == pytest.approx(
        metrics.f1_score(truth == 1, said == 1, sample_weight=weights, zero_division=0)
    )


def test_regression_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, weights = rng.normal(55, 12, 50), rng.integers(1, 5, 50).astype(float)
    predicted = truth + rng.normal(0, 6, 50)
    found = regression_metrics(truth, predicted, weights)
    options = {"sample_weight": weights}
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(truth, predicted, **options))
    assert found["r2"] == pytest.approx(metrics.r2_score(truth, predicted, **options))
    root = metrics.root_mean_squared_error(truth, predicted, **options)
    assert found["rmse"] == pytest.approx(root)
    repeated = np.repeat(np.stack((truth, predicted)), weights.astype(int), axis=1)
    assert found["pearson"] == pytest.approx(np.corrcoef(repeated)[0, 1])


def test_undefined_figures_are_nan_not_wrong():
    ones = np.ones(3)
    assert np.isnan(auroc(np.array([1, 1, 1]), np.arange(3.0), ones))
    assert np.isnan(regression_metrics(np.ones(3), np.arange(3.0), ones)["r2"])
    assert np.isnan(mean_metric(np.full(3, np.nan), ones))
    assert mean_metric(np.array([1.0, np.nan, 3.0]), ones) == 2


def test_all_draws_at_once_are_the_draws_one_by_one():
    rng = np.random.default_rng(1)
    truth, scores = rng.integers(0, 2, 40), rng.random((40, 2))
    weights = bootstrap_weights([str(i // 2) for i in range(40)], 20, 0)
    together = classification_metrics(truth, scores, weights)
    for number, one in enumerate(weights):
        alone = classification_metrics(truth, scores, one)
        for name, values in together.items():
            assert values[number] == pytest.approx(float(alone[name]), nan_ok=True)


def test_patients_come_and_go_together():
    patients = ["a", "b", "a", "c", "b"]
    weights = bootstrap_weights(patients, 200, 0)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()  # as many patients as there are


def _covers(clustered: bool) -> float:
    """Share of data sets of clustered samples whose interval of the mean holds 0."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        owner = np.repeat(np.arange(40), 3)
        values = rng.normal(0, 1, 40)[owner] + rng.normal(0, 0.3, 120)
        names = [str(o) for o in owner] if clustered else [str(i) for i in range(120)]
        found = estimate(lambda w, v=values: {"mean": mean_metric(v, w)}, names, 300, trial)["mean"]
        hits += found.low <= 0 <= found.high
    return hits / 200


def test_intervals_over_patients_cover_and_those_over_samples_do_not():
    assert 0.89 <= _covers(clustered=True) <= 0.99
    assert _covers(clustered=False) < 0.85


def test_the_threshold_with_the_best_f1():
    truth, score = np.array([0, 0, 1, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.9])
    chosen = best_threshold(truth, score)
    candidates = np.linspace(0, 1, 101)
    best = max(f1(truth, score >= c, np.ones(6)) for c in candidates)
    assert f1(truth, score >= chosen, np.ones(6)) == best


def test_conformal_intervals_cover_new_samples():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        errors = rng.standard_t(3, 101)
        hits.append(abs(errors[-1]) <= conformal_radius(errors[:-1], 0.9))
    assert 0.85 < np.mean(hits) < 0.95
    assert conformal_radius(np.ones(5), 0.9) == np.inf  # five samples cannot promise 90 %
