"""Labels of datalist rows, checked: one clear sentence for what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from discovr_monai.base.types import DatalistRow


def values_of(rows: Sequence[DatalistRow], key: str, section: str, remedy: str) -> list:
    """Every row's ``key``.

    Raises:
        ValueError: if a row has none.
    """
    missing = [r["image"] for r in rows if r.get(key) is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(rows)} rows of section {section!r} have no {key!r}, the first "
            f"is {missing[0]}. {remedy}"
        )
    return [r[key] for r in rows]  # type: ignore[literal-required]


def class_labels(
    rows: Sequence[DatalistRow], key: str, classes: Sequence[str], section: str
) -> np.ndarray:
    """(M,) int classes; rows may hold the number of a class or its name.

    Raises:
        ValueError: without labels, with an unknown one, or with one class only.
    """
    if len(classes) < 2:
        raise ValueError(f"classes {list(classes)} must name at least two")
    given = values_of(rows, key, section, "Add labels to the datalist, or set label_key")
    names = {str(name): number for number, name in enumerate(classes)}
    out = np.zeros(len(rows), int)
    for i, value in enumerate(given):
        number = names.get(str(value), value)
        if not isinstance(number, int) or not 0 <= number < len(classes):
            raise ValueError(
                f"{rows[i]['image']}: {key} {value!r} is none of the classes {list(classes)}. "
                "Name it under classes in the config, or correct the datalist"
            )
        out[i] = number
    if len(np.unique(out)) < 2:
        raise ValueError(
            f"section {section!r} holds only class {classes[out[0]]!r} ({len(rows)} rows): nothing "
            "can be told apart. Use a datalist with all classes in each section"
        )
    return out


def ejection_fractions(rows: Sequence[DatalistRow], key: str, section: str) -> np.ndarray:
    """(M,) float percent.

    Raises:
        ValueError: without a value, or with one outside 0..100.
    """
    given = values_of(rows, key, section, "Add it to the datalist, or set label_key")
    for row, value in zip(rows, given, strict=True):
        try:
            good = 0 <= float(value) <= 100
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f"{row['image']}: {key} {value!r} is no ejection fraction in percent (0 to 100). "
                "Correct the datalist"
            )
    return np.array([float(v) for v in given])
