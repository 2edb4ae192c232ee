"""MONAI Label's scorings: agreement of tags, agreement of versions, plausibility of labels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
from discovr_monai.label.archive.saved import FINAL, PROPOSED, datastore_labels
from discovr_monai.label.learn.plausibility import agreement, plausibility
from discovr_monai.label.learn.versions import Versions
from discovr_monai.label.server.analyst import CineAnalyst


class TagAgreement(ScoringMethod):
    """Dice between the labels of two tags, also written to the first tag's labels.

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
        """{"cines": how many have labels of both tags, NAME: mean Dice, "set_aside": ids}.

        Labels that cannot be read or compared are set aside. A label of tag "y" keeps its cine's
        own figures as "dice_OTHER", OTHER being the tag "y_pred".
        """
        tag, other = (check_tag(str(request.get(k) or v)) for k, v in self.config().items())
        scores: dict[str, list[float]] = {}
        both = {*datastore.get_labeled_images(tag)} & {*datastore.get_labeled_images(other)}
        aside = []
        for identity in sorted(both):
            try:
                a, b = (datastore_labels(datastore, identity, t) for t in (tag, other))
                dices = agreement(a, b, len(self.structures))
            except Exception:  # one label, whatever is wrong with it
                aside.append(identity)
                continue
            by_name = {self.structures[value - 1]: dice for value, dice in dices.items()}
            datastore.update_label_info(identity, tag, {f"dice_{other}": by_name})
            for name, dice in by_name.items():
                scores.setdefault(name, []).append(dice)
        means = {name: float(np.mean(dices)) for name, dices in scores.items()}
        return {"cines": len(both) - len(aside), "set_aside": aside, **means}


class VersionAgreement(ScoringMethod):
    """Dice between the contours of two versions of the model, on the cines with final labels.

    Both versions are run on every cine. They are compared with each other on all frames, and with
    the label on the frames that were drawn. A cine that cannot be compared is set aside:

        FOLDER/compared.json              what the last scoring came to
        FOLDER/compared.set_aside.csv     its files below the studies, what is wrong, what to do

    Args:
        analyst: cines and versions.
        versions: of the model that is served.
    """

    def __init__(self, analyst: CineAnalyst, versions: Versions) -> None:
        super().__init__("Dice between two versions of the model, and of each with the labels")
        self.analyst, self.versions = analyst, versions
        self._result = versions.folder / "compared.json"
        self._aside = versions.folder / "compared.set_aside.csv"

    def config(self) -> dict[str, Any]:
        """Which two; "" is the one that serves, and the one before it."""
        return {"version": "", "other": ""}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """{"cines", "version", "other", "between", "version_dice", "other_dice"}: NAME -> Dice.

        "set_aside" are the ids of the cines that do not count.

        Raises:
            ValueError: there is no such version, or no cine could be compared.
        """
        served = self.versions.history
        before = served[-2] if len(served) > 1 else served[0]
        version = _version(request.get("version"), served[-1])
        other = _version(request.get("other"), before)
        analysts = [self.analyst.at(number) for number in (version, other)]
        bad: dict[str, tuple[str, str, str]] = {}
        compared: list[dict[str, dict[int, float]]] = []
        for identity in sorted(datastore.get_labeled_images(FINAL)):
            try:
                compared.append(self._compare(identity, datastore, analysts))
            except Exception as error:  # one cine, whatever is wrong with it
                bad[identity] = failure_of(error)
        self._report(bad)
        if bad and not compared:
            self._result.unlink(missing_ok=True)
            raise ValueError(
                f"no cine could be compared: all {len(bad)} were set aside, the reasons are in "
                f"{self._aside.name} beside the versions; the first: {next(iter(bad.values()))[1]}"
            )
        result = {"cines": len(compared), "set_aside": list(bad), "version": version,
                  "other": other}  # fmt: skip
        for key in ("between", "version_dice", "other_dice"):
            means: dict[str, float] = {}
            for value, name in enumerate(analysts[0].model.structures, 1):
                dices = [cine[key][value] for cine in compared if value in cine[key]]
                if dices:
                    means[name] = float(np.mean(dices))
            result[key] = means
        write_text(self._result, json.dumps(result))
        return result

    def _compare(
        self, identity: str, datastore: Datastore, analysts: Sequence[Analyst]
    ) -> dict[str, dict[int, float]]:
        """For one cine, "between", "version_dice" and "other_dice" -> label -> Dice.

        Raises:
            CineError: the cine or its label cannot be read, or a model fails on it.
        """
        count = len(analysts[0].model.structures)
        seen = self.analyst.read(identity)
        label = datastore_labels(datastore, identity, FINAL)
        drawn = label.any((1, 2))
        try:
            first, second = (full_frame_labels(a.frame_maps(seen), seen.window) for a in analysts)
        except (RuntimeError, ValueError) as error:
            reason = f"the model failed on it ({type(error).__name__})"
            raise CineError(identity, reason, "Report it, leave it out", "not analysed") from error
        return {
            "between": agreement(first, second, count),
            "version_dice": agreement(label[drawn], first[drawn], count),
            "other_dice": agreement(label[drawn], second[drawn], count),
        }

    def _report(self, bad: Mapping[str, tuple[str, str, str]]) -> None:
        """Writes what was set aside, for the archive's owner only: names may be patients'."""
        if not bad:
            self._aside.unlink(missing_ok=True)
            return
        rows = sorted((self.analyst.name(identity), *why) for identity, why in bad.items())
        header = ("file", "kind", "reason", "what to do")
        write_table(self._aside, header, rows, mode=PRIVATE)


def _version(value: Any, default: int) -> int:
    try:
        return default if value in (None, "") else int(value)
    except (TypeError, ValueError):
        raise ValueError(f"version {str(value)[:20]!r} must be a number") from None


class LabelPlausibility(ScoringMethod):
    """What is doubtful in a label, frame by frame, also written to the label."""

    def __init__(self) -> None:
        super().__init__("Whole parts, a smooth area over time, an EF that hearts have")

    def config(self) -> dict[str, Any]:
        """Which tag."""
        return {"y": FINAL}

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """{"cines", "score": mean, "doubtful": ids, "set_aside": ids of unreadable labels}."""
        tag = check_tag(str(request.get("y") or FINAL))
        scores, doubtful, aside = [], [], []
        for identity in sorted(datastore.get_labeled_images(tag)):
            try:
                labels = datastore_labels(datastore, identity, tag)
                if not labels.any():
                    continue
                judged = plausibility(labels)
            except Exception:  # one label, whatever is wrong with it
                aside.append(identity)
                continue
            info: dict[str, Any] = {"score": judged.score}
            info["frames"] = {str(t): why for t, why in judged.reasons.items()}
            if math.isfinite(judged.ef):
                info |= {"ef": judged.ef, "roughness": judged.roughness}
            datastore.update_label_info(identity, tag, {"plausibility": info})
            scores.append(judged.score)
            if judged.reasons or judged.ef_out_of_range:
                doubtful.append(identity)
        mean = float(np.mean(scores)) if scores else 0.0
        return {"cines": len(scores), "score": mean, "doubtful": doubtful, "set_aside": aside}


def scorings(analyst: CineAnalyst, versions: Versions) -> dict[str, ScoringMethod]:
    """Scorings by name, of a model with a head for contours."""
    return {
        "dice": TagAgreement(analyst.model.structures),
        "plausibility": LabelPlausibility(),
        "versions": VersionAgreement(analyst, versions),
    }
