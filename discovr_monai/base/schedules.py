"""Schedules: pure functions of the optimiser step, so that a resumed run needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


def cosine(step: float, total: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` (step 0) to ``end`` (step >= total)."""
    if step >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * max(step, 0) / total))


def linear(step: float, total: float, start: float, end: float) -> float:
    """A line from ``start`` (step 0) to ``end`` (step >= total), constant after."""
    if step >= total:
        return end
    return start + (end - start) * max(step, 0) / total


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from 0 over ``warmup`` steps, then half a cosine down to ``end``.

    Step 0 already trains: its value is ``peak / warmup``.
    """

    peak: float
    total: int
    warmup: int = 0
    end: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return cosine(step - self.warmup, self.total - self.warmup, self.peak, self.end)


@dataclass(frozen=True)
class CosineRamp:
    """Half a cosine from ``start`` to ``end`` over ``total`` steps (the teachers' momentum)."""

    start: float
    end: float
    total: int

    def __call__(self, step: int) -> float:
        return cosine(step, self.total, self.start, self.end)


@dataclass(frozen=True)
class LinearRamp:
    """A line from ``start`` to ``end`` over ``total`` steps (the teacher's temperature)."""

    start: float
    end: float
    total: int

    def __call__(self, step: int) -> float:
        return linear(step, self.total, self.start, self.end)
