"""Whether a machine is quiet enough to measure on."""

from __future__ import annotations

import psutil

QUIET = 0.3  # cores


def busy_cores(seconds: float = 2.0) -> float:
    """How many cores others keep busy; says so where it is too many.

    A load average would not do: for minutes it still holds the measurement before this one.
    """
    found = psutil.cpu_percent(seconds) / 100 * (psutil.cpu_count() or 1)
    if found > QUIET:
        print(
            f"others keep {found:.1f} cores busy here: only a quiet machine gives figures to keep"
        )
    return round(found, 2)


def remark(busy: float) -> list[str]:
    """What a table says of it."""
    if busy <= QUIET:
        return []
    return [f"\n**Others kept {busy:.1f} cores busy: not to be kept.**"]
