"""Schedules as pure functions of the optimiser step, so that a resumed training needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


def cosine(step: float, total: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``total``, constant after.

    >>> [cosine(step, 4, 1.0, 0.0) for step in (0, 2, 4, 9)]
    [1.0, 0.5, 0.0, 0.0]
    """
    if step >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * max(step, 0) / total))


def linear(step: float, total: float, start: float, end: float) -> float:
    """A line from ``start`` at step 0 to ``end`` at step ``total``, constant after.

    >>> [linear(step, 4, 1.0, 3.0) for step in (0, 2, 4, 9)]
    [1.0, 2.0, 3.0, 3.0]
    """
    if step >= total:
        return end
    return start + (end - start) * max(step, 0) / total


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from 0 over ``warmup`` steps, then half a cosine down to ``end``.

    Step 0 already trains: its value is ``peak / warmup``.

    >>> [WarmupCosine(peak=1.0, total=6, warmup=2)(step) for step in (0, 1, 2, 4, 6)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
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
