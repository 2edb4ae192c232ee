"""What to train on: a datalist, or a folder that is scanned, checked and split."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovr_monai.base.types import DatalistRow


@dataclass
class Datalist:
    """Rows by section, and what was set aside.

    Attributes:
        sections: "training", "validation", ... -> rows; every row has "id".
        set_aside: how many files the report lists.
        report: the report's path, None where nothing was set aside.
    """

    sections: dict[str, list[DatalistRow]]
    set_aside: int = 0
    report: Path | None = None

    @property
    def fingerprint(self) -> str:
        """16 digits that change with which cines are in which section; salted, as their ids are."""
        content = json.dumps({n: [r["id"] for r in rows] for n, rows in self.sections.items()})
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def rows(self, section: str, *, normal_only: bool = False) -> list[DatalistRow]:
        """A section's rows, without those labelled abnormal if ``normal_only``.

        Raises:
            ValueError: if the section is missing or nothing is left.
        """
        if section not in self.sections:
            have = ", ".join(f"{k} ({len(v)})" for k, v in self.sections.items())
            raise ValueError(f"the datalist has no section {section!r}; it has {have}")
        rows = self.sections[section]
        if normal_only:
            rows = [r for r in rows if not r.get("label")]
        if not rows:
            why = "nothing"
            if normal_only:
                why = "only cines labelled abnormal; set train#dataset#data#normal_only: false"
            raise ValueError(f"section {section!r} of the datalist holds {why}")
        return rows


def summary(rows: Sequence[Mapping[str, Any]], set_aside: int = 0) -> str:
    """A line on some rows, with what was set aside or is unknown.

    >>> summary([{"num_frames": 96, "fps": 50.0, "patient": "a"}] * 300, set_aside=2)
    '300 cines, 0.16 hours, 1 patients; 2 files set aside'
    """
    lengths = [r["num_frames"] / r["fps"] for r in rows if r.get("num_frames") and r.get("fps")]
    hours = f"{sum(lengths) / 3600:.2f} hours" if lengths else "length unknown"
    if lengths and len(lengths) < len(rows):
        hours += f" ({len(rows) - len(lengths)} of unknown length)"
    patients = {r["patient"] for r in rows if "patient" in r}
    people = f"{len(patients)} patients" if patients else "patients unknown"
    aside = f"; {set_aside} files set aside" if set_aside else ""
    return f"{len(rows)} cines, {hours}, {people}{aside}"


def load_rows(path: Path, root: Path, *, must_exist: bool = True) -> dict[str, list[DatalistRow]]:
    """The sections of a Decathlon-style JSON over ``root``.

    Args:
        must_exist: whether a missing file is an error at once.

    Raises:
        FileNotFoundError, ValueError: with what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"datalist {path.name!r} does not exist. Check --datalist")
    try:
        content = json.loads(path.read_text())
        sections = {k: v for k, v in content.items() if isinstance(v, list)}
        rows = [row for section in sections.values() for row in section]
        names = [row["image"] for row in rows]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"datalist {path.name!r} is not a Decathlon-style JSON: it needs lists of rows with "
            f'an "image" each, such as {{"training": [{{"image": "a.avi"}}]}} ({error})'
        ) from error
    missing = []
    for name, below, exists in _look_up(root, dict.fromkeys(names)):
        if not below:
            raise ValueError(
                f"datalist {path.name!r} points outside the data folder ({Path(name).name!r}): "
                "use paths relative to dataset_dir"
            )
        if not exists:
            missing.append(name)
    if missing and must_exist:
        raise ValueError(
            f"{len(missing)} of {len(names)} files of datalist {path.name!r} do not exist, the "
            f"first is {missing[0]!r}. Check --dataset_dir, or leave these rows out"
        )
    return sections


def _look_up(root: Path, names: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """(name, whether it lies below root, whether it exists) of every file.

    A folder is listed once, instead of asking the disk (often a far one) for each of its files;
    links, and what no list shows, are asked for.
    """
    resolved = root.resolve()
    listed: dict[str, set[str]] = {}
    for name in names:
        folder, file = os.path.split(name)
        if folder not in listed:
            absolute = Path(folder).is_absolute()
            listed[folder] = set() if absolute else _plain_files(root / folder, resolved)
        if file in listed[folder]:
            yield name, True, True
            continue
        path = root / name
        below = not Path(name).is_absolute() and path.resolve().is_relative_to(resolved)
        yield name, below, below and path.exists()


def _plain_files(folder: Path, top: Path) -> set[str]:
    """What a folder holds but links; nothing where it lies outside ``top`` or cannot be listed."""
    folder = folder.resolve()
    if not folder.is_relative_to(top):
        return set()
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if not entry.is_symlink()}
    except OSError:
        return set()
