from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from discovr_monai.losses.sinkhorn import sinkhorn


def restated(scores: np.ndarray, eps: float, iterations: int) -> np.ndarray:
    """SwAV's loop on the whole matrix, in float64 logarithms."""
    log_q = scores.astype(np.float64) / eps
    tokens, prototypes = scores.shape
    for _ in range(iterations):
        log_q -= np.logaddexp.reduce(log_q, axis=0, keepdims=True) + np.log(prototypes)
        log_q -= np.logaddexp.reduce(log_q, axis=1, keepdims=True) + np.log(tokens)
    return np.exp(log_q) * tokens


def cosines(tokens: int, prototypes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(tokens, 8, generator=generator), dim=1)
    c = torch.nn.functional.normalize(torch.randn(prototypes, 8, generator=generator), dim=1)
    return z @ c.T


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_equals_the_restated_loop_for_any_shape(tokens, prototypes, seed):
    scores = cosines(tokens, prototypes, seed)
    expected = restated(scores.numpy(), 0.05, 10)
    np.testing.assert_allclose(sinkhorn(scores).numpy(), expected, atol=2e-5)


def test_rows_and_columns_are_balanced():
    q = sinkhorn(cosines(600, 12, 0), iterations=100)
    torch.testing.assert_close(q.sum(1), torch.ones(600), atol=1e-4, rtol=0)
    torch.testing.assert_close(q.sum(0), torch.full((12,), 50.0), atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("tokens", [5, 300])
def test_finite_for_fewer_tokens_than_prototypes_and_coarse_types(dtype, scale, tokens):
    q = sinkhorn((cosines(tokens, 60, 1) * scale).to(dtype))
    assert q.isfinite().all()
    if scale <= 1:
        torch.testing.assert_close(q.sum(1), torch.ones(tokens), atol=1e-4, rtol=0)


def test_shifting_all_scores_changes_nothing():
    scores = cosines(30, 7, 2)
    torch.testing.assert_close(sinkhorn(scores), sinkhorn(scores + 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"eps": 0}, {"iterations": 0}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match="sinkhorn needs"):
        sinkhorn(torch.zeros(2, 2), **options)
