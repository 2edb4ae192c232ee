"""Agreement of tags, agreement of versions, and plausibility as MONAI Label's scorings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod

from discovr_monai.base.files import PRIVATE, write_text
from discovr_monai.base.tables import write_table
from discovr_monai.base.types import CineError
from discovr_monai.data.read.kinds import failure_of
from discovr_monai.data.write.labels import full_frame_labels
from discovr_monai.inference.findings import Analyst
from discovr_monai.label.archive.identifiers import check_tag
from discovr_monai.label.archive.saved import FINAL, PROPOSED, labels_of
from discovr_monai.label.learn.plausibility import agreement, plausibility
from discovr_monai.label.learn.versions import Versions
from discovr_monai.label.server.tasks import Reads


class TagAgreement(ScoringMethod):
    """Dice between the labels of two tags, written to the first tag's label as "dice_OTHER".

    Args:
        structures: names of labels 1, 2, ...
    """

    def __init__(self, structures: Sequence[str]) -> None:
        super().__init__("Dice between two tags, such as final and what a version proposed")
        self.structures = list(structures)

    def config(self) -> dict[str, Any]:
        """Which two tags."""
        return {"y": FINAL, "y_pred": PROPOSED}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """{"cines": how many have both, NAME: mean Dice}; request: "y", "y_pred".

        "set_aside" are the ids whose labels cannot be read or compared.
        """
        y = check_tag(str(request.get("y") or FINAL))
        other = check_tag(str(request.get("y_pred") or PROPOSED))
        found: dict[str, list[float]] = {}
        both = sorted({*datastore.get_labeled_images(y)} & {*datastore.get_labeled_images(other)})
        aside = []
        for identity in both:
            try:
                a, b = labels_of(datastore, identity, y), labels_of(datastore, identity, other)
                dices = agreement(a, b, len(self.structures))
            except Exception:  # one label, whatever is wrong with it
                aside.append(identity)
                continue
            names = {self.structures[v - 1]: d for v, d in dices.items()}
            datastore.update_label_info(identity, y, {f"dice_{other}": names})
            for name, value in names.items():
                found.setdefault(name, []).append(value)
        told = {"cines": len(both) - len(aside), "set_aside": aside}
        return {**told, **{k: float(np.mean(v)) for k, v in found.items()}}


class VersionAgreement(ScoringMethod):
    """Dice between the contours of two versions of the model, on the cines with final labels.

    Both are run on every cine, and compared on all frames with each other, on the drawn frames
    with what was drawn. A cine that cannot be compared is set aside, the others are not:

        FOLDER/compared.json              what the last scoring came to
        FOLDER/compared.set_aside.csv     its files below the studies, what is wrong, what to do

    Args:
        server: cines and versions.
        versions: of the model that is served.
    """

    def __init__(self, server: Reads, versions: Versions) -> None:
        super().__init__("Dice between two versions of the model, and of each with the labels")
        self.server, self.versions = server, versions

    def config(self) -> dict[str, Any]:
        """Which two; "" is the one that serves, and the one before it."""
        return {"version": "", "other": ""}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """{"cines", "version", "other", "between", "version_dice", "other_dice"}: NAME -> Dice.

        "set_aside" are the ids of the cines that do not count.

        Raises:
            ValueError: for a version that there is not, or if no cine could be compared.
        """
        served = self.versions.history
        pair = (
            _version(request.get("version"), served[-1]),
            _version(request.get("other"), served[-2] if len(served) > 1 else served[0]),
        )
        analysts = [self.server.at(number) for number in pair]
        names = analysts[0].model.structures
        bad: dict[str, tuple[str, str, str]] = {}
        found: dict[str, list[dict[int, float]]] = {"between": [], "version": [], "other": []}
        for identity in sorted(datastore.get_labeled_images(FINAL)):
            try:
                dices = self._compare(identity, datastore, analysts)
            except Exception as error:  # one cine, whatever it did
                bad[identity] = failure_of(error)
                continue
            for key, values in dices.items():
                found[key].append(values)
        self._report(bad)
        if bad and not found["between"]:
            (self.versions.folder / "compared.json").unlink(missing_ok=True)
            raise ValueError(
                f"no cine could be compared: all {len(bad)} were set aside, the reasons are in "
                f"{self._aside.name} beside the versions; the first: {next(iter(bad.values()))[1]}"
            )
        means = {
            key: {
                name: float(np.mean([v[n] for v in values if n in v]))
                for n, name in enumerate(names, 1)
                if any(n in v for v in values)
            }
            for key, values in found.items()
        }
        told = {"cines": len(found["between"]), "set_aside": list(bad), "version": pair[0],
                "other": pair[1], "between": means["between"], "version_dice": means["version"],
                "other_dice": means["other"]}  # fmt: skip
        write_text(self.versions.folder / "compared.json", json.dumps(told))
        return told

    def _compare(
        self, identity: str, datastore: Datastore, analysts: Sequence[Analyst]
    ) -> dict[str, dict[int, float]]:
        """ "between", "version" and "other" -> label -> Dice, of one cine.

        Raises:
            CineError: if it or its label cannot be read, or a model fails on it.
        """
        count = len(analysts[0].model.structures)
        seen = self.server.read(identity)
        drawn = labels_of(datastore, identity, FINAL)
        there = drawn.any((1, 2))
        try:
            maps = [full_frame_labels(a.frame_maps(seen), seen.window) for a in analysts]
        except (RuntimeError, ValueError) as error:
            reason = f"the model failed on it ({type(error).__name__})"
            raise CineError(identity, reason, "Report it, leave it out", "not analysed") from error
        dices = {"between": agreement(maps[0], maps[1], count)}
        for key, own in zip(("version", "other"), maps, strict=True):
            dices[key] = agreement(drawn[there], own[there], count)
        return dices

    @property
    def _aside(self) -> Path:
        return self.versions.folder / "compared.set_aside.csv"

    def _report(self, bad: Mapping[str, tuple[str, str, str]]) -> None:
        """Writes what was set aside, for the archive's owner only: its names may be patients'."""
        if not bad:
            self._aside.unlink(missing_ok=True)
            return
        rows = sorted((self.server.name(identity), *why) for identity, why in bad.items())
        header = ("file", "kind", "reason", "what to do")
        write_table(self._aside, header, rows, mode=PRIVATE)


def _version(value: Any, default: int) -> int:
    try:
        return default if value in (None, "") else int(value)
    except (TypeError, ValueError):
        raise ValueError(f"version {str(value)[:20]!r} must be a number") from None


class LabelPlausibility(ScoringMethod):
    """What is doubtful in a label, frame by frame, written to the label as "plausibility"."""

    def __init__(self) -> None:
        super().__init__("Whole parts, a smooth area over time, an EF that hearts have")

    def config(self) -> dict[str, Any]:
        """Which tag."""
        return {"y": FINAL}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """{"cines", "score": mean, "doubtful": ids with a reason}; request: "y", the tag.

        "set_aside" are the ids whose label cannot be read.
        """
        tag = check_tag(str(request.get("y") or FINAL))
        scores, doubtful, aside = [], [], []
        for identity in sorted(datastore.get_labeled_images(tag)):
            try:
                labels = labels_of(datastore, identity, tag)
                if not labels.any():
                    continue
                found = plausibility(labels)
            except Exception:  # one label, whatever is wrong with it
                aside.append(identity)
                continue
            told: dict[str, Any] = {"score": found.score}
            told["frames"] = {str(t): why for t, why in found.reasons.items()}
            if math.isfinite(found.ef):
                told |= {"ef": found.ef, "roughness": found.roughness}
            datastore.update_label_info(identity, tag, {"plausibility": told})
            scores.append(found.score)
            if found.reasons or found.ef_out_of_range:
                doubtful.append(identity)
        mean = float(np.mean(scores)) if scores else 0.0
        return {"cines": len(scores), "score": mean, "doubtful": doubtful, "set_aside": aside}


def scorings(server: Reads, versions: Versions) -> dict[str, ScoringMethod]:
    """Scorings by name, if there is a head to score."""
    if "segmentation" not in server.model.heads:
        return {}
    return {
        "dice": TagAgreement(server.model.structures),
        "plausibility": LabelPlausibility(),
        "versions": VersionAgreement(server, versions),
    }
