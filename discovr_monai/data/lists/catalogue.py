"""A data set's folder to one datalist: rows by adapter, splits by patient, salted ids."""

from __future__ import annotations

import inspect
import json
import pkgutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from discovr_monai.base.files import write_text
from discovr_monai.base.privacy import load_salt, salted_id
from discovr_monai.base.tables import write_table
from discovr_monai.base.types import CineError, DatalistRow
from discovr_monai.data import adapters
from discovr_monai.data.lists.datalist import summary
from discovr_monai.data.lists.scan import examine_files
from discovr_monai.data.lists.split import SplitSettings, keep_patients_apart
from discovr_monai.data.read.kinds import file_below
from discovr_monai.data.read.loader import CineLoader


@dataclass
class Catalogue:
    """The cines of a data set.

    Attributes:
        name, licence, source: of the data set.
        sections: "training", "validation", "test", "pretraining" -> rows.
        set_aside: what could not be used, and why.
        seen: image -> what it looks like (:func:`discovr_monai.data.lists.scan.appearance`);
            empty where the files were not decoded.
    """

    name: str
    licence: str
    source: str
    sections: dict[str, list[DatalistRow]]
    set_aside: list[CineError] = field(default_factory=list)
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, path: str | Path) -> Path | None:
        """Writes the Decathlon-style JSON, and NAME.set_aside.csv beside it if there is one.

        Returns:
            The path of the report, None if nothing was set aside.
        """
        path = Path(path)
        content: dict[str, Any] = {
            "name": self.name,
            "description": f"{self.name} by discovr-monai; patients and studies are salted ids",
            "licence": self.licence,
            "reference": self.source,
            "modality": {"0": "US"},
            **self.sections,
        }
        write_text(path, json.dumps(content, indent=1))
        report = path.with_name(f"{path.stem}.set_aside.csv")
        if not self.set_aside:
            report.unlink(missing_ok=True)
            return None
        cells = [(e.name, e.kind, e.problem, e.remedy) for e in self.set_aside]
        write_table(report, ("file", "kind", "reason", "what to do"), cells)
        return report

    def describe(self) -> str:
        """One line per section: cines, hours, patients, classes."""
        lines = []
        for name, rows in self.sections.items():
            counts = Counter(r["label"] for r in rows if "label" in r)
            kinds = {0: "normal", 1: "abnormal"}
            classes = ", ".join(f"{counts[k]} {kinds.get(k, k)}" for k in sorted(counts))
            lines.append(f"{name}: {summary(rows)}" + (f"; {classes}" if classes else ""))
        return "\n".join(lines)


def names() -> list[str]:
    """The adapters' names, as the command line takes them."""
    modules = (m.name for m in pkgutil.iter_modules(adapters.__path__))
    return sorted(
        name.replace("_", "-")
        for name in modules
        if hasattr(import_module(f"{adapters.__name__}.{name}"), "rows")
    )


def adapter(name: str) -> ModuleType:
    """An adapter's module.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in names():
        raise ValueError(f"data set {name!r} is unknown; there are {', '.join(names())}")
    return import_module(f"{adapters.__name__}.{name.replace('-', '_')}")


def build_datalist(
    name: str,
    root: str | Path,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    folds: int | None = None,
    test_fold: int | None = None,
    val_fold: int | None = None,
    seed: int = 0,
    check: bool = False,
    workers: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Catalogue:
    """Makes the rows of a data set, in its official splits by default.

    A set without splits is split by patient. A patient who is in two sections keeps the one that
    comes first of test, validation, training and pretraining; the other rows are set aside.
    Patients and studies become salted ids.

    Args:
        name: see :func:`names`.
        root: the data set's folder.
        val_fraction, test_fraction: shares of the patients, where the set has no split.
        folds: how many folds to make by patient; None for the set's own, if it has any.
        test_fold, val_fold: which folds are the test section (None: 0) and the validation
            section (None: the next one).
        seed: of the split by patient.
        check: whether to decode every file once. What cannot be used is set aside, the rest gets
            "num_frames" and, where the set does not tell, "fps".
        workers: processes of the check; all cores if None.
        progress: whether to show bars.
        options: the adapter's own keys, such as ``threshold`` or ``view``.

    Raises:
        ValueError: an unknown set or option, no usable cine, senseless fractions.
        FileNotFoundError, NotADirectoryError: not that set's folder.
    """
    module, root = adapter(name), Path(root)
    _check(module, name, root, options, (val_fraction, test_fraction))
    listed = tqdm(module.rows(root, **options), unit="row", disable=not progress)
    rows, aside = _usable(listed, root)
    seen = _examine(rows, aside, root, workers, progress) if check else {}
    if not rows:
        why = f"; the first file set aside: {aside[0]}" if aside else ""
        raise ValueError(f"{root.name!r} holds no usable cine of {module.TITLE}{why}")
    split = SplitSettings(val_fraction, test_fraction, folds, test_fold, val_fold, seed)
    sections = keep_patients_apart(split.sections(rows), aside)
    salt = load_salt()
    for row in (r for section in sections.values() for r in section):
        row.pop("split", None)
        for key in ("patient", "study"):
            if key in row:
                row[key] = salted_id(f"{key} {row[key]}", salt)  # type: ignore[literal-required]
    return Catalogue(module.TITLE, module.LICENCE, module.SOURCE, sections, aside, seen)


def _usable(
    listed: Iterable[DatalistRow | CineError], root: Path
) -> tuple[list[DatalistRow], list[CineError]]:
    """Rows of different files below the folder, and why the others were set aside."""
    rows: dict[str, DatalistRow] = {}
    aside: list[CineError] = []
    for row in listed:
        if isinstance(row, CineError):
            aside.append(row)
        elif row["image"] in rows:
            aside.append(CineError(row["image"], "it is listed twice", "The first row is kept"))
        else:
            try:
                file_below(root, row["image"])
                rows[row["image"]] = row
            except CineError as error:
                aside.append(error)
    return list(rows.values()), aside


def _examine(
    rows: list[DatalistRow],
    aside: list[CineError],
    root: Path,
    workers: int | None,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """Decodes all cines, moves unusable ones from ``rows`` to ``aside``; what each looks like."""
    seen, loader = {}, CineLoader(root)
    names = [row["image"] for row in rows]
    verdicts = dict(examine_files(names, loader, b"", workers, not progress))
    kept = []
    for row in rows:
        verdict = verdicts[row["image"]]
        if "bad" in verdict:
            kind, problem, remedy = verdict["bad"]
            aside.append(CineError(row["image"], problem, remedy, kind))
            continue
        row["num_frames"] = verdict["row"]["num_frames"]
        if "fps" not in row and "fps" in verdict["row"]:
            row["fps"], row["fps_source"] = verdict["row"]["fps"], verdict["row"]["fps_source"]
        for key in ("ed_frame", "es_frame"):  # a label that the file cannot hold
            if key in row and int(row[key]) >= row["num_frames"]:  # type: ignore[literal-required]
                del row[key]  # type: ignore[misc]
        seen[row["image"]] = verdict["seen"]
        kept.append(row)
    rows[:] = kept
    return seen


def _check(
    module: ModuleType, name: str, root: Path, options: dict[str, Any], shares: tuple[float, float]
) -> None:
    if not root.exists():
        raise FileNotFoundError(f"{root.name!r} does not exist. Give the data set's folder")
    if not root.is_dir():
        raise NotADirectoryError(f"{root.name!r} is a file. Give the data set's folder")
    accepted = list(inspect.signature(module.rows).parameters)[1:]
    for key in options:
        if key not in accepted:
            have = f"it has {', '.join(accepted)}" if accepted else "it has none"
            raise ValueError(f"{name} has no option {key!r}; {have}")
    if min(shares) < 0 or sum(shares) >= 1:
        raise ValueError(f"val_fraction {shares[0]} and test_fraction {shares[1]} leave no rest")
