"""What the tasks predict, read from the datalist's rows and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from discovr_monai.base.types import DatalistRow


def values_of(rows: Sequence[DatalistRow], key: str, section: str, remedy: str) -> list:
    """The values that the rows hold under a key.

    Args:
        section: of the rows, for the error.
        remedy: what to do where values are missing, for the error.

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
    """(M,) int classes; a row may hold the number of its class or its name.

    Raises:
        ValueError: if a row has no label or an unknown one, or all are of one class.

    >>> class_labels([{"label": 1}, {"label": "normal"}], "label", ["normal", "sick"], "test")
    array([1, 0])
    """
    if len(classes) < 2:
        raise ValueError(f"classes {list(classes)} must name at least two")
    values = values_of(rows, key, section, "Add labels to the datalist, or set label_key")
    names = {str(name): number for number, name in enumerate(classes)}
    labels = np.zeros(len(rows), int)
    for i, value in enumerate(values):
        number = names.get(str(value), value)
        if not isinstance(number, int) or not 0 <= number < len(classes):
            raise ValueError(
                f"{rows[i]['image']}: {key} {value!r} is none of the classes {list(classes)}. "
                "Name it under classes in the config, or correct the datalist"
            )
        labels[i] = number
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"section {section!r} holds only class {classes[labels[0]]!r} ({len(rows)} rows): "
            "nothing can be told apart. Use a datalist with all classes in each section"
        )
    return labels


def section_labels(
    rows: Mapping[str, Sequence[DatalistRow]],
    sections: Sequence[str],
    key: str,
    classes: Sequence[str],
) -> dict[str, np.ndarray]:
    """Section -> :func:`class_labels` of its rows."""
    return {name: class_labels(rows[name], key, classes, name) for name in sections}


def ejection_fractions(rows: Sequence[DatalistRow], key: str, section: str) -> np.ndarray:
    """(M,) float ejection fractions in percent.

    Raises:
        ValueError: without a value, or with one outside 0..100.
    """
    values = values_of(rows, key, section, "Add it to the datalist, or set label_key")
    for row, value in zip(rows, values, strict=True):
        try:
            good = 0 <= float(value) <= 100
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f"{row['image']}: {key} {value!r} is no ejection fraction in percent (0 to 100). "
                "Correct the datalist"
            )
    return np.array([float(v) for v in values])
