"""What is said of a saved head's limits is measured on patients that it has not seen."""

from __future__ import annotations

import numpy as np
import torch

from discovr_monai.evaluation.features.extract import Section
from discovr_monai.evaluation.heads.saved import familiar_features, fit_familiarity


def many_cines(rng: np.random.Generator, patients: range, cines: int = 5) -> Section:
    """Patients differ, the cines of one are nearly alike."""
    rows = [{"image": f"{p}-{c}", "patient": f"p{p}"} for p in patients for c in range(cines)]
    x = rng.normal(size=(len(patients), 6)).repeat(cines, 0)
    x = (x + 0.01 * rng.normal(size=x.shape)).astype(np.float32)
    return Section(rows, x, x[:, :3], x[:, 3:])


def test_familiarity_keeps_a_patients_cines_in_one_fold():
    rng = np.random.default_rng(0)
    familiar = []
    for _ in range(20):
        known = fit_familiarity(many_cines(rng, range(8)), many_cines(rng, range(8, 10)))
        fresh = many_cines(rng, range(10, 110), 1)
        features = familiar_features(torch.from_numpy(fresh.mean), torch.from_numpy(fresh.motion))
        familiar.append(float((known(features) <= 1).float().mean()))
    assert np.mean(familiar) > 0.85  # with folds by cine, 32 % pass
