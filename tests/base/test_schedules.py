from __future__ import annotations

import pytest

from discovr_monai.base.schedules import CosineRamp, LinearRamp, WarmupCosine


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (8, 0.55), (12, 0.1), (99, 0.1)],
)
def test_warm_up_then_cosine(step, value):
    assert WarmupCosine(1.0, total=12, warmup=4, end=0.1)(step) == pytest.approx(value)


@pytest.mark.parametrize(("step", "value"), [(0, 0.996), (50, 0.998), (100, 1.0), (101, 1.0)])
def test_momentum_rises_to_one(step, value):
    assert CosineRamp(0.996, 1.0, 100)(step) == pytest.approx(value)


@pytest.mark.parametrize(("step", "value"), [(0, 0.04), (15, 0.055), (30, 0.07), (400, 0.07)])
def test_temperature_rises_in_a_line(step, value):
    assert LinearRamp(0.04, 0.07, 30)(step) == pytest.approx(value)


def test_no_warm_up_and_no_length_still_give_values():
    assert WarmupCosine(1.0, total=0)(0) == 0.0
    assert LinearRamp(0.04, 0.07, 0)(0) == 0.07
