"""Training, validation and test sections that keep every patient in one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from discovr_monai.base.privacy import salted_id
from discovr_monai.base.types import CineError, DatalistRow

# A patient who is found in two sections stays in the one that comes first here.
PRECIOUS = ("test", "validation", "training", "pretraining")


def patient_order(patients: Iterable[str], seed: int, digits: int | None = None) -> list[str]:
    """Different patients in an order that looks random and depends on nothing but id and seed.

    Args:
        patients: any strings; each counts once.
        seed: any integer.
        digits: how many leading characters of an id decide on its place; None for all.

    >>> patient_order(["b", "a", "c", "a"], seed=0)
    ['c', 'a', 'b']
    >>> patient_order(["c", "b", "a"], seed=1)
    ['b', 'a', 'c']
    """
    key = str(seed).encode()
    return sorted(set(patients), key=lambda p: (salted_id(p[:digits], key, 32), p))


def split_by_patient(
    rows: Sequence[DatalistRow],
    val_fraction: float,
    seed: int,
    *,
    test_fraction: float | None = None,
    fill: bool = False,
    digits: int | None = None,
) -> dict[str, list[DatalistRow]]:
    """Rows by section, no patient in two of them; each section keeps the order of its rows.

    Args:
        rows: each with its "patient".
        val_fraction: share of the patients, rounded, whose rows are the validation section.
        seed: of the order in which patients are held out.
        test_fraction: the same for a test section; None: there is none.
        fill: whether, of three patients or more, each section with a share gets at least one.
        digits: see :func:`patient_order`.

    Raises:
        ValueError: if ``val_fraction`` is not in [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction {val_fraction} must lie in [0, 1)")
    order = patient_order((r["patient"] for r in rows), seed, digits)

    def count(share: float) -> int:
        return max(round(len(order) * share), int(fill and len(order) >= 3 and share > 0))

    test = count(test_fraction or 0.0)
    section = dict.fromkeys(order, "training")
    section |= dict.fromkeys(order[:test], "test")
    section |= dict.fromkeys(order[test : test + count(val_fraction)], "validation")
    names = ["training", "validation"] + ["test"] * (test_fraction is not None)
    return {name: [r for r in rows if section[r["patient"]] == name] for name in names}


@dataclass(frozen=True)
class SplitSettings:
    """How a catalogue is split; see :func:`discovr_monai.data.lists.catalogue.build_datalist`."""

    val_fraction: float
    test_fraction: float
    folds: int | None
    test_fold: int | None
    val_fold: int | None
    seed: int

    def sections(self, rows: Sequence[DatalistRow]) -> dict[str, list[DatalistRow]]:
        """Rows by section: by fold, by the set's own "split", or by patient where it has none.

        Sets "split" and, where folds are made, "fold" of the rows.

        Raises:
            ValueError: for folds that the set does not have, or that cannot be.
        """
        if (folds := self._number_folds(rows)) is not None:
            self._split_by_fold(rows, folds)
        elif all(r.get("split") == "pretraining" for r in rows):
            for row in rows:
                row.pop("split", None)
        self._split([r for r in rows if "split" not in r], self.test_fraction)
        if not any(r["split"] == "validation" for r in rows):  # a set without one to tune on
            self._split([r for r in rows if r["split"] == "training"], 0.0)
        sections: dict[str, list[DatalistRow]] = {"training": [], "validation": []}
        for row in rows:
            sections.setdefault(row["split"], []).append(row)
        return sections

    def _number_folds(self, rows: Sequence[DatalistRow]) -> int | None:
        """How many folds there are, made here where the set has none; None without folds."""
        if any("fold" in r for r in rows):
            return self.folds or 1 + max(r.get("fold", 0) for r in rows)
        if self.folds is None:
            if self.test_fold is not None or self.val_fold is not None:
                raise ValueError("this set has no folds of its own: give --folds too")
            return None
        if self.folds < 3:
            raise ValueError(f"folds {self.folds}: at least 3 are needed for three sections")
        order = patient_order((r["patient"] for r in rows), self.seed)
        fold = {patient: i % self.folds for i, patient in enumerate(order)}
        for row in rows:
            row["fold"] = fold[row["patient"]]
        return self.folds

    def _split_by_fold(self, rows: Sequence[DatalistRow], folds: int) -> None:
        test = self.test_fold or 0
        validation = (test + 1) % folds if self.val_fold is None else self.val_fold
        if not (0 <= test < folds and 0 <= validation < folds and test != validation):
            raise ValueError(
                f"test_fold {test} and val_fold {validation} must be two of 0 to {folds - 1}"
            )
        section = {test: "test", validation: "validation"}
        for row in rows:
            row["split"] = section.get(row.get("fold", -1), "training")

    def _split(self, rows: Sequence[DatalistRow], test_fraction: float) -> None:
        parts = split_by_patient(
            rows, self.val_fraction, self.seed, test_fraction=test_fraction, fill=True
        )
        for name, part in parts.items():
            for row in part:
                row["split"] = name


def keep_patients_apart(
    sections: dict[str, list[DatalistRow]], set_aside: list[CineError]
) -> dict[str, list[DatalistRow]]:
    """Leaves each patient in one section; rows that go are added to ``set_aside``.

    Pretraining may share patients with training, since both are seen in training only.
    """
    kept: dict[str, list[DatalistRow]] = {}
    owner: dict[str, str] = {}
    by_worth = {name: i for i, name in enumerate(PRECIOUS)}
    for name in sorted(sections, key=lambda n: by_worth.get(n, len(PRECIOUS))):
        kept[name] = []
        for row in sections[name]:
            other = owner.setdefault(row["patient"], name)
            if other == name or (other, name) == ("training", "pretraining"):
                kept[name].append(row)
            else:
                problem = f"its patient is in section {other!r} too"
                remedy = "Nothing to do: a patient stays in one section"
                set_aside.append(CineError(row["image"], problem, remedy, "left out"))
    return {name: kept[name] for name in sections if kept[name] or name == "training"}
